"""Attention with the calling convention of flash attention, computed by SDPA, so that its path runs on a CPU.

Masks are 2-D or missing, packed segments come as cumulative lengths, and the name holds "flash", on which the towers
of Qwen branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "imitated_flash"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a flash attention function of transformers returns."""
    assert attention_mask is None or attention_mask.ndim == 2
    assert module.config._attn_implementation == NAME  # names the package to call
    positions = kwargs.get("position_ids")
    if attention_mask is None and positions is not None and query.shape[0] == 1 and query.shape[2] > 1:
        assert (positions.diff(dim=-1) == 1).all(), "would be taken for several packed sequences"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, queries, keys, dtype=torch.bool)
    if cu_seq_lens_q is not None:
        segment = torch.bucketize(torch.arange(queries), cu_seq_lens_q[1:].long(), right=True)
        allowed = allowed & (segment[:, None] == segment)
    if module.is_causal if is_causal is None else is_causal:
        allowed = allowed.tril(keys - queries)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None].bool()
    own = torch.zeros(queries, keys, dtype=torch.bool)
    own.diagonal(keys - queries).fill_(True)
    out = scaled_dot_product_attention(query, key, value, (allowed | own)[:, None], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def flash_imitated(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` with this attention in all its parts."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:  # set_attn_implementation() would look for the real package
            config._attn_implementation_internal = NAME
        yield model
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del type(table)._global_mapping[NAME]  # registering has no inverse
