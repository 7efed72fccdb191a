"""Random-weight LLaVA, LLaVA-NeXT (tiles, newlines) and LLaVA-OneVision (tiles, interpolation, video)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.embedded.random_models import tokens
from vlmprune.embedded.random_models.sizes import Sizes
from vlmprune.embedded.tiny_configs import random_llava

TILE, PATCH = 24, 8
"""Side of a tile and of a patch in pixels: 3 x 3 tokens per tile."""
NEXT_PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
"""Heights and widths in pixels to which LLaVA-NeXT fits an image; the released ones over 14."""
ONEVISION_PINPOINTS = [[24, 24], [24, 48], [24, 72], [48, 24], [48, 48], [48, 72], [72, 24], [72, 48], [72, 72]]
ONEVISION_TILES = 2
"""LLaVA-OneVision shrinks images that would give more tokens than about this many tiles (9 in the released models)."""


def llava(sizes: Sizes) -> nn.Module:
    """A `LlavaForConditionalGeneration`: CLIP tower, Llama decoder, one view."""
    return random_llava(
        vision_depth=sizes.vision_depth,
        text_layers=sizes.text_layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        image_size=TILE,
        patch_size=PATCH,
        vocab_size=tokens.VOCAB_SIZE,
    )


def llava_next(sizes: Sizes) -> nn.Module:
    """A `LlavaNextForConditionalGeneration`: CLIP tower (features of the last block but one), Llama decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = CLIPVisionConfig(**_vision(sizes), projection_dim=sizes.hidden)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**sizes.text),
        image_token_index=tokens.IMAGE_TOKEN_ID,
        image_grid_pinpoints=NEXT_PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision(sizes: Sizes) -> nn.Module:
    """A `LlavaOnevisionForConditionalGeneration`: SigLIP tower without CLS, Qwen2 decoder."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(sizes), vision_use_head=False),
        text_config=Qwen2Config(**sizes.text),
        image_token_index=tokens.IMAGE_TOKEN_ID,
        video_token_index=tokens.VIDEO_TOKEN_ID,
        image_grid_pinpoints=ONEVISION_PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{ONEVISION_TILES}",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _vision(sizes: Sizes) -> dict[str, Any]:
    return {**sizes.vision, "image_size": TILE, "patch_size": PATCH}
