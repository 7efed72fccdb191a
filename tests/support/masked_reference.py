"""The dense model with dropped tokens hidden: the reference of every pruning with original positions.

It knows nothing of the adapters: it edits the mask with which each decoder layer of an untouched model is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a ``...ForConditionalGeneration`` or of its base model."""
    base = getattr(model, "model", model)
    text = base.text_model if hasattr(base, "text_model") else base.language_model
    return text.layers


@contextmanager
def hidden_keys(layers: Any, dropped: dict[int, Tensor], real: Tensor, decode_only: bool = False) -> Iterator[None]:
    """Run decoder layers with keys hidden from all other queries.

    Args:
        layers: the decoder's layers.
        dropped: per layer ``[B, L]`` bool, prompt tokens hidden in that layer.
        real: ``[B, L]`` bool, prompt tokens that are not padding. Runs with more rows (beams, several returned
            sequences) repeat every row of both.
        decode_only: hide them after the prefill only, as an evicted cache does.
    """
    handles = [
        layer.register_forward_pre_hook(partial(_mask, i, dropped, real, decode_only), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(
    index: int,
    dropped: dict[int, Tensor],
    real: Tensor,
    decode_only: bool,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length(index) if cache is not None else 0
    if decode_only and past == 0:
        return None
    total = past + hidden.shape[1]
    keys = torch.ones(hidden.shape[0], total, dtype=torch.bool)
    visible = real & ~dropped.get(index, torch.zeros_like(real))
    keys[:, : real.shape[1]] = visible.repeat_interleave(hidden.shape[0] // real.shape[0], dim=0)
    given = kwargs.get("attention_mask")
    mask = _allowed(given, hidden.shape[1], total) & keys[:, None, None]
    mask = mask | torch.eye(total, dtype=torch.bool)[past:]  # every token sees itself
    if given.is_floating_point() if given is not None else module.self_attn.config._attn_implementation == "eager":
        kind = hidden.dtype if given is None else given.dtype
        mask = torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, torch.finfo(kind).min)
    return args, {**kwargs, "attention_mask": mask}


def _allowed(given: Tensor | None, queries: int, total: int) -> Tensor:
    """``[.., 1, queries, total]`` True where the model itself lets queries see keys; without a mask, up to themselves.

    A mask that arrives holds more than causality: bidirectional images or prompts, sliding windows, padding.
    """
    if given is None:
        return torch.ones(1, 1, queries, total, dtype=torch.bool).tril(total - queries)
    given = given[..., :total]  # PaliGemma of transformers 4 makes a column more where it is given no mask
    return given if given.dtype == torch.bool else given == 0
