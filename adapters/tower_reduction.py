"""Reducing tokens inside a vision tower (site ``vision_block``), between its blocks or in their middle.

A block's residual stream cannot be reached from outside, but it can be cancelled. For a reduction between attention
and MLP the second norm's pre-hook shortens the stream, the hook of the last thing that the block adds remembers the
sum and returns a zero that broadcasts away in the block's own addition, and the block's hook returns the sum.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.family import transformers_major
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.packing import Packing
from vlmprune.adapters.sites import Step, run_step
from vlmprune.adapters.tower_lineage import BlockLoad, TowerOutcome
from vlmprune.adapters.tower_tokens import BlockAttention, TowerTokens
from vlmprune.adapters.vision_blocks import BlockParts
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.randomness import item_seed
from vlmprune.core.report import SiteRecord
from vlmprune.core.sites import Site

WORTH_PACKING = 1 / 16
"""Share of padding from which the MLP of a padded batch is run on the real tokens alone."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class AttentionPort(ABC):
    """How a block's attention is read and biased; one per block."""

    @abstractmethod
    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        """Hook the attention: it asks ``reducer.key_bias()`` what to add to the scores of keys, and hands
        ``reducer.attended(block, ...)`` what it multiplied if ``reducer.wants(block)``."""


class TowerReducer:
    """Runs the ``vision_block`` steps of a policy in one tower, one run after the other.

    Args:
        steps: all steps of the policy.
        info: the model.
        parts: the tower's blocks.
        ports: their attention.

    Attributes:
        tokens: those of the current run, None outside.
        records: the selections of the last run; items are those of the tower.
        attended_loads, passed_loads: of the last run, what each block's attention and MLP worked on.
    """

    def __init__(
        self, steps: Sequence[Step], info: ModelInfo, parts: Sequence[BlockParts], ports: Sequence[AttentionPort]
    ) -> None:
        self._info = info
        self._parts, self._ports = parts, ports
        inside = [step for step in steps if step.request.site == Site.VISION_BLOCK]
        self.steps = tuple(inside)
        self._before: dict[int, list[Step]] = {}
        self._middle: dict[int, list[Step]] = {}
        for step in inside:
            table = self._before if step.request.place == "before" else self._middle
            table.setdefault(step.request.layer or 0, []).append(step)
        self._wanted = {signal.layer for step in inside for signal in step.request.signals}  # type: ignore[attr-defined]
        self._attention: dict[int, BlockAttention] = {}
        self._pending: dict[int, Tensor] = {}
        self._packed: dict[int, Packing] = {}
        self._contents: tuple[str, ...] = ()
        self._carried: dict[str, Tensor] = {}
        self._left: dict[int, tuple[TowerTokens, Tensor | None]] = {}  # -1: what enters the first block
        self._below = transformers_major() < 5
        self.tokens: TowerTokens | None = None
        self.records: list[SiteRecord] = []
        self.attended_loads: list[BlockLoad] = []
        self.passed_loads: list[BlockLoad] = []

    def install(self, hooks: HookStack) -> None:
        """Hook the blocks from the first one at which something happens."""
        first = min([*self._before, *self._middle, *self._wanted], default=len(self._parts))
        for block in range(first, len(self._parts)):
            parts = self._parts[block]
            hooks.before(parts.block, partial(self._enter, block), prepend=True)
            self._ports[block].install(self, block, hooks)
            if block in self._middle:
                hooks.before(parts.norm2, partial(self._reduce_middle, block))
                hooks.after(parts.tail, partial(self._catch, block))
            hooks.after(parts.block, partial(self._leave, block), prepend=True)

    def begin(self, tokens: TowerTokens, contents: Sequence[str] = ()) -> None:
        """A run of the tower starts.

        Args:
            tokens: its tokens.
            contents: digest of each view, where a policy draws.
        """
        self.tokens = tokens
        self._contents = tuple(contents)
        if self._info.full_attention_blocks is not None:
            self._info = replace(self._info, view_windows=tokens.view_windows)
        self._carried = {}
        self._left = {}
        self.records = []
        load = BlockLoad(tokens.entered, tokens.entered)
        self.attended_loads, self.passed_loads = [load] * len(self._parts), [load] * len(self._parts)

    def end(self) -> None:
        """The run is over, or failed."""
        self.tokens = None
        self._contents = ()
        self._carried = {}
        self._left = {}
        self._attention.clear()
        self._pending.clear()
        self._packed.clear()

    def outcome(self) -> TowerOutcome:
        """What the current run did."""
        assert self.tokens is not None
        return TowerOutcome(
            tokens=self.tokens,
            records=tuple(self.records),
            attended_loads=tuple(self.attended_loads),
            passed_loads=tuple(self.passed_loads),
            positions=self.steps[0].request.positions,
        )

    def wants(self, block: int) -> bool:
        """True if a step reads the attention of ``block``."""
        return self.tokens is not None and block in self._wanted

    def key_bias(self) -> Tensor | None:
        """``[V, T]`` to add to the scores of the tower's keys, None for nothing."""
        return None if self.tokens is None else self.tokens.key_bias()

    def attended(self, block: int, attention: BlockAttention) -> None:
        """Take what a block's attention multiplied."""
        self._attention[block] = attention

    def _enter(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = self.tokens
        if tokens is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        for step in self._before.get(block, ()):
            states = self._reduce(step, states, tokens)
        self._attention.clear()
        if not tokens.changed:
            return None
        if block == 0:
            self._left[-1] = copy.copy(tokens), states
        self.attended_loads[block:] = [BlockLoad(tokens.map.lengths, tokens.computed)] * (len(self._parts) - block)
        self.passed_loads[block:] = self.attended_loads[block:]
        changed = tokens.block_arguments(kwargs)
        return ((states, *args[1:]), changed) if args else (args, {**changed, "hidden_states": states})

    def _reduce_middle(
        self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        tokens = self.tokens
        if tokens is None:
            return None
        states = args[0]
        for step in self._middle[block]:
            states = self._reduce(step, states, tokens)
        self._pending[block] = states
        packing = tokens.packing()
        computed = tokens.computed
        # What a block drops at random in training goes by the rows of its batch.
        if packing is not None and packing.padding >= WORTH_PACKING and not self._parts[block].block.training:
            self._packed[block], computed = packing, tokens.map.lengths
            states = packing.pack(states)[None]
        self.passed_loads[block:] = [BlockLoad(tokens.map.lengths, tokens.computed)] * (len(self._parts) - block)
        self.passed_loads[block] = BlockLoad(tokens.map.lengths, computed)
        return (states, *args[1:]), kwargs

    def _catch(
        self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if block not in self._pending:
            return None
        added, packing = self._parts[block].weighted(output), self._packed.pop(block, None)
        self._pending[block] = self._pending[block] + (added if packing is None else packing.pad(added[0]))
        return output.new_zeros([1] * output.ndim)

    def _leave(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tokens = self.tokens
        if tokens is None:
            return None
        states = self._pending.pop(block, None)
        if tokens.changed:
            self._left[block] = copy.copy(tokens), states if self._below else None
        if states is None:
            return None
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def noted(self, states: Sequence[Tensor | None], whole: bool) -> tuple[Tensor | None, ...]:
        """Hidden states as the model has to return them, from those that it noted while it ran.

        transformers 4 notes what a block's own ``forward`` returns, below our hooks: where tokens were reduced in its
        middle, that is not yet the block's output.

        Args:
            states: the tower's input and what left each block; None for those that were not asked for.
            whole: give them the tower's full length.
        """
        found = list(states)
        for block, (tokens, behind) in self._left.items():
            state = found[block + 1] if block + 1 < len(found) else None
            if state is None or (block < 0 and state is not behind):  # noted before the first block
                continue
            state = state if behind is None else behind
            found[block + 1] = tokens.whole(state) if whole else state
        return tuple(found)

    def _reduce(self, step: Step, states: Tensor, tokens: TowerTokens) -> Tensor:
        selection = run_step(step, self._context(step, states, tokens), self.records)
        if selection.group_id is not None:
            tokens.size_bias = step.request.size_bias
        carried = {**self._carried, **selection.carry}
        self._carried = {name: selection.apply(values) for name, values in carried.items()}
        return tokens.reduce(states, selection)

    def _context(self, step: Step, states: Tensor, tokens: TowerTokens) -> Context:
        return Context(
            site=Site.VISION_BLOCK,
            layer=step.request.layer,
            info=self._info,
            budget=step.policy.budget,
            lengths=tokens.map.lengths,
            valid=tokens.map.valid(states.device),
            pinned=tokens.pinned,
            signals=self._signals(step, tokens),
            sample=tuple(range(len(tokens.entered))),
            sizes=tokens.map.sizes,
            carry=dict(self._carried),
            seeds=self._seeds(step, tokens),
            prefix=tokens.prefix,
            entered=tokens.entered,
        )

    def _seeds(self, step: Step, tokens: TowerTokens) -> tuple[int, ...] | None:
        """Seed per item, for policies that draw: of the policy, what the view shows, the block, and the item's place
        in its view."""
        if not step.policy.is_random(self._info):
            return None
        seed, layer = getattr(step.policy, "seed", 0), step.request.layer
        views = tokens.item_views
        place = [views[:item].count(view) for item, view in enumerate(views)]
        return tuple(
            item_seed(seed, f"{self._contents[view]}\x1f{layer}", number)
            for view, number in zip(views, place, strict=True)
        )

    def _signals(self, step: Step, tokens: TowerTokens) -> Mapping[s.Signal, Any]:
        found: dict[s.Signal, Any] = {}
        for signal in step.request.signals:
            attention = self._attention.get(signal.layer)  # type: ignore[attr-defined]
            if attention is None:
                raise SignalError(f"{signal} was not recorded: the block's attention did not run through its hook.")
            if isinstance(signal, s.HeadAttention):
                found[signal] = tokens.heads(attention)
            elif isinstance(signal, s.KeyMean):
                found[signal] = tokens.items(attention.key_mean())
            else:
                found[signal] = tokens.items(attention.keys())
        return found
