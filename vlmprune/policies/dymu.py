"""DyMU: similar tokens of a vision tower merge in every block, as many as the picture has, by calibrated thresholds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.measured import Measured
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Positions, Site, SiteRequest
from vlmprune.policies import _dymu_matching as matching
from vlmprune.policies import _merging as merging
from vlmprune.policies._dymu_plan import fixed_tokens, plan, shortfall
from vlmprune.policies._dymu_thresholds import (
    NO_MERGING,
    ThresholdMeans,
    block_thresholds,
    checked_thresholds,
    load_thresholds,
)
from vlmprune.policies._tower_schedule import Schedule, Taken

PARTS = 64
"""Parts of a token in which a schedule counts what the windows of a batch lose together."""


@register("dymu")
@dataclass(frozen=True)
class DyMU(Policy):
    """Merge every pair of tokens that is more similar than the block's threshold: simple pictures lose more.

    Paper: "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", arXiv 2504.17040. Official code: no licence
    of its own.

    Acts in the middle of the tower's blocks, between attention and MLP, on every view by itself; independent of the
    text. Needs the keys of the block's own attention, mean over heads (``KeyMean``). Tokens at even positions look for
    the most similar one at odd positions, by cosine; pairs above the threshold become their mean, weighted by the
    tokens that each stands for (DToMe). Later attention adds ``log(size)`` to the scores of a merged token's key. CLS
    and register tokens neither merge nor move; at most half of the others merge in a block. In the decoder's attention
    a merged token stands at the positions of all tokens that went into it (VTU).

    Args:
        keep: tokens left at the tower's exit on average over pictures, a share or a number per view. It is what
            ``vlmprune calibrate dymu`` finds thresholds for, and chooses nothing by itself; 1.0 without thresholds
            merges nothing.
        thresholds: cosine that a pair must exceed (tau), one for all blocks or one per block; 1.0 merges nothing. In
            place of an artefact.
        artefact: file that ``vlmprune calibrate dymu`` (:func:`vlmprune.measure`) wrote for this model and ``keep``.
        schedule: how the tokens to remove are spread over the blocks (r_l): ``"constant"``, ``"linear"`` (most in the
            first ones) or ``"reverse_linear"``. A block that it leaves out never merges.
        mode: ``"dynamic"`` (DToMe); ``"instance"``: every picture loses the schedule's tokens, as in ToMe; ``"batch"``:
            the batch loses them together, its most similar pairs first, which is how thresholds are found.
        max_r_ratio: at most ``int(max_r_ratio * r_l)`` merges per picture and block, where pictures differ; needs
            ``keep``. None: no limit.
        unmerge: virtual unmerging (VTU), unless ``positions`` is given. False: merged tokens are a shorter sequence.
        compat: ``"official"``: the order of the official code, where a single picture without CLS is ordered by
            similarity and larger batches by position, its limit (pictures in a batch may merge all tokens at
            even positions), and its schedule, which also counts blocks behind the one that feeds the projector.

    Deviations from the official code, besides those of ``compat``: merged features are exact means in batches too;
    similarities are compared in float32, equal ones go to the lowest index; where late blocks have too few tokens for
    the constant schedule, the earlier ones take more; means of thresholds are taken in float64 (in the official script
    in bfloat16). Padding and pinned tokens take part in nothing.

    Cost per block: ``N^2 d_head / 2`` FLOPs for the similarities, O(N D) for the mean; the counts are read back from
    the device once per block.

    Example:
        >>> DyMU(keep=64, mode="instance", schedule="linear").name
        'dymu'
    """

    meta = PolicyMeta(
        title="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs",
        arxiv="2504.17040",
        training_free=False,
        code_licence="no licence of its own",
    )
    basis = "final"
    measured = True

    thresholds: float | tuple[float, ...] | None = None
    artefact: str | Path | None = None
    schedule: Schedule = "constant"
    mode: Literal["dynamic", "instance", "batch"] = "dynamic"
    max_r_ratio: float | None = None
    unmerge: bool = True
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"schedule": ("constant", "linear", "reverse_linear"), "mode": ("dynamic", "instance", "batch")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(known)}.")
        if self.compat not in (None, "official"):
            raise InputError(f"compat={self.compat!r} is unknown; give 'official' or None.")
        if self.budget.parts is not None:
            raise BudgetError(f"dymu takes one budget for all views, not {self.budget}.")
        if self.max_r_ratio is not None and (not self.max_r_ratio > 0 or self.budget.is_all):
            raise InputError(f"max_r_ratio={self.max_r_ratio} needs a number above 0 and a keep below 1.0.")
        if self.mode != "dynamic" and (self.thresholds is not None or self.artefact is not None):
            raise InputError(f"mode={self.mode!r} uses no thresholds; leave out thresholds and artefact.")
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))
        object.__setattr__(self, "_found", load_thresholds(self))

    def reduces(self, info: ModelInfo) -> bool:
        n = fixed_tokens(info)
        all_stay = self.budget.is_all or (n is not None and self.budget.tokens is not None and self.budget.tokens >= n)
        return self.thresholds is not None or not all_stay

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        if not self.reduces(info):
            return ()
        positions = self.resolve_positions(info)
        return tuple(
            SiteRequest(Site.VISION_BLOCK, block, (KeyMean(block),), positions, place="middle")
            for block in self.blocks(info)
        )

    def resolve_positions(self, info: ModelInfo, source: Positions | None = None) -> Positions:
        """``virtual`` in front of a decoder, unless ``unmerge`` or ``positions`` say otherwise."""
        virtual = self.unmerge and self.positions == "auto" and info.text_depth
        return "virtual" if virtual else super().resolve_positions(info, source)

    def blocks(self, info: ModelInfo) -> tuple[int, ...]:
        """The blocks that merge; none behind the one that feeds the projector."""
        last = info.vision_layer(-1)
        if self.mode == "dynamic":
            return tuple(block for block, tau in enumerate(self.block_thresholds(info)) if tau < NO_MERGING)
        n = fixed_tokens(info)
        if n is None:
            return tuple(range(last + 1))
        return tuple(block for block, r in enumerate(self.plan(info, self.budget, n)[: last + 1]) if r > 0)

    def block_thresholds(self, info: ModelInfo) -> tuple[float, ...]:
        """One threshold for every block up to the one that feeds the projector.

        Raises:
            InputError: there are none, too few or too many, or those of another model.
        """
        blocks = info.vision_layer(-1) + 1
        found: Measured | None = self.__dict__["_found"]
        if found is not None:
            found.check_model(info)
            return block_thresholds(found.values, blocks)
        if self.thresholds is None:
            raise InputError(
                f"dymu has no thresholds of this tower for {self.budget}. Calibrate it: vlmprune calibrate dymu --keep "
                f"{self.budget.describe()} --images FOLDER --output found.json, then give artefact='found.json'. Or "
                "give thresholds, such as 0.8, or mode='instance', which needs none."
            )
        if not isinstance(self.thresholds, tuple):
            return (self.thresholds,) * blocks
        if not blocks <= len(self.thresholds) <= (info.vision_depth or blocks):
            raise InputError(
                f"thresholds has {len(self.thresholds)} entries; {info.model_class} needs {blocks}, one per block that "
                "feeds the projector."
            )
        return self.thresholds[:blocks]

    def plan(self, info: ModelInfo, budget: Budget, n: int) -> Taken:
        """Tokens that each block takes from a view of ``n`` tokens (r_l), one after the other."""
        return plan(self.schedule, self.compat == "official", info, budget, n)

    def check_count(self, info: ModelInfo) -> None:
        super().check_count(info)
        if self.budget.tokens is not None and info.full_attention_blocks is not None:
            raise BudgetError(
                f"{info.model_class} attends in windows, each merged by itself; give a share, not {self.budget}."
            )
        n = None if self.budget.is_all or self.thresholds is not None else fixed_tokens(info)
        reason = None if n is None else self._shortfall(info, self.budget, n)
        if reason is not None:
            raise BudgetError(f"{reason}; ask for more, or reduce the tokens behind the encoder as well.")

    def _shortfall(self, info: ModelInfo, budget: Budget, n: int) -> str | None:
        """None with the official schedule, which misses its number by what it takes behind the projector's block."""
        return None if self.compat == "official" else shortfall(self.schedule, info, budget, n)

    def wanted(self, context: Context) -> tuple[float, ...]:
        """Tokens that the schedule takes from each item in this block; of windows, which are small, also parts."""
        info, block = context.info, context.layer or 0
        scale = 1 if self.mode == "instance" or info.full_attention_blocks is None else PARTS
        views = [(context.item_budget(item), scale * n) for item, n in enumerate(merging.free_entered(context))]
        return tuple(self.plan(info, budget, n)[block] / scale for budget, n in views)

    def select_vision_block(self, context: Context) -> Selection:
        """Merge in one block."""
        counts: tuple[int, ...] | None = None
        official = self.compat == "official"
        wanted = self.wanted(context) if self.mode != "dynamic" or self.max_r_ratio is not None else ()
        if self.mode != "dynamic" and not any(wanted):
            return replace(
                Selection.keep_all(context.valid, context.lengths), notes=self._notes(context, context.lengths)
            )
        limits = None if self.max_r_ratio is None else [int(self.max_r_ratio * r) for r in wanted]
        if self.mode == "dynamic":
            tau = self.block_thresholds(context.info)[context.layer or 0]
            match = matching.above(context, tau, limits, official)
        elif self.mode == "batch":
            match = matching.best_of_batch(context, wanted, limits, official)
        else:
            taken = [min(int(r), n // 2) for r, n in zip(wanted, merging.free_lengths(context), strict=True)]
            match = matching.best(context, taken, official)
            if context.pinned is None:
                counts = tuple(n - gone for n, gone in zip(context.lengths, taken, strict=True))
        if counts is None:  # what merges only the device knows
            counts = tuple(match.counts.tolist())
        scores = matching.token_scores(context, match)
        if counts == context.lengths:
            selection = Selection.keep_all(context.valid, counts, scores)
        else:
            selection = replace(merging.merge_selection(context, match, counts), scores=scores)
        return replace(selection, notes=self._notes(context, counts))

    def _notes(self, context: Context, counts: tuple[int, ...]) -> tuple[str, ...]:
        """The last block says which budgets a schedule could not reach."""
        if self.mode == "dynamic" or context.layer != context.info.vision_layer(-1):
            return ()
        return merging.reach_notes(context, self.name, self._shortfall, counts)

    def measurement(self, info: ModelInfo, *, tolerance: float = 1e-3, least: int = 10) -> ThresholdMeans | None:
        """The thresholds at which batches of pictures keep ``keep`` on average; None where none are needed.

        Raises:
            BudgetError: ``keep`` keeps every token.
        """
        if self.mode != "dynamic" or self.thresholds is not None or self.artefact is not None:
            return None
        if not self.reduces(info):
            raise BudgetError(f"A calibration is for fewer tokens than all; {self.budget} keeps them.")
        return ThresholdMeans(self, info, tolerance, least)

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        """Mean and norm of the keys, and cosines of the two halves; the same whether pairs merge or not."""
        if info.vision_hidden is None or info.vision_heads is None:
            return None
        width = info.vision_hidden * info.merge_unit
        channels = width // info.vision_heads
        return float(n_tokens * (width + 3 * channels) + 2 * (n_tokens - n_tokens // 2) * (n_tokens // 2) * channels)
