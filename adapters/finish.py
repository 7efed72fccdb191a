"""What happens once the text model has run over a prompt: measuring, warning, restoring the length."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from vlmprune.adapters.cache import DynamicCache
from vlmprune.adapters.call import Prefill
from vlmprune.adapters.sites import Step
from vlmprune.core.flops import decoder_flops
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site


def measure_cache(call: Prefill, output: Any) -> None:
    """Write the bytes of keys and values, and of those that the dense model stores, into the report."""
    cache = call.cache if isinstance(output, tuple) else output.get("past_key_values")
    if not isinstance(cache, DynamicCache):
        return
    stored = [layer for layer in cache.layers if layer.keys is not None]
    call.report.kv_bytes_per_layer = tuple(
        sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) for layer in stored
    )
    call.report.kv_bytes_per_layer_dense = tuple(
        2 * k.shape[0] * k.shape[1] * k.shape[3] * k.element_size() * call.layout.length
        for k in (layer.keys for layer in stored)
    )


def measure_flops(call: Prefill, info: ModelInfo) -> None:
    """Write tokens and FLOPs of the decoder layers into the report."""
    report, rows = call.report, call.layout.rows
    report.lengths_per_layer = tuple(call.lengths)
    report.decoder_flops = decoder_flops(info, call.lengths, rows, call.attended)
    report.decoder_flops_dense = decoder_flops(info, [call.layout.length] * len(call.lengths), rows)


def warn_if_inactive(call: Prefill, steps: tuple[Step, ...], warned: bool) -> bool:
    """Say so, in the report and once as a warning, if a budget asked for fewer tokens and none was dropped.

    Returns:
        True if the warning was given, now or before.
    """
    asked = [s for s in steps if not s.policy.budget.is_all and s.request.site != Site.IMAGE]
    if not asked or tuple(call.visual) != call.report.visual_tokens:
        return warned
    records = [*call.report.tower_sites, *call.report.sites]  # a tower may have fewer tokens where the LLM has not
    if any(record.site == Site.KV_CACHE or record.tokens_out != record.lengths for record in records):
        return warned
    text = (
        f"{', '.join(sorted({step.policy.name for step in asked}))}: nothing was reduced with "
        f"{asked[0].policy.budget}; the images have {call.layout.lengths} visual tokens."
    )
    call.report.warnings.append(text)
    if warned or not any(_asks_for_less(step, call) for step in asked):
        return warned
    warnings.warn(text, stacklevel=2)
    return True


def _asks_for_less(step: Step, call: Prefill) -> bool:
    """True unless the budget is a number of tokens that every image stays within."""
    tokens = step.policy.budget.tokens
    return tokens is None or any(length > tokens for length in call.layout.lengths)


def restore_output(output: Any, call: Prefill) -> Any:
    """The text model's output with hidden states back at their places ``[B, L, D]``, zeros where tokens were
    dropped."""
    if isinstance(output, tuple):
        return (restore(output[0], call), *output[1:])
    output["last_hidden_state"] = restore(output["last_hidden_state"], call)
    return output


def restore(hidden: Tensor, call: Prefill) -> Tensor:
    """``[B, L, D]`` from the hidden states ``[B, n, D]`` of the current tokens."""
    tokens = call.tokens
    length = call.image_id.shape[1]
    place = tokens.index.where(tokens.valid, length)
    full = hidden.new_zeros(hidden.shape[0], length + 1, hidden.shape[2])
    return full.scatter(1, place[..., None].expand_as(hidden), hidden)[:, :length]
