"""What the vision tower says: signals read while images are encoded, kept until the prompt is shortened."""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import tap
from vlmprune.adapters.encoded import Encoding, PixelScale
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.layout import Kind
from vlmprune.adapters.tower_exit import leave_tower
from vlmprune.adapters.tower_reduction import TowerReducer
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.towers import AttentionCall
from vlmprune.adapters.vision_family import PIXELS, VisionFamily
from vlmprune.core import signals as s
from vlmprune.core.errors import ActiveError, SignalError
from vlmprune.core.randomness import tensor_digest
from vlmprune.core.records import SiteRecord

ENCODERS: dict[Kind, str] = {"image": "get_image_features", "video": "get_video_features"}
ATTENTION_SIGNALS = (s.ColumnMass, s.ClsRow, s.ClsLogits, s.Keys, s.QK, s.Attention)


class EncodingRecorder:
    """Collects the requested signals of a tower, nothing else.

    Args:
        family: the model.
        wanted: signals; those of the text stack are left out.
        digests: note what is encoded, for seeds.
        scale: what the processor does to pixels, None where no processor is known.
        reducer: reduces tokens inside the tower, None where no policy acts there.
    """

    def __init__(
        self,
        family: VisionFamily,
        wanted: Iterable[s.Signal],
        digests: bool,
        scale: PixelScale | None = None,
        reducer: TowerReducer | None = None,
    ) -> None:
        self._wanted = frozenset(signal for signal in wanted if signal.stack_name == "vision")
        self._digests, self._scale = digests, scale
        self._reducer = reducer
        self._family = family
        self._last: dict[Kind, Encoding] = {}
        self._current: Encoding | None = None
        self._calls: dict[int, list[AttentionCall]] = defaultdict(list)
        self.enabled = True
        self.inside = False  # the current forward encodes its images itself

    def install(self, hooks: HookStack) -> None:
        """Observe the model's encoders and hook its tower and projector."""
        base = self._family.base
        for kind in self._family.kinds:
            name = ENCODERS[kind]
            if hasattr(base, name):
                hooks.wrap_method(base, name, partial(self._encode, kind, getattr(base, name)))
        tower, projector = self._family.tower_module, self._family.projector
        hooks.before(tower, self._begin)
        if self._reducer is not None:
            self._reducer.install(hooks)
            self._family.restore_length(self._restore, hooks)
            hooks.after(tower, self._exit, prepend=True)
        hooks.after(tower, self._signals, prepend=True)
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

    @property
    def reduces(self) -> bool:
        """A policy acts inside the tower."""
        return self._reducer is not None

    @property
    def tower_sites(self) -> tuple[SiteRecord, ...]:
        """The selections inside the tower of the last pictures that were encoded."""
        last = self._last.get("image")
        return () if last is None or last.tower is None else last.tower.records

    def forget(self) -> None:
        """Drop what was recorded."""
        self._last.clear()

    def brought(self, kwargs: Mapping[str, Any]) -> dict[Kind, Encoding]:
        """The encodings that a call brings along, as far as they were observed."""
        kinds = self._family.encoded_kinds(kwargs)
        return {kind: self._last[kind] for kind in kinds if kind in self._last}

    def encoding(self, kind: Kind) -> Encoding | None:
        """The last encoding of a kind, None if there was none.

        Raises:
            ActiveError: another thread's ``generate`` encoded its images in between.
        """
        found = self._last.get(kind)
        if found is not None and found.thread != threading.get_ident():
            raise ActiveError("Another thread encoded images with this pruned model; use one model copy per thread.")
        return found

    def value(self, kind: Kind, signal: s.Signal) -> Any:
        """A recorded signal of all views of the last encoding of a kind.

        Raises:
            SignalError: nothing was encoded since ``apply``, so there is nothing to read.
        """
        found = self.encoding(kind)
        if found is None or signal not in found.values:
            raise SignalError(
                f"{signal} was not recorded: the images were encoded before the policy was applied. "
                "Apply first, then encode."
            )
        return found.values[signal]

    def record(self, block: int, call: AttentionCall) -> None:
        """Keep one block's queries and keys until the tower is done."""
        if self._current is not None:
            tokens = self._reduced()
            self._calls[block].append(call if tokens is None else call.behind(tokens))

    def _encode(self, kind: Kind, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a model's encoder: calls it and notes what it was given and returned."""
        if not self.enabled or self._current is not None:
            if self._current is not None and self._current.thread != threading.get_ident():
                self._current.thread = threading.get_ident()  # another thread disturbs it: it is nobody's now
            return original(*args, **kwargs)
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        given = {n: v for n, v in arguments.items() if v is not None and n not in PIXELS.values()}
        self._current = Encoding(kind, given)
        try:
            output = original(*args, **kwargs)
            # Not the output itself: generate replaces its fields when it repeats rows.
            self._current.features = _detached(getattr(output, "pooler_output", output))
            self._last[kind] = self._current
            return output
        finally:
            self._current = None
            self._calls.clear()
            if self._reducer is not None:
                self._reducer.end()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._current is None:
            return
        run = self._current.run = self._family.tower.run(args, kwargs)
        if self._digests:
            self._current.digests = [tensor_digest(view) for view in run.contents()]
        for signal in self._wanted:
            if isinstance(signal, s.Pixels):
                assert self._scale is not None
                self._current.values[signal] = run.masked(self._scale.undo(run.pixels()))
        if self._reducer is not None:
            self._reducer.begin(run.tokens(), self._current.digests)
        run.drop_input()

    def _reduced(self) -> TowerTokens | None:
        """The tokens that are left now, None while all are there."""
        tokens = None if self._reducer is None else self._reducer.tokens
        return tokens if tokens is not None and tokens.changed else None

    def _restore(self, states: Tensor) -> Tensor:
        """What the projector makes of all patches, from what it makes of the tokens that the tower left."""
        tokens = self._reduced()
        return states if tokens is None else tokens.restore(states)

    @torch.no_grad()
    def _signals(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The tower is done: work out the signals of its attention."""
        current = self._current
        if current is None or current.run is None:
            return
        for signal in self._wanted:
            if isinstance(signal, ATTENTION_SIGNALS):
                current.values[signal] = current.run.attention(signal, self._calls[signal.layer])
        self._calls.clear()

    def _exit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The tower is done: note what was reduced in it, and give its output the form that the model expects."""
        reducer = self._reducer
        if self._current is None or reducer is None or reducer.tokens is None:
            return None
        self._current.tower = reducer.outcome()
        return leave_tower(reducer, output, whole=self._family.exit_at == "tower")

    def _before_projector(
        self, signal: s.PreProjector, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._current is not None:
            states = args[0] if args else next(iter(kwargs.values()))
            tokens = self._reduced() if self._family.exit_at == "projector" else None
            self._current.values[signal] = self._family.projector_patches(self._current.run, states.detach(), tokens)

    def _hidden_in(self, signal: s.Hidden, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden(signal, args[0] if args else kwargs["hidden_states"])

    def _hidden_out(
        self, signal: s.Hidden, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._hidden(signal, output[0] if isinstance(output, tuple) else output)

    def _hidden(self, signal: s.Hidden, states: Tensor) -> None:
        if self._current is not None and self._current.run is not None:
            self._current.values[signal] = self._current.run.patches(states.detach(), self._reduced())


def _detached(features: Any) -> Any:
    """Features, or nested lists of them, without their autograd graph."""
    if isinstance(features, (list, tuple)):
        return [_detached(part) for part in features]
    return features.detach() if isinstance(features, Tensor) else features


class BlockRecorder:
    """The tap's recorder of one tower block."""

    def __init__(self, tower: EncodingRecorder, block: int) -> None:
        self._tower = tower
        self._block = block

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, options: dict[str, Any]
    ) -> None:
        ends = options.get("cu_seq_lens_q")
        lengths = None if ends is None else tuple(ends.diff().tolist())
        self._tower.record(self._block, AttentionCall(query.detach(), key.detach(), mask, scale, lengths))
