"""Several policies one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.sites import SiteRequest


@register("compose")
@dataclass(frozen=True)
class Compose(Policy):
    """Run policies in order: each acts on what the earlier ones left.

    ``vlmprune.apply(model, [first, second])`` makes one. Acts where its members act and asks for what they
    ask for.

    Args:
        policies: the members. Each has its own ``keep`` and ``positions``; the composition takes neither.

    Example:
        >>> from vlmprune.policies.uniform import Uniform
        >>> [member.keep for member in Compose((Uniform(keep=0.5), Uniform(keep=16))).leaves()]
        [0.5, 16]
    """

    meta = PolicyMeta(title="Composition of policies")
    is_wrapper = True

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies:
            raise InputError("A composition needs at least one policy.")
        if not self.budget.is_all:
            raise InputError("A composition takes no keep of its own; give every member its keep.")
        if self.positions != "auto":
            raise InputError("A composition takes no positions of its own; give them to its members.")

    def leaves(self) -> tuple[Policy, ...]:
        return tuple(leaf for policy in self.policies for leaf in policy.leaves())

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return tuple(request for leaf in self.leaves() for request in leaf.requests(info))

    def select(self, context: Context) -> Selection:
        """Never called: the framework asks the members.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("A composition selects through its members; iterate over leaves().")

    def reduces(self, info: ModelInfo) -> bool:
        return any(leaf.reduces(info) for leaf in self.leaves())

    def is_random(self, info: ModelInfo) -> bool:
        return any(leaf.is_random(info) for leaf in self.leaves())

    def needs_processor(self) -> bool:
        return any(leaf.needs_processor() for leaf in self.leaves())

    def check_count(self, info: ModelInfo) -> None:
        for leaf in self.leaves():
            leaf.check_count(info)

    def reset(self) -> None:
        for leaf in self.leaves():
            leaf.reset()
