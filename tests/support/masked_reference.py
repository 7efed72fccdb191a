"""The dense model with dropped tokens hidden: the reference of every pruning with original positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


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
    queries = hidden.shape[1]
    total = past + queries
    keys = torch.ones(hidden.shape[0], total, dtype=torch.bool)
    length = real.shape[1]
    visible = real & ~dropped.get(index, torch.zeros_like(real))
    keys[:, :length] = visible.repeat_interleave(hidden.shape[0] // real.shape[0], dim=0)
    causal = torch.ones(queries, total, dtype=torch.bool).tril(past)
    own = torch.zeros_like(causal)
    own.diagonal(past).fill_(True)
    allowed = (causal & keys[:, None]) | own
    mask = allowed[:, None]
    if module.self_attn.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    return args, {**kwargs, "attention_mask": mask}
