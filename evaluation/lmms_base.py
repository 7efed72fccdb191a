"""Pruning inside a model class of lmms-eval itself, for parity with numbers published through it.

lmms-eval eval --model vlmprune --model_args base=llava_hf,pretrained=...,policy=hiprune,keep=0.33 --tasks ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmprune.core.errors import InputError
from vlmprune.evaluation.lmms_model import resolve_policy
from vlmprune.evaluation.lmms_plugin import MODEL_NAME
from vlmprune.evaluation.schema import DENSE

# Falls back to a model without a language head where it does not know the config.
_UNFIT = {
    "huggingface": "it loads a model without a language head",
    "async_hf_model": "it is the same as huggingface",
}
_REJECTED = ("max_batch_size",)  # most classes refuse it


def create_base(arguments: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """Build a class of lmms-eval and prune the model inside it.

    Args:
        arguments: parsed `model_args`: `base`, `policy`, `keep`, and what the class takes.
        extra: what the harness adds (`batch_size`, `device`).

    Returns:
        The instance, whose runs raise a policy's exception instead of answering "".

    Raises:
        InputError: the class is unknown or known not to work.
    """
    import lmms_eval.models

    from vlmprune.api import apply

    given = dict(arguments)
    base, policy, keep = given.pop("base"), given.pop("policy", DENSE), given.pop("keep", None)
    if base == MODEL_NAME or base in _UNFIT:
        raise InputError(f"base={base} cannot be pruned: {_UNFIT.get(base, 'it is this class itself')}.")
    resolved = resolve_policy(policy, keep, {})
    try:
        chosen = lmms_eval.models.get_model(base)
    except ValueError as error:
        raise InputError(f"lmms-eval has no model class {base!r}: {error}") from None
    options = {name: value for name, value in extra.items() if name not in _REJECTED}
    if base == "llava_hf":  # its default device map, an empty string, is refused by transformers
        given.setdefault("device_map", options.get("device") or "cpu")
    instance = chosen(**{**options, **given})
    instance.clean = lambda: None  # the harness's own version deletes the model after every run
    if resolved is not None:
        model = getattr(instance, "_model", None)
        model = instance.model if model is None else model
        handle = apply(getattr(model, "module", model), resolved)  # .module: a wrapper for several processes
        _guard(instance, handle)
    return instance


class _Guard:
    """Replaces `generate_until` of one instance: some classes turn every exception into an empty answer."""

    def __init__(self, instance: Any, handle: Any) -> None:
        self._answer, self._handle = instance.generate_until, handle

    def __call__(self, requests: list[Any]) -> Iterator[Any]:
        answers = self._answer(requests)
        if self._handle.last_error is not None:
            raise self._handle.last_error
        if self._handle.last is None:
            raise RuntimeError(f"{self._handle.policy.name} was applied, but no forward with visual tokens took place.")
        return answers


def _guard(instance: Any, handle: Any) -> None:
    instance.vlmprune_handle = handle
    instance.generate_until = _Guard(instance, handle)
