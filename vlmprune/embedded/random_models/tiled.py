"""Random-weight InternVL, Idefics3 and SmolVLM: tiles whose patches are shuffled 2 x 2 into tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.embedded.random_models import tokens
from vlmprune.embedded.random_models.sizes import Sizes

TILE, PATCH, SHUFFLE = 24, 4, 2
"""Side of a tile and of a patch in pixels, patches per side of a token: 3 x 3 tokens per tile."""
SIDE = TILE // PATCH // SHUFFLE
"""Tokens per side of a tile."""


def internvl(sizes: Sizes) -> nn.Module:
    """An `InternVLForConditionalGeneration`: tower with CLS and layer scales, Qwen2 decoder."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = {**sizes.vision, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, attention_bias=True),
        text_config=Qwen2Config(**sizes.text),
        image_token_id=tokens.IMAGE_TOKEN_ID,
        image_seq_length=SIDE**2,
        downsample_ratio=1 / SHUFFLE,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def idefics3(sizes: Sizes) -> nn.Module:
    """An `Idefics3ForConditionalGeneration` with a Llama decoder."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig

    return Idefics3ForConditionalGeneration(_idefics(Idefics3Config, Idefics3VisionConfig, sizes))


def smolvlm(sizes: Sizes) -> nn.Module:
    """A `SmolVLMForConditionalGeneration` with a Llama decoder."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return SmolVLMForConditionalGeneration(_idefics(SmolVLMConfig, SmolVLMVisionConfig, sizes))


def _idefics(kind: Any, vision: Any, sizes: Sizes) -> Any:
    from transformers import LlamaConfig

    return kind(
        vision_config=vision(**sizes.vision, image_size=TILE, patch_size=PATCH),
        text_config=LlamaConfig(**sizes.text),
        image_token_id=tokens.IMAGE_TOKEN_ID,
        scale_factor=SHUFFLE,
        pad_token_id=tokens.PAD_ID,
    )
