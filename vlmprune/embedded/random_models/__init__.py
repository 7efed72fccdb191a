"""Random-weight models of every supported family, built from configs in code.

They answer nothing sensible. They exist so that adapters can be tested on the real modelling code of transformers in
milliseconds and without a download.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmprune.core.errors import InputError
from vlmprune.embedded.random_models import gemma, llava, qwen, tiled, tokens
from vlmprune.embedded.random_models.sizes import Sizes
from vlmprune.embedded.random_models.weights import randomise

__all__ = ["FAMILIES", "Sizes", "random_vlm"]

FAMILIES = {
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "llava_onevision": llava.llava_onevision,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "internvl": tiled.internvl,
    "idefics3": tiled.idefics3,
    "smolvlm": tiled.smolvlm,
    "paligemma": gemma.paligemma,
    "gemma3": gemma.gemma3,
}
"""Name of each family -> its builder."""


def random_vlm(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    kv_heads: int | None = None,
    seed: int = 0,
    init_std: float = 0.2,
    **sizes: Any,
) -> nn.Module:
    """Build a small model with random weights, in eval mode.

    Args:
        family: one of `FAMILIES`.
        dtype: dtype of the weights.
        attn_implementation: passed to transformers for tower and decoder.
        kv_heads: key/value heads of the decoder; None means 2.
        seed: seed of the weights; the caller's global generator is left as it was.
        init_std: standard deviation of the random matrices; large enough that attention is far from uniform.
        sizes: further fields of `Sizes` (`hidden` 32, `heads` 4, `vision_depth` 4, `text_layers` 4).

    Returns:
        A stock `...ForConditionalGeneration` of transformers. Ids stand in `tokens`; `generate` never picks those
        that stand for images.

    Raises:
        InputError: unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if kv_heads is not None:
        sizes["kv_heads"] = kv_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = FAMILIES[family](Sizes(dtype=dtype, **sizes))
        randomise(model, init_std)
    model.set_attn_implementation(attn_implementation)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokens.PAD_ID, tokens.BOS_ID
    generation.eos_token_id = tokens.EOS_ID
    # A generated placeholder would ask for an image when the sequence is run again.
    generation.suppress_tokens = [tokens.START_ID, tokens.END_ID, tokens.IMAGE_TOKEN_ID, tokens.VIDEO_TOKEN_ID]
    built: nn.Module = model.to(dtype).eval()
    return built
