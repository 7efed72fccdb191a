"""The one line: ``vlmprune.apply(model, policy, keep=...)`` and its handle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlmprune.adapters.detect import find_family
from vlmprune.adapters.engines import AnyEngine, make_engine
from vlmprune.adapters.family import unwrap
from vlmprune.adapters.processor import ProcessorHook, attach_processor
from vlmprune.core import config
from vlmprune.core.errors import ActiveError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.core.report import Report, SiteRecord

HANDLE = "_vlmprune"
"""Attribute of a model under which its handle hangs (not in the state dict)."""

Spans = Sequence[Sequence[tuple[int, int]]]


class Handle:
    """A policy at work on one model. Made by :func:`apply`; a context manager that removes it on exit."""

    def __init__(self, root: nn.Module, engine: AnyEngine, processor: ProcessorHook | None) -> None:
        self._root = root
        self._engine = engine
        self._processor = processor

    @property
    def model(self) -> nn.Module:
        """The model that was given to :func:`apply`."""
        return self._root

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._engine.policy

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._engine.info

    @property
    def last(self) -> Report | None:
        """Report of the last forward with visual tokens, None before the first."""
        report = self._engine.report
        if report is not None:
            report.take_notes()
            if self._processor is not None:
                report.geometry = self._processor.geometry()
        return report

    @property
    def tower_sites(self) -> tuple[SiteRecord, ...]:
        """Selections inside the vision tower of the last pictures that were encoded, also where the model was only
        asked for their features."""
        return self._engine.tower_sites

    @property
    def last_error(self) -> BaseException | None:
        """The exception that the last forward raised inside a policy or hook."""
        return self._engine.last_error

    @property
    def sample_ids(self) -> list[str] | None:
        """Ids of the rows of the next forwards, which seed policies that draw; None seeds by image content."""
        return self._engine.sample_ids

    @sample_ids.setter
    def sample_ids(self, ids: Sequence[str] | None) -> None:
        self._engine.sample_ids = None if ids is None else [str(i) for i in ids]

    @property
    def active(self) -> bool:
        """False after :meth:`remove`."""
        return self._root.__dict__.get(HANDLE) is self

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the dense model inside this block."""
        before = self._engine.enabled
        self._engine.switch(False)
        paused = self._processor.paused() if self._processor is not None else contextlib.nullcontext()
        try:
            with paused:
                yield
        finally:
            self._engine.switch(before)

    def remove(self) -> None:
        """Give the model back as it was, bit for bit. Calling it again does nothing."""
        if not self.active:
            return
        self._engine.remove()
        if self._processor is not None:
            self._processor.remove()
        for module in self._root.modules():
            if module.__dict__.get(HANDLE) is self:
                del module.__dict__[HANDLE]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"Handle({config.to_dict(self.policy)} on {self.info.model_class}, {state})"


def apply(
    model: nn.Module,
    policy: str | Policy | Path | Sequence[Any] | Mapping[str, Any],
    /,
    *,
    processor: Any = None,
    spans: Spans | None = None,
    restore_length: bool = True,
    **parameters: Any,
) -> Handle:
    """Make a model drop or merge visual tokens.

    Args:
        model: a transformers vision-language model, a bare decoder with ``spans``, or an image model (timm,
            open_clip). Only this instance changes.
        policy: name (:func:`available`), :class:`Policy`, config file or dict, or a list of these to compose.
        processor: the model's processor, needed by policies that act on images or ask for pixels.
        spans: for a bare decoder: per row, ``(start, length)`` of each image in ``inputs_embeds``.
        restore_length: the text model's output keeps the prompt's length, zeros at dropped places; features of an
            image model that of its patches, copies where patches were merged. False leaves them short.
        parameters: ``keep`` and other hyper-parameters, for a policy given by name; ``keep=[...]`` for a list.

    Returns:
        The :class:`Handle`.

    Raises:
        InputError: unknown policy or parameter, or a budget out of range.
        UnsupportedError: a model or configuration that cannot be pruned, or a signal that it cannot give.
        ActiveError: the model is pruned already.
    """
    resolved = config.resolve(policy, **parameters)
    active = handle_of(model)
    if active is not None:
        raise ActiveError(
            f"{type(model).__name__} is pruned already by {active!r}; call handle.remove() first (of a copy: "
            "vlmprune.handle_of(model).remove()), or compose: vlmprune.apply(model, ['a', 'b'], keep=[...])."
        )
    engine = make_engine(find_family(model, spans), resolved, restore_length, processor)
    hook = attach_processor(resolved, processor, engine.info)
    try:
        engine.install()
    except BaseException:
        if hook is not None:
            hook.remove()
        raise
    handle = Handle(model, engine, hook)
    # A part bears it too: whoever prunes the whole or that part of this model meets the handle.
    for module in (model, unwrap(model), engine.main):
        module.__dict__[HANDLE] = handle
    return handle


@contextlib.contextmanager
def applied(model: nn.Module, policy: Any, /, **arguments: Any) -> Iterator[Handle]:
    """:func:`apply` for the length of a ``with`` block."""
    handle = apply(model, policy, **arguments)
    try:
        yield handle
    finally:
        handle.remove()


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a model that is pruned, or of a part of it that is; None where nothing is.

    A deep copy of a pruned model is pruned too, by a handle of its own.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module.__dict__[HANDLE] for module in modules if HANDLE in module.__dict__), None)


def available(pattern: str = "*") -> list[str]:
    """Names of all policies that match ``pattern`` (shell wildcards), sorted."""
    return registry.available(pattern)
