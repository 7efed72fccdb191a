"""Random-weight PaliGemma (the whole prompt attends both ways) and Gemma 3 (images do; sliding layers)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.embedded.random_models import tokens
from vlmprune.embedded.random_models.sizes import Sizes

IMAGE, PALIGEMMA_PATCH, GEMMA3_PATCH = 32, 8, 4
"""Side of an image and of patches in pixels; Gemma 3 averages 2 x 2 patches, so both have 4 x 4 tokens per image."""
SIDE = 4
"""Tokens per side of an image."""
SLIDING_WINDOW = 512
"""Window of Gemma 3's layers 0 and 2 in tokens: longer than any prompt of the tests."""


def paligemma(sizes: Sizes) -> nn.Module:
    """A `PaliGemmaForConditionalGeneration`: SigLIP tower, Gemma decoder."""
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_siglip(sizes, PALIGEMMA_PATCH),
        text_config=GemmaConfig(**sizes.text, head_dim=sizes.head_dim),
        image_token_index=tokens.IMAGE_TOKEN_ID,
        vocab_size=tokens.VOCAB_SIZE,
        projection_dim=sizes.hidden,
        hidden_size=sizes.hidden,
    )
    return PaliGemmaForConditionalGeneration(config)


def gemma3(sizes: Sizes) -> nn.Module:
    """A `Gemma3ForConditionalGeneration`: SigLIP tower, odd layers with full attention."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    kinds = ("sliding_attention", "full_attention")
    text = Gemma3TextConfig(
        **sizes.text,
        head_dim=sizes.head_dim,
        query_pre_attn_scalar=sizes.head_dim,
        sliding_window=SLIDING_WINDOW,
        layer_types=[kinds[i % 2] for i in range(sizes.text_layers)],
    )
    config = Gemma3Config(
        vision_config=_siglip(sizes, GEMMA3_PATCH),
        text_config=text,
        mm_tokens_per_image=SIDE**2,
        image_token_index=tokens.IMAGE_TOKEN_ID,
        boi_token_index=tokens.START_ID,
        eoi_token_index=tokens.END_ID,
    )
    return Gemma3ForConditionalGeneration(config)


def _siglip(sizes: Sizes, patch: int) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**sizes.vision, image_size=IMAGE, patch_size=patch, vision_use_head=False)
