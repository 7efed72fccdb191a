"""What is run beside what: dense, the named policies, and `random` at each of their budgets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.core import config
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site
from vlmprune.evaluation.schema import DENSE, RANDOM, TEXT_ONLY, Keep


@dataclass(frozen=True)
class Cell:
    """One run over a task's questions.

    Attributes:
        name: policy name for reports (`a+b` for a composition), `"dense"` or `"text_only"`.
        policy: None for dense and text-only.
        params, keep, basis, seed: as in :class:`~vlmprune.evaluation.schema.ResultRow`.
    """

    name: str
    policy: Policy | None
    params: dict[str, Any]
    keep: Keep
    basis: str
    seed: int | None

    @property
    def key(self) -> str:
        """Equal for cells that would give equal results."""
        return json.dumps([self.name, self.params, self.keep, self.basis, self.seed], sort_keys=True)

    @property
    def is_reference(self) -> bool:
        """True for dense and text-only, which have no random counterpart."""
        return self.policy is None

    @property
    def title(self) -> str:
        """Name with budget and seed, for progress and logs."""
        seed = "" if self.seed is None else f" seed={self.seed}"
        return self.name if self.is_reference else f"{self.name} keep={self.keep}{seed}"


def dense_cell() -> Cell:
    """The unchanged model."""
    return Cell(DENSE, None, {}, 1.0, "site", None)


def text_only_cell() -> Cell:
    """The unchanged model, asked without any image in the prompt."""
    return Cell(TEXT_ONLY, None, {}, None, "site", None)


def policy_cell(policy: Policy, info: ModelInfo) -> Cell:
    """The cell of a policy on a model."""
    leaves = policy.leaves()
    plain = config.to_dict(policy)
    if isinstance(plain, list):
        params: dict[str, Any] = {leaf.name: _settings(part) for leaf, part in zip(leaves, plain, strict=True)}
        keep: Keep = [leaf.budget.describe() for leaf in leaves]
        return Cell("+".join(leaf.name for leaf in leaves), policy, params, keep, leaves[-1].basis, None)
    params = _settings(plain)
    # A seed counts only where something is drawn; policies that may draw have a field of this name.
    params.pop("seed", None)
    seed = getattr(policy, "seed", None) if policy.is_random(info) else None
    return Cell(policy.name, policy, params, policy.budget.describe(), policy.basis, seed)


def random_cell(keep: Keep, seed: int, info: ModelInfo) -> Cell:
    """`random` at a budget."""
    return policy_cell(config.build(RANDOM, {"keep": keep, "seed": seed}), info)


MISSED = 0.1
"""Share by which, and by a token at least, a policy's tokens are off its budget where the budget tells little."""


def random_budget(
    cell: Cell,
    mean_kept_layers: float | None,
    mean_kept_tokens: float | None = None,
    mean_visual_tokens: float | None = None,
) -> Keep:
    """The budget at which `random` is compared with a cell.

    A share or a number of tokens is the cell's own budget. Where that is not what the decoder works on, `random`
    keeps as many tokens as the cell kept on average over the decoder layers: a policy that cuts inside the decoder
    costs more than its last layers tell, a list or a FLOP share names no count, a share of 1.0 hides what a threshold
    drops, and in small windows a share is met only roughly. What keeps all tokens, as blurring an image does, is
    compared at its budget.

    Args:
        cell: a policy's cell.
        mean_kept_layers: what it kept, per image, on average over decoder layers; None where unknown.
        mean_kept_tokens: what it kept in the last layer; None where unknown.
        mean_visual_tokens: what there was; None where unknown.

    Returns:
        A budget, or None where the cell has no counterpart (it is a reference, or its tokens are unknown).
    """
    if cell.policy is None:
        return None
    budget = cell.policy.budget
    plain = budget.tokens is not None or (budget.share is not None and not budget.is_all)
    known = None not in (mean_kept_layers, mean_kept_tokens)
    uneven = known and abs((mean_kept_layers or 0.0) - (mean_kept_tokens or 0.0)) >= 0.5
    off = uneven or _missed(budget.share, mean_kept_tokens, mean_visual_tokens)
    if cell.name == RANDOM or (plain and not off and not isinstance(cell.keep, list)):
        return cell.keep
    return None if mean_kept_layers is None else max(1, round(mean_kept_layers))


def _missed(share: float | None, kept: float | None, visual: float | None) -> bool:
    """True if a share of the tokens was asked for, some were dropped, and not about as many."""
    if share is None or kept is None or visual is None or kept >= visual:
        return False
    return abs(kept - share * visual) > max(1.0, MISSED * share * visual)


def first_cells(
    policies: Sequence[Policy], info: ModelInfo, text_only: bool, random_seeds: Iterable[int]
) -> list[Cell]:
    """Dense, text-only where asked for, the policies, and `random` at each budget known beforehand."""
    cells = [dense_cell(), *([text_only_cell()] if text_only else [])]
    cells += [policy_cell(policy, info) for policy in policies]
    for budget in [random_budget(cell, None) for cell in cells if not _cuts_inside(cell, info)]:
        if budget is not None:
            cells += [random_cell(budget, seed, info) for seed in random_seeds]
    return list({cell.key: cell for cell in cells}.values())


def _cuts_inside(cell: Cell, info: ModelInfo) -> bool:
    """True if a cell's policy may drop tokens inside the decoder, so that only a run tells what it keeps."""
    leaves = () if cell.policy is None else cell.policy.leaves()
    requests = [request for leaf in leaves if leaf.reduces(info) for request in leaf.requests(info)]
    return any(request.site in (Site.DECODER_LAYER, Site.KV_CACHE) for request in requests)


def _settings(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in plain["parameters"].items() if name != "keep"}


def _plain(value: Any) -> Any:
    if isinstance(value, Policy):
        return config.to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
