"""What the vision tower says: signals read while it encodes, kept until the prompt is shortened."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import tap
from vlmprune.adapters.family import Family
from vlmprune.adapters.hooks import HookStack
from vlmprune.core import signals as s
from vlmprune.core.errors import ActiveError, SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.randomness import tensor_digest
from vlmprune.kernels.column_mass import attention_rows, column_mass

ATTENTION_SIGNALS = (s.ColumnMass, s.ClsRow, s.ClsLogits, s.Keys, s.QK)


@dataclass
class TowerRecord:
    """One run of the tower: ``values`` per signal, ``[images, N, ...]``, without the CLS token.

    ``thread`` is the one that ran it, ``projected`` what the projector made of its output ``[images, N, D]``.
    """

    images: int = 0
    thread: int = field(default_factory=threading.get_ident)
    values: dict[s.Signal, Any] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    projected: Tensor | None = None


class TowerRecorder:
    """Collects the requested signals of a tower, nothing else."""

    def __init__(self, family: Family, info: ModelInfo, wanted: Iterable[s.Signal], digests: bool) -> None:
        self._has_cls = info.has_cls
        self._wanted = frozenset(signal for signal in wanted if signal.stack_name == "vision")
        self._digests = digests
        self._family = family
        self.last: TowerRecord | None = None
        self.enabled = True
        self.inside = False  # the current forward runs the tower itself

    def install(self, hooks: HookStack) -> None:
        """Hook the tower and its projector."""
        tower, projector = self._family.tower, self._family.projector
        if tower is None or projector is None:
            return
        if not self._wanted and not self._digests:
            return
        hooks.before(tower, self._begin)
        hooks.after(projector, self._after_projector)
        blocks = self._family.vision_blocks()
        for block in sorted({signal.layer for signal in self._wanted if isinstance(signal, ATTENTION_SIGNALS)}):
            tap.install(self._family.vision_attention(block), BlockRecorder(self, block), hooks)
        for signal in self._wanted:
            if isinstance(signal, s.PreProjector):
                hooks.before(projector, partial(self._before_projector, signal))
            elif isinstance(signal, s.Hidden) and signal.when == "in":
                hooks.before(blocks[signal.layer], partial(self._hidden_in, signal))
            elif isinstance(signal, s.Hidden):
                hooks.after(blocks[signal.layer], partial(self._hidden_out, signal))

    def forget(self) -> None:
        """Drop what was recorded."""
        self.last = None

    def current(self) -> TowerRecord | None:
        """The last run of the tower, None if there was none.

        Raises:
            ActiveError: another thread's ``generate`` encoded its images in between.
        """
        if self.last is not None and self.last.thread != threading.get_ident():
            raise ActiveError("Another thread encoded images with this pruned model; use one model copy per thread.")
        return self.last

    def signal(self, signal: s.Signal, rows: Tensor) -> Any:
        """A recorded signal for images ``rows`` (int64 ``[I]``) of the last run.

        Raises:
            SignalError: the tower did not run since ``apply``, so there is nothing to read.
        """
        record = self.current()
        if record is None or signal not in record.values:
            raise SignalError(
                f"{signal} was not recorded: the images were encoded before the policy was applied. "
                "Apply first, then encode."
            )
        value = record.values[signal]
        if isinstance(value, tuple):
            return tuple(part[rows] for part in value)
        return value[rows]

    def attention(self, block: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Reduce one block's attention to the signals asked of it."""
        if self.last is None or not self.enabled:
            return
        for signal in self._wanted:
            if isinstance(signal, ATTENTION_SIGNALS) and signal.layer == block:
                self.last.values[signal] = self._reduce(signal, query.detach(), key.detach(), mask, scale)

    def _reduce(self, signal: s.Signal, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Any:
        first = int(self._has_cls)
        if isinstance(signal, s.ColumnMass):
            return column_mass(query, key, scale=scale, mask=mask, reduce=signal.reduce)[:, first:]
        if isinstance(signal, s.ClsRow):
            return attention_rows(query, key, [0], scale=scale, mask=mask).mean(1)[:, 0, first:]
        if isinstance(signal, s.ClsLogits):
            scores = (query[:, :, :1].float() @ key.float().transpose(2, 3)).mean(1)[:, 0] * scale
            return scores[:, first:]
        if isinstance(signal, s.Keys):
            return key.transpose(1, 2).flatten(2)[:, first:]
        return query[:, :, first:], key[:, :, first:]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        pixels = args[0] if args else kwargs["pixel_values"]
        self.last = TowerRecord(images=pixels.shape[0])
        if self._digests:
            self.last.digests = [tensor_digest(image) for image in pixels]

    def _after_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if self.last is not None and self.enabled:
            self.last.projected = output.detach()

    def _before_projector(
        self, signal: s.PreProjector, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.last is not None and self.enabled:
            self.last.values[signal] = (args[0] if args else next(iter(kwargs.values()))).detach()

    def _hidden_in(self, signal: s.Hidden, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden(signal, args[0] if args else kwargs["hidden_states"])

    def _hidden_out(
        self, signal: s.Hidden, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._hidden(signal, output[0] if isinstance(output, tuple) else output)

    def _hidden(self, signal: s.Hidden, states: Tensor) -> None:
        if self.last is not None and self.enabled:
            self.last.values[signal] = states.detach()[:, int(self._has_cls) :]


class BlockRecorder:
    """The tap's recorder of one tower block."""

    def __init__(self, tower: TowerRecorder, block: int) -> None:
        self._tower = tower
        self._block = block

    def record(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        with torch.no_grad():
            self._tower.attention(self._block, query, key, mask, scale)
