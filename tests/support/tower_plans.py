"""Reductions inside a tower that a policy and its reference make up alike, from nothing but numbers of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from recording import Tape

from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site, SiteRequest

Kind = Literal["keep", "own", "merge", "prune", "shuffle"]


@dataclass(frozen=True)
class PlannedStep:
    """One reduction.

    Attributes:
        block, place: as in a request.
        kind: ``"merge"`` merges about a third of the tokens into others, ``"prune"`` drops a third, ``"shuffle"``
            puts merged and other tokens into another order, ``"keep"`` keeps all, ``"own"`` merges each with itself.
        ragged: views differ in how many go.
        size_bias: as in a request.
    """

    block: int
    place: Literal["before", "middle"] = "middle"
    kind: Kind = "merge"
    ragged: bool = False
    size_bias: bool = True

    def groups(self, view: int, tokens: int, fixed: frozenset[int]) -> list[int]:
        """Output of every token of a view, -1 for dropped ones; ``fixed`` ones stay as they are."""
        if self.kind in ("keep", "own"):
            return list(range(tokens))
        draw = random.Random(f"{self.block} {self.kind} {view} {tokens}")
        free = [token for token in range(tokens) if token not in fixed]
        draw.shuffle(free)
        going = len(free) // 3 + (view % 3 == 0 if self.ragged else 0)
        leader = list(range(tokens))
        if self.kind == "prune":
            for token in free[:going]:
                leader[token] = -1
        else:  # some groups get several of them
            stay = free[going:]
            for number, token in enumerate(free[:going]):
                leader[token] = stay[number // 2]
        first = sorted({lead for lead in leader if lead >= 0}, key=[*fixed, *range(tokens)].index)
        if self.kind == "merge":
            first = sorted(first, key=lambda lead: leader.index(lead))
        elif self.kind == "shuffle":
            first = [lead for lead in first if lead in fixed] + [lead for lead in free if lead in first]
        order = {lead: place for place, lead in enumerate(first)}
        return [-1 if lead < 0 else order[lead] for lead in leader]


@dataclass(frozen=True)
class Planned(Policy):
    """Makes the steps of a plan, with sizes as the weights of merged features.

    ``order`` says which view of the plan each view of a longer run is, whose images come several times.
    """

    meta = PolicyMeta(title="planned reductions inside the tower, for tests")
    name = "planned"

    steps: tuple[PlannedStep, ...] = ()
    signals: tuple[Signal, ...] = ()
    order: tuple[int, ...] = ()
    tape: Tape = field(default_factory=Tape, compare=False)
    keep: Any = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        positions = self.resolve_positions(info, "keep")
        return tuple(
            SiteRequest(
                Site.VISION_BLOCK,
                step.block,
                tuple(signal for signal in self.signals if signal.layer == step.block - (step.place == "before")),  # type: ignore[attr-defined]
                positions,
                place=step.place,
                size_bias=step.size_bias,
            )
            for step in self.steps
        )

    def select_vision_block(self, context: Context) -> Selection:
        self.tape.contexts.append(context)
        [step] = [step for step in self.steps if step.block == context.layer]
        groups = []
        for view, tokens in enumerate(context.lengths):
            fixed = set(range(context.prefix))
            if context.pinned is not None:
                fixed |= set(context.pinned[view].nonzero()[:, 0].tolist())
            number = self.order[view] if context.n_items == len(self.order) else view
            groups.append(step.groups(number, tokens, frozenset(fixed)))
        return selection(context, groups, step.kind)


def selection(context: Context, groups: list[list[int]], kind: Kind) -> Selection:
    """Groups of every item as a selection."""
    width = context.width
    table = torch.tensor([row + [-1] * (width - len(row)) for row in groups], device=context.device)
    counts = tuple(max(row) + 1 for row in groups)
    if kind in ("prune", "keep"):
        return Selection.from_mask(table >= 0, counts)
    sizes = torch.ones(table.shape, device=context.device) if context.sizes is None else context.sizes
    return Selection.merge(table, max(counts), "wavg", sizes, counts)


Steps = tuple[PlannedStep, ...]
