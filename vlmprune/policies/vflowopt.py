"""VFlowOpt: importance from one encoder block decides three cuts; what the first drops is recycled by grid cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.core.artefact import Artefact, read_artefact
from vlmprune.core.bases import keep_highest
from vlmprune.core.calibration import Calibrator
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError, SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Attention, Pixels, Projected, Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.policies import _vflowopt_settings as numbers
from vlmprune.policies._vflowopt_importance import attending_patches, with_entropy
from vlmprune.policies._vflowopt_recycle import first_cut
from vlmprune.policies._vflowopt_search import VFlowSearch
from vlmprune.policies._vflowopt_settings import Parts, Settings

PREFIX = "vflowopt."
IMPORTANCE = PREFIX + "importance"
SHARES = ("r2", "r3")
NO_PATCH = (
    "vflowopt: in some view no patch receives more than t times the mean attention, so the one that receives most "
    "stands alone; a smaller t, or a calibration on this model (vlmprune calibrate vflowopt), suits it better."
)


@register("vflowopt")
@dataclass(frozen=True)
class VFlowOpt(Policy):
    """Cut by calibrated attention before the LLM and twice inside it, and merge what the first cut drops.

    Paper: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", arXiv
    2508.05211, ICCV 2025. Official code: CC BY-NC 4.0.

    Importance of a patch: the mean attention that it gets from the patches K whose received attention exceeds t times
    the mean, plus alpha times the softmax of the patches' grey-level entropy. It follows the patches to the LLM's
    tokens (a newline token has 1) and decides three cuts. The first acts before the LLM: of N tokens,
    ``round(N (1 - R1)) + int(N / a^2)`` with the lowest importance are pooled, and all pooled tokens of a grid cell of
    side a become one, their mean weighted by importance, at the place of the most important. The others act before
    two decoder layers: ``round(n (1 - R))`` of the n visual tokens left in the sample go. Independent of the text.

    Args:
        keep: mean share of the visual tokens over the decoder layers (equation 5 of the paper, basis
            ``mean_layers``), or such a mean number of tokens per image; recycled tokens come on top, see the report.
            Without a configuration for it the cut is uncalibrated: ``R1 = R2 = R3`` by equation 5, t = 1, cells of
            half a view's side, alpha = 0.
        preset: what 0.5, 0.25 and 0.1 mean: ``"auto"``, the configurations released for LLaVA-OneVision-7B on that
            model and the uncalibrated rule elsewhere (their t, about 30, leaves hardly a patch in K on other towers);
            ``"released"``, these on every model, R3 solved from equation 5 where the layers are others; ``"none"``.
        r1: share kept by the first cut (R1). None: as ``keep`` says. Each given value replaces that of the
            configuration.
        r2: share of the survivors kept by the second cut (R2).
        r3: share kept by the third (R3). None: solved from ``keep``, R1 and R2; given, it must agree with ``keep``.
        t: threshold of K (t), at least 0.
        a: side of a recycling cell in tokens (a), above 0, any real number.
        alpha: weight of the entropy (alpha); other than 0 it needs the pixels.
        layers: decoder layers before which the second and third cut act, 0-based or as shares of depth.
        layer: encoder block of the attention; -1 is the one that feeds the projector.
        artefact: file that ``vlmprune calibrate vflowopt`` wrote for this model and ``keep``.

    Where the official code differs from the paper: K's rows are averaged (paper: summed), and ``int(N / a^2)`` more
    tokens are pooled; this follows the code. Deviations from the code: pixels are grey levels in 0..255, where the
    code lets normalised ones wrap around; a view whose K is empty takes the patch that receives most; an image of
    one view is treated like others (the code does not prune it); attention stays causal in every layer; any batch.
    Videos and the one-view images of a prompt with several are cut without recycling, as in the code. Positions are
    compact after the first cut and keep their gaps after the others.

    Cost: twice the column mass of one encoder block (``4 H T^2 d_head`` FLOPs each), selection O(N log N).

    Example:
        >>> VFlowOpt(keep=0.25, t=1.0, a=8.0).layers
        (0.32, 0.64)
    """

    meta = PolicyMeta(
        title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        arxiv="2508.05211",
        venue="ICCV 2025",
        code_licence="CC BY-NC 4.0",
    )
    basis = "mean_layers"
    newlines = "compete"

    preset: Literal["auto", "released", "none"] = "auto"
    r1: float | None = None
    r2: float | None = None
    r3: float | None = None
    t: float | None = None
    a: float | None = None
    alpha: float | None = None
    layers: tuple[int | float, int | float] = numbers.STAGES
    layer: int | float = -1
    artefact: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = {name: getattr(self, name) for name in ("r1", "r2", "r3") if getattr(self, name) is not None}
        for name, value in shares.items():
            if not 0 < value <= 1:
                raise InputError(f"{name}={value} is out of range; give a share in (0, 1].")
        if self.preset not in ("auto", "released", "none"):
            raise InputError(f"preset={self.preset!r} is unknown; give 'auto', 'released' or 'none'.")
        if self.t is not None and not 0 <= self.t < torch.inf:
            raise InputError(f"t={self.t} is out of range; give a threshold of at least 0.")
        if self.a is not None and not 0 < self.a < torch.inf:
            raise InputError(f"a={self.a} is out of range; give the side of a cell in tokens, above 0.")
        if self.r3 is not None and self.budget.share is None:
            raise InputError(f"r3={self.r3} goes with one share as keep, not with {self.budget}; leave it out.")
        if self.budget.is_all and any(value < 1 for value in shares.values()):
            raise InputError(f"{shares} drop tokens, but keep=1.0 keeps them all; give the mean retention as keep.")
        object.__setattr__(self, "_found", self._read())

    def parts(self, info: ModelInfo) -> Parts:
        """Decoder layers before, between and behind the two inner cuts; layers that do not increase are refused."""
        return numbers.decoder_parts(self.layers, info)

    def settings_of(self, share: float, info: ModelInfo) -> Settings:
        """The configuration for a mean retention below 1.

        Raises:
            InputError: the given shares cannot reach it, or the artefact is for another one.
        """
        parts = self.parts(info)
        same = info.family == numbers.RELEASED_FAMILY and parts == numbers.RELEASED_PARTS
        released = self.preset == "released" or (self.preset == "auto" and same)
        given = {name: getattr(self, name) for name in numbers.NAMES}
        return numbers.configuration(share, parts, given, self._artefact, released)

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        if self.budget.is_all:
            return ()
        second, between, _ = self.parts(info)
        if self._artefact is not None:
            self._artefact.check_model(info)
        for budget in self.budget.parts or (self.budget,):
            if budget.share is not None and budget.share < 1:
                self.settings_of(budget.share, info)
        signals: tuple[Signal, ...] = (Projected(), *self.importance_signals(info))
        inside = self.resolve_positions(info, "keep")
        return (
            SiteRequest(Site.POST_ENCODER, None, signals, self.resolve_positions(info)),
            SiteRequest(Site.DECODER_LAYER, second, (), inside),
            SiteRequest(Site.DECODER_LAYER, second + between, (), inside),
        )

    def importance_signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        """What :meth:`importance` reads."""
        attention = Attention(info.vision_layer(self.layer))
        return (attention, Pixels()) if self._entropy_weight else (attention,)

    def importance(self, context: Context, thresholds: Sequence[float]) -> tuple[Tensor, tuple[str, ...]]:
        """Importance of the tokens ``[I, N]`` and notes for the report; ``thresholds`` are the items' t."""
        if context.to_tokens is None:
            raise SignalError("vflowopt needs to_tokens in its context, from encoder patches to LLM tokens.")
        attention = context.signal(Attention(context.info.vision_layer(self.layer)))
        threshold = torch.tensor([thresholds[item] for item in context.encoder_items]).to(context.device)
        attending, empty = attending_patches(attention, threshold, context.patch_valid)
        values = attention.column_mass(attending.float())
        if self._entropy_weight:
            values = with_entropy(values, context.signal(Pixels()), self._entropy_weight, context.patch_valid)
        notes = (NO_PATCH,) if bool(empty.any()) else ()
        return context.to_tokens(values, newline=1.0).float(), notes

    def select_post_encoder(self, context: Context) -> Selection:
        """The first cut, with recycling."""
        shares = [self._share(context, item) for item in range(context.n_items)]
        settings = [None if share >= 1 else self.settings_of(share, context.info) for share in shares]
        if not any(settings):
            return Selection.keep_all(context.valid, context.lengths)
        importance, notes = self.importance(context, [0.0 if s is None else s.t for s in settings])
        selection, carried = first_cut(context, context.signal(Projected()), importance, settings)
        carry = {IMPORTANCE: carried}
        if context.budget.share is None:  # images may differ, so the inner cuts read their shares from the tokens
            for name in SHARES:
                each = torch.tensor([1.0 if s is None else getattr(s, name) for s in settings], dtype=torch.float64)
                carry[PREFIX + name] = each.to(context.device)[:, None].expand(-1, context.width)
        return replace(selection, carry=carry, notes=notes)

    def select_decoder_layer(self, context: Context) -> Selection:
        """The second or third cut."""
        if IMPORTANCE not in context.carry and context.budget.share is None:
            return Selection.keep_all(context.valid, context.lengths)  # no image exceeds its number of tokens
        if IMPORTANCE not in context.carry:
            raise SignalError("vflowopt's cuts inside the LLM need the importance that its first cut carries.")
        name = SHARES[0] if context.layer == self.parts(context.info)[0] else SHARES[1]
        carried = context.carry.get(PREFIX + name)
        if carried is not None:  # the sample loses what its images would lose together
            sums = (1 - carried).masked_fill(~context.valid, 0.0).sum(1).tolist()
            lost = [round(value, 4) for value in sums]  # a merged token's is exact up to rounding
        elif context.budget.is_all:
            lost = [0] * context.n_items
        else:
            share = context.budget.share
            assert share is not None
            kept = getattr(self.settings_of(share, context.info), name)
            lost = [n * (1 - kept) for n in context.lengths]
        counts = tuple(max(1, n - round(gone)) for n, gone in zip(context.lengths, lost, strict=True))
        return keep_highest(context.carry[IMPORTANCE].float(), context.valid, counts)

    def calibration(self, info: ModelInfo, *, calls: int = 50, seed: int = 0) -> Calibrator:
        """A search for R1, R2, t, a and alpha at this ``keep``; given values stay, R3 follows from equation 5.

        Raises:
            InputError: ``keep`` is no share below 1, R3 is given, or nothing is left to search.
            UnsupportedError: optuna is not installed.
        """
        return VFlowSearch(self, info, calls, seed)

    @property
    def _artefact(self) -> Artefact | None:
        return self.__dict__["_found"]

    @property
    def _entropy_weight(self) -> float:
        if self.alpha is not None:
            return self.alpha
        return 0.0 if self._artefact is None else float(self._artefact.best["alpha"])

    def _read(self) -> Artefact | None:
        """The artefact, checked against the settings."""
        if self.artefact is None:
            return None
        object.__setattr__(self, "artefact", str(self.artefact))
        if self.budget.is_all:
            return None
        if self.budget.share is None:
            raise BudgetError(f"An artefact is for one share of every image, not for {self.budget}.")
        found = read_artefact(self.artefact)
        mine: dict[str, Any] = {"keep": self.budget.share, "layers": list(self.layers), "layer": self.layer}
        found.check_policy(self.name, mine)
        return found

    @staticmethod
    def _share(context: Context, item: int) -> float:
        """Mean retention of one image."""
        budget, n = context.item_budget(item), context.lengths[item]
        return budget.share if budget.share is not None else min(1.0, (budget.tokens or 0) / n)
