"""transformers' ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmprune.adapters.family import Encoded
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.llava_tower import LlavaTowerFamily
from vlmprune.core.context import View


class LlavaFamily(LlavaTowerFamily):
    """LLaVA-1.5 and its kin: one view per image, a fixed number of tokens."""

    name = "llava"
    classes = ("LlavaForConditionalGeneration", "LlavaModel")

    def fixed_sizes(self) -> dict[str, Any]:
        return {"tokens_per_image": self.side**2}

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        shape = ImageShape(self.side**2, (View(self.side, self.side),))
        return {"image": self.same_shapes(shape, "image", kwargs, masks["image"], encoded)}
