"""TransPrune: three cuts in the decoder, by how tokens change in it and how much the text looks at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.bases import StagedPolicy, keep_highest
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.image_counts import entered_lengths, sample_counts
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import ModuleTransition, ProbeAttention, Signal
from vlmprune.core.transition import Transition

PAPER_LAYERS = (7 / 32, 9 / 32, 12 / 32)
# Of the tokens that the last of the paper's stages has dropped in all, the share that each stage has dropped:
# 1 - 0.875, 1 - 0.625 and 1 - 0.125 over 1 - 0.125.
DROPPED_SHARE = (1 / 7, 3 / 7, 1.0)
EPS = 1e-8


@register("transprune")
@dataclass(frozen=True)
class TransPrune(StagedPolicy):
    """Keep the image tokens that decoder layers change most (token transition) and that the text attends to.

    Paper: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630,
    CVPR 2026. Official code: MIT licence.

    Acts before a few decoder layers at prefill. In each recorded layer and for attention and MLP, every token
    of the sequence has the norm ratio m and the cosine c of the module's output and input, and
    ``TTV = m softmax(1 - c)`` over the whole sequence, text included. A stage sums the TTV recorded so far
    (T), takes the attention from all text behind the first image to the image tokens in the coming layer,
    mean over heads and rows (I), and keeps the tokens with the highest ``T / sum T + I / sum I``.

    Args:
        keep: share of the image tokens that is left after the last stage, or a number of tokens per image.
            Shares are of the N tokens that entered the decoder, ``k = int(share * N)``. The three stages
            of the paper (``TransPrune-High``: 0.875, 0.625, 0.125) carry over to a single share r so that
            each has dropped the same part of all tokens dropped, ``1 - (1 - r) / 7``, ``1 - 3 (1 - r) / 7``
            and r, with one token at least; this mapping is ours. A list gives one entry per stage, exactly
            as the official code takes it (``int`` may give 0 there). Averaged over the paper's 32 layers,
            r = 0.125 leaves 41 % of the tokens.
        layers: the 0-based layers before which tokens are dropped (the layers after which the paper does it,
            counted from 1), or shares of the depth. Default: the paper's 7, 9 and 12 of 32; on shallow
            decoders the default stages move apart to successive layers.
        accumulate: the 0-based layers whose TTV is recorded (the paper counts from 1), or shares of the depth.
            None: all from the layer before the first stage on, the paper's 7 to 12 counted from 1.
        alpha: weight of T against I (alpha, 0.5) in [0, 1]: ``2 alpha T + 2 (1 - alpha) I``. The official code
            has no alpha; 0.5 is what it does.
        use_iga: False ranks by T alone (an ablation of the paper).
        direction: ``"signed"`` takes ``1 - c`` as the official code does, ``"abs"`` the paper's ``1 - |c|``.

    Deviations from the official code, which serves one image in one prompt: batches (each sample by itself),
    padding and several images (one ranking over all of a prompt's image tokens) are served; norms and cosines
    are computed in float32; the prompt is not cut to the tokenizer's length; ties go to the lowest index. As
    in the code, T and I are summed over the whole sequence before they are restricted to image tokens; the
    paper words a softmax over image tokens. Positions are renumbered at every stage (``positions="keep"``
    keeps them, as on M-RoPE models), so a decoded token's position is each layer's own cache length.

    Cost: per recorded layer O(L D); per stage the next layer's query, key and value projections of the L
    tokens and the rows of T text tokens, ``2 L D (D + 2 D_kv) + 2 H T L d_head`` FLOPs.

    Example:
        >>> [round(TransPrune(keep=r).stage_share(stage, r), 3) for r in (0.125, 0.3) for stage in range(3)]
        [0.875, 0.625, 0.125, 0.9, 0.7, 0.3]
    """

    meta = PolicyMeta(
        title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        arxiv="2507.20630",
        venue="CVPR 2026",
        code_licence="MIT",
    )
    basis = "final"
    default_positions = "compact"

    layers: tuple[int | float, ...] = PAPER_LAYERS
    accumulate: tuple[int | float, ...] | None = None
    alpha: float = 0.5
    use_iga: bool = True
    direction: Literal["signed", "abs"] = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise InputError("layers is empty; give the layers before which tokens are dropped.")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha} is out of range; give the weight of the transitions in [0, 1].")
        if self.direction not in ("signed", "abs"):
            raise InputError(f"direction={self.direction!r} is unknown; give 'signed' or 'abs'.")
        self._check_budget()

    def _check_budget(self) -> None:
        budget, stages = self.budget, len(self.layers)
        if budget.parts is None:
            if stages not in (1, len(DROPPED_SHARE)) and not budget.is_all:
                raise BudgetError(
                    f"{budget} is spread over the paper's {len(DROPPED_SHARE)} stages, but layers={self.layers} are "
                    f"{stages}; give a list with one share per stage."
                )
            return
        if len(budget.parts) != stages:
            raise BudgetError(f"{budget} has {len(budget.parts)} entries for {stages} stages; give one per stage.")
        shares = [part.share for part in budget.parts if part.share is not None]
        if any(later > earlier for earlier, later in zip(shares, shares[1:], strict=False)):
            raise BudgetError(f"{budget} rises; each stage's share is of the original tokens, so it cannot.")

    def stage_layers(self, info: ModelInfo, minimum: int = 1) -> tuple[int, ...]:
        if self.layers != PAPER_LAYERS:
            return super().stage_layers(info, minimum)
        layers: list[int] = []
        for share in self.layers:
            layers.append(max(info.text_layer(share, minimum), layers[-1] + 1 if layers else minimum))
        if layers[-1] >= (info.text_depth or 0):
            raise InputError(
                f"{info.model_class} has {info.text_depth} decoder layers, too few for {len(layers)} stages; "
                "give layers and one keep per stage."
            )
        return tuple(layers)

    def recorded_layers(self, info: ModelInfo) -> tuple[int, ...]:
        """0-based layers whose transitions are recorded.

        Raises:
            InputError: a layer does not exist, or the layers do not increase.
        """
        if self.accumulate is None:
            stages = self.stage_layers(info)
            return tuple(range(stages[0] - 1, stages[-1]))
        layers = tuple(info.text_layer(layer) for layer in self.accumulate)
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise InputError(
                f"accumulate={self.accumulate} falls on layers {layers} of {info.model_class} ({info.text_depth} "
                "layers), which do not increase; give explicit layers or fewer of them."
            )
        return layers

    def stage_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        probe: tuple[Signal, ...] = (ProbeAttention(layer, "text_after"),) if self.use_iga else ()
        return (*self._transitions(info, layer), *probe)

    def _transitions(self, info: ModelInfo, layer: int) -> tuple[ModuleTransition, ...]:
        """What is recorded before a stage."""
        before = [recorded for recorded in self.recorded_layers(info) if recorded < layer]
        return tuple(ModuleTransition(recorded, module) for recorded in before for module in ("attn", "mlp"))

    def variation(self, ratio: Tensor, cosine: Tensor, valid: Tensor) -> Tensor:
        """TTV of every token in one module, ``[I, L]``; zero for padding.

        Args:
            ratio, cosine: norm ratio and cosine of the module's output and input, ``[I, L]``.
            valid: ``[I, L]`` bool, not padding.
        """
        turn = 1 - (cosine.abs() if self.direction == "abs" else cosine)
        weight = turn.masked_fill(~valid, -torch.inf).softmax(-1)
        return torch.where(valid, ratio * weight, 0.0)

    def transitions(self, context: Context) -> Tensor:
        """The sum of TTV recorded so far, of the image tokens ``[I, N]``."""
        total = torch.zeros(context.valid.shape, device=context.device)
        for signal in self._transitions(context.info, context.layer or 0):
            found: Transition = context.signal(signal)
            total = total + self.variation(found.ratio, found.cosine, found.valid).gather(1, found.place)
        return total

    def stage_scores(self, context: Context, stage: int) -> Tensor:
        moved = normalised(self.transitions(context), context.valid)
        if not self.use_iga:
            return moved
        rows = context.signal(ProbeAttention(context.layer or 0, "text_after")).float()  # [I, R, N]
        n_rows = (rows.sum(-1) > 0).sum(1, keepdim=True)  # rows that only fill the batch are zero
        looked_at = normalised(rows.sum(1) / n_rows.clamp_min(1), context.valid)
        return 2 * self.alpha * moved + 2 * (1 - self.alpha) * looked_at

    def stage_share(self, stage: int, last: float) -> float:
        """Share of the original tokens after a stage, if ``last`` is the share after the last one."""
        dropped = DROPPED_SHARE[stage] if len(self.layers) == len(DROPPED_SHARE) else 1.0
        return round(1 - dropped * (1 - last), 6)

    def stage_counts(self, context: Context, stage: int) -> tuple[int, ...]:
        """Tokens of each sample that a stage keeps."""
        budget = context.budget
        if budget.parts is not None:
            return sample_counts(context, budget.part(stage), minimum=0, original=True)
        counts = sample_counts(context, budget, original=True)
        if stage == len(self.layers) - 1:
            return counts
        earlier = []
        for item, count in enumerate(counts):
            n = sum(entered_lengths(context, item))
            share = budget.share if budget.share is not None else count / n
            earlier.append(min(context.lengths[item], max(count, int(n * self.stage_share(stage, share)))))
        return tuple(earlier)

    def select_decoder_layer(self, context: Context) -> Selection:
        """Keep the highest scores of the stage."""
        stage = self.stage_of(context)
        return keep_highest(self.stage_scores(context, stage), context.valid, self.stage_counts(context, stage))


def normalised(values: Tensor, valid: Tensor) -> Tensor:
    """``values [I, N]`` over their sum per item; zero where not ``valid``."""
    values = torch.where(valid, values, 0.0)
    return values / (values.sum(1, keepdim=True) + EPS)
