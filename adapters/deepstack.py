"""Visual features that a text model adds after its first layers (Qwen3-VL): they follow their tokens.

The text model would add them at the places of the unpruned prompt. Where tokens may be dropped they are taken out of
its arguments, carried with the tokens like any other value, and added before the next layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.adapters.call import Prefill
from vlmprune.kernels.gather import gather_tokens

NAME = "deepstack.{}"


def take_over(call: Prefill, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The text model's keywords without deepstack features, which the call carries from now on."""
    features, places = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if features is None or places is None:
        return kwargs
    call.deepstack = len(features)
    for level, values in enumerate(features):
        field = values.new_zeros(*places.shape, values.shape[-1])
        field[places.to(field.device)] = values
        call.fields[NAME.format(level)] = field
    return {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}


def add(call: Prefill, layer: int, hidden: Tensor) -> Tensor:
    """``hidden [B, n, D]`` as it enters ``layer``, with the features that belong after the layer before."""
    if not 0 < layer <= call.deepstack:
        return hidden
    field = call.fields[NAME.format(layer - 1)].to(hidden)
    return hidden + gather_tokens(field, call.tokens.index)
