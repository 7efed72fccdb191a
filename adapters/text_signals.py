"""Signals of the text model, read from queries and keys of one layer at prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.call import Prefill
from vlmprune.core import signals as s
from vlmprune.kernels.column_mass import attention_rows, column_mass, group_mass
from vlmprune.kernels.gather import pack_indices
from vlmprune.kernels.virtual_attention import fold_sum

TEXT_ROWS, VISUAL_ROWS = 0, 1
SYSTEM_COLUMNS, TEXT_COLUMNS, VISUAL_COLUMNS = 0, 1, 2


class Probed(Exception):
    """Ends the run of a layer that was only asked for its queries and keys."""


class LayerRecorder:
    """The tap's recorder of one decoder layer.

    Args:
        wanted: the layer's signals.
        current: gives the prefill under way, None outside one.

    Attributes:
        probing: the layer runs for its ``ProbeAttention`` signals only.
    """

    def __init__(self, wanted: Iterable[s.Signal], current: Callable[[], Prefill | None]) -> None:
        self._wanted: dict[bool, list[s.Signal]] = {False: [], True: []}
        for signal in wanted:
            self._wanted[isinstance(signal, s.ProbeAttention)].append(signal)
        self._current = current
        self.probing = False

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, options: dict[str, Any]
    ) -> None:
        call = self._current()
        if call is None:
            return
        with torch.no_grad():
            for signal in self._wanted[self.probing]:
                value = text_signal(signal, call, query.detach(), key.detach(), mask, scale)
                call.signals[signal] = (call.tokens, value)
        if self.probing:
            raise Probed


def text_signal(signal: s.Signal, call: Prefill, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Any:
    """One signal over the current tokens.

    ``GroupMass`` is ``[B, 2, 3]``; ``AttentionRows`` and ``ProbeAttention`` are ``[B, R, n]`` and ``ColumnMass``
    ``[B, n]`` over all current tokens, from which the caller takes the visual ones. Padding counts as no query row.

    Where tokens stand at several places, queries and keys are those of the places: a token receives what its places
    receive together, and its row is the mean of theirs.
    """
    masking = masking_of(call, mask)
    if isinstance(signal, s.GroupMass):
        rows, columns = groups(call)
        return group_mass(query, key, rows, columns, n_query_groups=2, n_key_groups=3, scale=scale, **masking)
    if isinstance(signal, s.ColumnMass):
        weight = call.seen.valid.to(query.dtype)
        return per_token(column_mass(query, key, row_weight=weight, reduce=signal.reduce, scale=scale, **masking), call)
    assert isinstance(signal, (s.AttentionRows, s.ProbeAttention))
    rows = row_places(signal, call)
    if call.expansion is None or isinstance(signal.rows, str):  # those rows are of text, which stands at one place
        return per_token(attention_rows(query, key, rows, scale=scale, **masking).mean(1), call)
    of_rows = call.expansion.mapping[:, None] == rows.masked_fill(rows < 0, -2)[..., None]  # [B, R, m]
    places, _ = pack_indices(of_rows.flatten(0, 1))
    every = attention_rows(query, key, places.reshape(len(rows), -1), scale=scale, **masking).mean(1)
    mean = every.unflatten(1, (rows.shape[1], -1)).sum(2) / of_rows.sum(2, keepdim=True).clamp_min(1)
    return per_token(mean, call)


def per_token(values: Tensor, call: Prefill) -> Tensor:
    """Sums ``[..., n]`` over the places of each current token of ``values [..., m]`` over what attention is over."""
    if call.expansion is None:
        return values
    return fold_sum(values, call.expansion.mapping, call.tokens.length, dim=-1)


def masking_of(call: Prefill, mask: Tensor | None) -> dict[str, Any]:
    """What the layer's queries may see: its own 4-D mask, else causal over real tokens."""
    if mask is not None and mask.ndim == 4:
        return {"mask": mask}
    return {"causal": True, "key_valid": None if call.seen.full else call.seen.valid}


def groups(call: Prefill) -> tuple[Tensor, Tensor]:
    """Group of everything that attention is over, as a query (text, visual) and as a key (system, text, visual); -1 for
    neither."""
    tokens = call.seen
    image = call.image_id.gather(1, tokens.index)
    visual = image >= 0
    length = call.image_id.shape[1]
    places = torch.arange(length, device=image.device)
    first = torch.where(call.image_id >= 0, places, length).amin(1, keepdim=True)
    system = ~visual & (tokens.index < first)
    rows = torch.where(visual, VISUAL_ROWS, torch.where(system, -1, TEXT_ROWS))
    columns = torch.where(visual, VISUAL_COLUMNS, torch.where(system, SYSTEM_COLUMNS, TEXT_COLUMNS))
    return torch.where(tokens.valid, rows, -1), torch.where(tokens.valid, columns, -1)


def row_places(signal: s.AttentionRows | s.ProbeAttention, call: Prefill) -> Tensor:
    """``[B, R]`` query places in what attention is over, -1 fill; numbers count the current tokens."""
    tokens = call.seen if isinstance(signal.rows, str) else call.tokens
    places = torch.arange(tokens.length, device=tokens.index.device).expand_as(tokens.index)
    if signal.rows == "last":
        return torch.where(tokens.valid, places, -1).amax(1, keepdim=True)
    if signal.rows == "text_after":
        rows, _ = groups(call)
        chosen = rows == TEXT_ROWS
        width = int(chosen.sum(1).max())
        return torch.where(chosen, places, -1).sort(1).values[:, tokens.length - width :]
    order = torch.where(tokens.valid, tokens.valid.long().cumsum(1) - 1, -1)
    wanted = torch.tensor(signal.rows, device=places.device)
    found = order[:, None] == wanted[:, None]  # [B, R, n]
    return torch.where(found.any(2), found.long().argmax(2), -1)
