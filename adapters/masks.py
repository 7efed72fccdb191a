"""Narrowing and building attention masks for sequences from which tokens were dropped."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

MaskForm = Literal["bool", "additive", "flat"]


def mask_form(implementation: str | None) -> MaskForm:
    """What an attention implementation takes: 2-D ``flat``, 4-D ``bool`` or 4-D ``additive``."""
    if implementation and "flash" in implementation:
        return "flat"
    return "additive" if implementation in (None, "eager") else "bool"


def gather_square(mask: Any, index: Tensor, valid: Tensor, full: bool) -> Any:
    """Rows and columns ``index [B, n]`` of a prefill mask; fillers are hidden as keys.

    Args:
        mask: None, 2-D ``[B, L]``, or 4-D ``[B or 1, h, L, L]``.
        valid, full: which of ``index`` are real tokens, and whether all are.
    """
    if mask is None:
        return None if full else valid.long()
    if mask.ndim == 2:
        kept = mask.gather(1, index)
        return kept if full else kept * valid.to(kept.dtype)
    rows = index.shape[0]
    mask = mask.expand(rows, *mask.shape[1:])
    n, heads, width = index.shape[1], mask.shape[1], mask.shape[-1]
    mask = mask.gather(2, index[:, None, :, None].expand(rows, heads, n, width))
    mask = mask.gather(3, index[:, None, None, :].expand(rows, heads, n, n))
    return mask if full else hide_keys(mask, valid)


def gather_masks(mask: Any, index: Tensor, valid: Tensor, full: bool, form: MaskForm, dtype: torch.dtype) -> Any:
    """:func:`gather_square` of what a text model is given: a mask, or a dict of masks that its layers take as they
    are, so that one which is None must be built where fillers have to be hidden."""
    if not isinstance(mask, dict):
        return gather_square(mask, index, valid, full)
    return {
        name: causal(valid, index.shape[1], form, dtype)
        if part is None and not full
        else gather_square(part, index, valid, full)
        for name, part in mask.items()
    }


def visible_keys(mask: Any) -> Any:
    """Keys that the last query of a prepared mask sees, ``[B, n]`` bool.

    A dict of masks stands for its full attention; 2-D masks and None are returned as they are.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None or mask.ndim != 4:
        return mask
    last = mask[:, :, -1]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return seen.any(1)


def hide_keys(mask: Tensor, valid: Tensor) -> Tensor:
    """Hide the keys that are not ``valid [B, n]`` in a 4-D mask ``[B, h, n, n]``.

    A filler still sees itself, so that no row is empty (an empty row is NaN in eager attention).
    """
    eye = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    allowed = valid[:, None, None] | eye
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def causal(valid: Tensor, queries: int, form: MaskForm, dtype: torch.dtype) -> Tensor | None:
    """A causal mask over ``valid [B, n]`` keys for the last ``queries`` of them.

    Returns:
        ``[B, n]`` for ``flat``, else ``[B, 1, queries, n]``.
    """
    if form == "flat":
        return valid.long()
    n = valid.shape[1]
    order = torch.ones(queries, n, dtype=torch.bool, device=valid.device).tril(n - queries)
    eye = torch.zeros_like(order)
    eye.diagonal(n - queries).fill_(True)
    allowed = (order & valid[:, None, None]) | eye
    if form == "bool":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, torch.finfo(dtype).min)
