"""Downsampling: a smaller image in the first place."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmprune.core.bases import SingleSitePolicy
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site

if TYPE_CHECKING:
    from PIL.Image import Image

# 1 / sqrt(0.1111) is 3.0002: shares written with four digits still mean whole factors.
WHOLE_FACTOR_TOLERANCE = 2e-3


@register("downsample")
@dataclass(frozen=True)
class Downsample(SingleSitePolicy):
    """Shrink the image before the model's own processor sees it.

    Paper: the baseline of "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token
    Compression Methods" (VTC-Bench), arXiv 2510.07143, ACL 2026. Official code: Apache-2.0.

    Acts on PIL images in front of the processor, so it needs the processor and makes the vision tower cheaper
    too. It means fewer tokens only on dynamic-resolution models (Qwen2-VL and later); on fixed-resolution
    ones it merely blurs. The true number of tokens follows the processor's rounding and limits and may differ
    from N / D^2 (small images may even gain tokens): read it from the report.

    Args:
        keep: share C of tokens aimed at: both sides shrink by ``D = 1 / sqrt(C)`` and round down (shares of
            0.25, 0.1111, 0.0625, 0.04, 0.01 are D = 2, 3, 4, 5, 10). A number of tokens is refused: how many
            there are depends on the image.
        factor: D itself, at least 1, instead of ``keep``.
        jpeg: pass the image through JPEG at default quality, as the paper's code does (at D = 1 too).

    Deviation from the official code: JPEG is off by default (switch ``jpeg``).

    Cost: no FLOPs in the model.

    Example:
        >>> Downsample(keep=0.1111).divisor
        3.0
    """

    meta = PolicyMeta(
        title="Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods",
        arxiv="2510.07143",
        venue="ACL 2026",
        code_licence="Apache-2.0",
    )
    site = Site.IMAGE

    factor: float | None = None
    jpeg: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.budget
        if budget.share is None:
            raise BudgetError(f"downsample takes a share of tokens such as keep=0.25, or factor=2; got {budget}.")
        if self.factor is not None:
            if not 1 <= self.factor < math.inf:
                raise InputError(f"factor={self.factor} is out of range; give at least 1 (2 halves both sides).")
            if not budget.is_all:
                raise InputError("Give either keep or factor to downsample, not both.")

    @property
    def divisor(self) -> float:
        """The factor D by which both sides shrink."""
        if self.factor is not None:
            return float(self.factor)
        assert self.budget.share is not None
        divisor = 1 / math.sqrt(self.budget.share)
        whole = round(divisor)
        return float(whole) if abs(divisor - whole) <= WHOLE_FACTOR_TOLERANCE * whole else divisor

    def reduces(self, info: ModelInfo) -> bool:
        return self.divisor > 1 or self.jpeg

    def needs_processor(self) -> bool:
        return True

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float:
        return 0.0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after shrinking, at least 1."""
        return max(1, int(width // self.divisor)), max(1, int(height // self.divisor))

    def resize(self, image: Image) -> Image:
        """The image as the processor is to see it (bicubic); the same object where nothing changes."""
        from PIL import Image as pil

        if self.divisor > 1:
            # Pillow resamples palettes and bilevel images by nearest neighbour only.
            image = image.convert("RGB") if image.mode in ("P", "1") else image
            image = image.resize(self.size(*image.size), pil.Resampling.BICUBIC)
        if self.jpeg:
            stored = io.BytesIO()
            image.convert("RGB").save(stored, format="JPEG")
            image = pil.open(stored)
            image.load()
        return image

    def decide(self, context: Context) -> Selection:
        """Never called: the image site has no tokens to choose from.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("downsample acts on images in front of the processor, through resize().")
