"""How to write a policy: copy this file to ``policies/<name>.py`` and change what it says.

1. Choose a base from ``vlmprune.core.bases``: ``ScorePolicy`` (highest scores stay), ``SetPolicy`` (a set per
   view), ``SingleSitePolicy`` (any other selection at one site), ``StagedPolicy`` (before several decoder
   layers), ``CachePolicy`` (the KV cache), or ``Policy`` (several sites).
2. Name the signals that it needs, from ``vlmprune.core.signals``.
3. Write the one method. Read counts from ``context``, never ``self.keep``: wrappers replace the budget.
4. Add it to ``tests/support/policy_matrix.py``; nothing else needs an edit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.core.bases import ScorePolicy
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.signals import Projected, Signal


@register("largest_norm")
@dataclass(frozen=True)
class LargestNorm(ScorePolicy):
    """Keep the tokens with the largest feature norm (the idea in one sentence).

    Paper: "Title", arXiv id, venue. Official code: licence.

    Acts after the projector (where). Needs the projected features (which signals).

    Args:
        keep: K = floor(share * N), or a number of tokens per image.
        power: exponent of the norm (paper symbol p, 2.0), above 0.

    Deviations from the paper and from the official code, each with its switch: none.

    Cost: ``2 N D`` FLOPs.

    Example:
        >>> LargestNorm(keep=0.5).budget.count(9)
        4
    """

    meta = PolicyMeta(title="Title of the paper", arxiv=None, venue=None)

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise InputError(f"power={self.power} is out of range; give an exponent above 0.")

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return (Projected(),)

    def scores(self, context: Context) -> Tensor:
        return context.signal(Projected()).float().norm(p=self.power, dim=-1)

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        return None if info.text_hidden is None else 2.0 * n_tokens * info.text_hidden
