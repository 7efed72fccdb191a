"""One budget for all images of a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import NewlineRule, Policy, PolicyMeta, check_tokens
from vlmprune.core.registry import register, registry
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.core.views import split_count, split_equal


@register("per_image_budget")
@dataclass(frozen=True)
class PerImageBudget(Policy):
    """Divide a sample's tokens among its images, then let another policy choose in each.

    Acts where the wrapped policy acts and asks for what it asks for; only its budget at the site after the
    encoder is replaced.

    Args:
        policy: the policy that chooses, or its name; its own ``keep`` is replaced.
        keep: a share of all the sample's visual tokens, or a number of tokens per *sample*; both are divided
            by ``split``. A list gives one share or number of tokens per image, in order.
        split: ``"proportional"`` to the images' tokens (largest remainder, earlier images first), or
            ``"equal"`` (what a small image cannot take goes to the others).

    Raises:
        InputError: the wrapped policy does not act after the encoder, or is a composition.

    Example:
        >>> PerImageBudget("uniform", keep=100).divide([300, 100])
        [75, 25]
    """

    meta = PolicyMeta(title="One budget for all images of a sample")
    is_wrapper = True

    policy: Policy | str
    split: Literal["proportional", "equal"] = "proportional"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.policy, str):
            object.__setattr__(self, "policy", registry.create(self.policy))
        if not isinstance(self.policy, Policy) or self.policy.leaves() != (self.policy,):
            raise InputError("per_image_budget wraps one policy, not a composition; wrap its members instead.")
        if self.split not in ("proportional", "equal"):
            raise InputError(f"split={self.split!r} is unknown; give 'proportional' or 'equal'.")
        if self.budget.flops is not None:
            raise BudgetError(
                f"per_image_budget divides tokens; give a share or a number of tokens, not {self.budget}."
            )

    @property
    def inner(self) -> Policy:
        """The wrapped policy with this wrapper's budget, and its positions where given."""
        assert isinstance(self.policy, Policy)
        positions = self.policy.positions if self.positions == "auto" else self.positions
        return replace(self.policy, keep=self.keep, positions=positions)

    @property
    def seed(self) -> int | None:
        """The wrapped policy's seed, None if it has none."""
        return getattr(self.policy, "seed", None)

    @property
    def newlines(self) -> NewlineRule:  # type: ignore[override]
        """The wrapped policy's rule."""
        return self.inner.newlines

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        requests = self.inner.requests(info)
        if requests and all(request.site != Site.POST_ENCODER for request in requests):
            raise InputError(
                f"per_image_budget needs a policy that acts after the encoder; {self.inner.name} does not."
            )
        return requests

    def divide(self, lengths: list[int]) -> list[int]:
        """Tokens to keep of each image of a sample, from the images' numbers of tokens."""
        total = self.budget.count(sum(lengths))
        return split_count(total, lengths) if self.split == "proportional" else split_equal(total, lengths)

    def select(self, context: Context) -> Selection:
        inner = self.inner
        if context.site != Site.POST_ENCODER or self.budget.parts is not None:
            return inner.select(replace(context, budget=inner.budget))
        n_cells = [sum(view.length for view in context.item_views(item)) for item in range(context.n_items)]
        sample = context.sample or (0,) * context.n_items
        counts = [0] * context.n_items
        for number in dict.fromkeys(sample):
            items = [item for item, other in enumerate(sample) if other == number]
            for item, count in zip(items, self.divide([n_cells[item] for item in items]), strict=True):
                counts[item] = count
        # One part per item: the items stand for the images of one sample.
        budget = Budget(parts=tuple(Budget(tokens=count) for count in counts))
        return inner.select(replace(context, budget=budget, sample=(0,) * context.n_items))

    def reduces(self, info: ModelInfo) -> bool:
        return self.inner.reduces(info)

    def is_random(self, info: ModelInfo) -> bool:
        return self.inner.is_random(info)

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        return self.inner.selection_flops(info, n_tokens, n_kept)

    def reset(self) -> None:
        self.inner.reset()

    def check_count(self, info: ModelInfo) -> None:
        """A number of tokens is per sample here, so only a list can exceed what an image has."""
        if self.budget.parts is not None:
            check_tokens(self.budget, info)
