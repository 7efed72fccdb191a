"""A policy for tests that asks for signals, keeps what it was given, and drops nothing or fixed tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site, SiteRequest


class Tape:
    """Contexts in the order in which they came."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    @property
    def last(self) -> Context:
        """The newest context."""
        return self.contexts[-1]


@dataclass(frozen=True)
class Recording(Policy):
    """Asks for ``wanted`` at one place and keeps ``kept[i]`` of item ``i``; everything where ``kept`` is None."""

    meta = PolicyMeta(title="records its contexts, for tests")
    name = "recording"
    newlines = "compete"

    wanted: tuple[Signal, ...] = ()
    site: Site = Site.POST_ENCODER
    layer: int | None = None
    kept: tuple[tuple[int, ...], ...] | None = None
    tape: Tape = field(default_factory=Tape, compare=False)

    def reduces(self, info: ModelInfo) -> bool:
        return True

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return (SiteRequest(self.site, self.layer, self.wanted, self.resolve_positions(info, "keep")),)

    def select(self, context: Context) -> Selection:
        self.tape.contexts.append(context)
        if self.kept is None:
            return Selection.keep_all(context.valid, context.lengths)
        mask = torch.zeros_like(context.valid)
        for item, tokens in enumerate(self.kept):
            mask[item, list(tokens)] = True
        return Selection.from_mask(mask & context.valid)
