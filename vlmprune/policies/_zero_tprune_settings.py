"""Checks of Zero-TPrune's settings."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeVar

from vlmprune.core.budget import Budget
from vlmprune.core.errors import BudgetError, InputError

Number = TypeVar("Number", int, float)

CHOICES = {
    "preset": (None, "deit_s"),
    "partition": ("seq_u", "seq_i", "alternate", "random", "none"),
    "features": ("concat", "mean"),
    "metric": ("cosine", "dot", "euclidean", "manhattan"),
    "fusion": ("rms", "mean", "scores"),
}


def check_settings(values: Mapping[str, Any], budget: Budget) -> None:
    """Refuse settings that make no sense on any model.

    Raises:
        InputError: unknown, out of range, or two that say how much is kept.
    """
    for name, known in CHOICES.items():
        if values[name] not in known:
            raise InputError(f"{name}={values[name]!r} is unknown; give one of {known}.")
    given = [name for name in ("preset", "keep_rates") if values[name] is not None]
    if len(given) + (not budget.is_all) > 1:
        raise InputError(f"{' and '.join([*given, 'keep'])} say how much is kept; give one of them.")
    if values["keep_rates"] == () or any(not 0 < rate <= 1 for rate in each(values["keep_rates"])):
        raise InputError(f"keep_rates={values['keep_rates']} is out of range; give shares in (0, 1].")
    for name, least in (("s_prune", 0), ("iters", 1)):
        if any(not isinstance(number, Integral) or number < least for number in each(values[name])):
            raise InputError(f"{name}={values[name]} is out of range; give whole numbers from {least}.")
    if values["layers"] == ():
        raise InputError("layers is empty; give the blocks before which tokens are pruned.")
    if values["tau"] <= 0 or not 0 <= values["v_min"] <= values["v_max"]:
        raise InputError(
            f"tau={values['tau']} or v_min={values['v_min']}, v_max={values['v_max']} is out of range; give a tau "
            "above 0 and 0 <= v_min <= v_max."
        )
    if budget.parts is not None:
        raise BudgetError(f"zero_tprune takes one budget, not {budget}; give keep_rates for each pruning layer.")


def each(values: Number | tuple[Number, ...] | None) -> tuple[Number, ...]:
    """A setting's values, none for None."""
    if values is None:
        return ()
    return values if isinstance(values, tuple) else (values,)
