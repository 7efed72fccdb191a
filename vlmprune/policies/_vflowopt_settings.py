"""VFlowOpt's numbers: shares kept by its three cuts, the budget equation, and the released configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from vlmprune.core.artefact import Artefact
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo

# Shares of the depth before which tokens are cut: layers 9 and 18 of 28, 10 and 20 of 32, as in the paper.
STAGES = (0.32, 0.64)
SMALLEST = 1e-6
"""What R3 is where the budget equation has no positive solution."""
TOLERANCE = 0.01
"""Of the mean retention, where all three shares are given."""

Parts = tuple[int, int, int]
"""Decoder layers before, between and behind the two cuts inside the decoder (L1, L2, L3)."""


NAMES = ("r1", "r2", "r3", "t", "a", "alpha")


@dataclass(frozen=True)
class Settings:
    """One configuration.

    Attributes:
        r1: share kept before the LLM (R1). r2, r3: shares of the survivors kept before the two layers (R2, R3); None
            until the budget equation is solved.
        t: threshold of the tokens whose attention counts.
        a: side of a recycling cell in tokens; None is half the side of the image's first view.
        alpha: weight of the entropy.
    """

    r1: float
    r2: float
    r3: float | None
    t: float
    a: float | None
    alpha: float


RELEASED_FAMILY = "llava_onevision"
RELEASED_PARTS: Parts = (9, 9, 10)
# The configurations that the official repository gives for LLaVA-OneVision-7B, by mean retention.
RELEASED: Mapping[float, Settings] = MappingProxyType(
    {
        0.5: Settings(
            r1=0.7233201448753168, r2=0.748747637472693, r3=0.487, t=28.683047941520474, a=11.756787150848968, alpha=0.0
        ),
        0.25: Settings(
            r1=0.2651026358526424,
            r2=0.9833433139039235,
            r3=0.8773258179532721,
            t=34.759552803070484,
            a=15.580797034937687,
            alpha=0.0,
        ),
        0.1: Settings(r1=0.11661529508161146, r2=1.0, r3=0.6011, t=39.26492840997221, a=17.386981849158786, alpha=0.0),
    }
)


def decoder_parts(layers: tuple[int | float, int | float], info: ModelInfo) -> Parts:
    """How two cuts, before ``layers`` (0-based, or shares of depth), part the decoder.

    Raises:
        InputError: the layers do not exist or do not increase.
    """
    second, third = (info.text_layer(layer, 1) for layer in layers)
    if third <= second:
        raise InputError(
            f"layers={layers} fall on {second} and {third} of {info.model_class} ({info.text_depth} layers), which do "
            "not increase; give two layers."
        )
    return second, third - second, (info.text_depth or 0) - third


def mean_retention(r1: float, r2: float, r3: float | None, parts: Parts) -> float:
    """Share of the visual tokens that a decoder layer works on, in the mean over layers (equation 5)."""
    first, second, third = parts
    assert r3 is not None
    return (r1 * first + r1 * r2 * second + r1 * r2 * r3 * third) / sum(parts)


def solve_r3(target: float, r1: float, r2: float, parts: Parts) -> tuple[float, bool]:
    """R3 that gives a mean retention, by equation 5.

    Returns:
        R3 and whether there is one: above 1 it is 1 (the retention is then below the target); where the first two
        cuts alone exceed the target it is ``SMALLEST`` and False.
    """
    first, second, third = parts
    r3 = (sum(parts) * target - r1 * first - r1 * r2 * second) / third / (r1 * r2)
    return (min(1.0, r3), True) if r3 > 0 else (SMALLEST, False)


def equal_shares(target: float, parts: Parts) -> float:
    """The R for which ``R1 = R2 = R3 = R`` gives a mean retention: ``target`` lies between R^3 and R."""
    low, high = target, target ** (1 / 3)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_retention(middle, middle, middle, parts) > target else (middle, high)
    return (low + high) / 2


def uncalibrated(target: float, parts: Parts) -> Settings:
    """The rule for budgets without a searched configuration: three equal cuts, the attention of all tokens that get
    more than the mean, cells of half a view, no entropy."""
    share = equal_shares(target, parts)
    return Settings(share, share, share, 1.0, None, 0.0)


def configuration(
    share: float, parts: Parts, given: Mapping[str, float | None], found: Artefact | None, released: bool
) -> Settings:
    """The settings for a mean retention.

    Args:
        share: the mean retention, below 1.
        parts: layers before, between and behind the inner cuts.
        given: values that replace those of the configuration, None for those that do not.
        found: an artefact, or None for a released configuration or the uncalibrated rule.
        released: take the released configuration where there is one for this retention.

    Raises:
        InputError: the shares cannot reach the retention, or the artefact is for another one.
    """
    base = _base(share, parts, found, released)
    mine = replace(base, **{name: value for name, value in given.items() if value is not None})
    if given.get("r3") is not None:
        real = mean_retention(mine.r1, mine.r2, mine.r3, parts)
        if abs(real - share) > TOLERANCE:
            raise InputError(
                f"r1={mine.r1:.4g}, r2={mine.r2:.4g} and r3={mine.r3:.4g} keep {real:.4g} of the tokens in the mean "
                f"over layers, not {share:.4g}; give keep={real:.4g}, or leave r3 out."
            )
        return mine
    if base.r3 is not None and (mine.r1, mine.r2) == (base.r1, base.r2):
        return mine
    r3, feasible = solve_r3(share, mine.r1, mine.r2, parts)
    if not feasible:
        raise InputError(
            f"r1={mine.r1:.4g} and r2={mine.r2:.4g} alone keep more than {share:.4g} of the tokens in the mean over "
            "layers; give smaller ones or a larger keep."
        )
    return replace(mine, r3=r3)


def _base(share: float, parts: Parts, found: Artefact | None, released: bool) -> Settings:
    """The configuration that a mean retention names; R3 is None where the budget equation gives it."""
    if found is not None:
        if abs(share - float(found.settings["keep"])) > 1e-6:
            raise InputError(
                f"The artefact was calibrated for keep={found.settings['keep']}, not for {share:.4g} of an image; give "
                "every image that share, or leave the artefact out."
            )
        return Settings(**{name: found.best[name] for name in NAMES})
    known = RELEASED.get(round(share, 6)) if released else None
    if known is None:
        return uncalibrated(share, parts)
    return known if parts == RELEASED_PARTS else replace(known, r3=None)
