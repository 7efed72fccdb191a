"""Random-weight Qwen2-VL, Qwen2.5-VL and Qwen3-VL: M-RoPE, 2x2 merger; windows (2.5); deepstack (3)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.embedded.random_models import tokens
from vlmprune.embedded.random_models.sizes import Sizes

PATCH, MERGE, TEMPORAL = 4, 2, 2
"""Side of a patch in pixels, patches per side of a token, frames per patch."""
WINDOW = 16
"""Side of an attention window of Qwen2.5-VL in pixels: 2 x 2 tokens."""
SECOND = 2
"""Temporal positions per second of video in Qwen2.5-VL."""
DEEPSTACK = (0, 2)
"""0-based tower blocks of Qwen3-VL whose output is added behind decoder layers 0 and 1."""


def qwen2_vl(sizes: Sizes) -> nn.Module:
    """A `Qwen2VLForConditionalGeneration`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {**_vision(sizes), "embed_dim": sizes.hidden, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(_config(Qwen2VLConfig, vision, _text(sizes)))


def qwen2_5_vl(sizes: Sizes) -> nn.Module:
    """A `Qwen2_5_VLForConditionalGeneration`; even blocks attend within windows, odd ones everywhere."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        **_vision(sizes),
        "intermediate_size": 2 * sizes.hidden,
        "out_hidden_size": sizes.hidden,
        "window_size": WINDOW,
        "fullatt_block_indexes": list(range(1, sizes.vision_depth, 2)),
        "tokens_per_second": SECOND,
    }
    return Qwen2_5_VLForConditionalGeneration(_config(Qwen2_5_VLConfig, vision, _text(sizes)))


def qwen3_vl(sizes: Sizes) -> nn.Module:
    """A `Qwen3VLForConditionalGeneration` with two deepstack levels and an 8 x 8 grid of position embeddings."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        **_vision(sizes),
        "intermediate_size": 2 * sizes.hidden,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(DEEPSTACK),
    }
    text = {**_text(sizes), "head_dim": sizes.head_dim}
    text["rope_scaling"] = {**text["rope_scaling"], "rope_type": "default", "mrope_interleaved": True}
    return Qwen3VLForConditionalGeneration(_config(Qwen3VLConfig, vision, text))


def _vision(sizes: Sizes) -> dict[str, Any]:
    return {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.hidden,
        "num_heads": sizes.heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }


def _text(sizes: Sizes) -> dict[str, Any]:
    half = sizes.head_dim // 2  # frequencies, shared out to time, height and width
    side = half // 4
    section = [half - 2 * side, side, side]
    return {**sizes.text, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", "mrope_section": section}}


def _config(kind: Any, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    return kind(
        vision_config=vision,
        text_config=text,
        image_token_id=tokens.IMAGE_TOKEN_ID,
        video_token_id=tokens.VIDEO_TOKEN_ID,
        vision_start_token_id=tokens.START_ID,
        vision_end_token_id=tokens.END_ID,
        tie_word_embeddings=False,
    )
