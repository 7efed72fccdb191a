"""transformers' PaliGemma and Gemma 3: a SigLIP tower, a fixed number of tokens, image tokens that see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vlmprune.adapters.batched_tower import BatchedTower
from vlmprune.adapters.family import Encoded, text_info, tower_info
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.adapters.vision_family import TOWER_SIGNALS, VisionFamily, pool_cells
from vlmprune.core.context import View
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site


class GemmaVisionFamily(VisionFamily):
    """What PaliGemma and Gemma 3 share."""

    name: str
    prepares_masks = True
    tower_signals: frozenset[type[Signal]] = TOWER_SIGNALS

    @property
    def tower(self) -> BatchedTower:
        patch = self.model.config.vision_config.patch_size
        return BatchedTower(patch, has_cls=False, merge=self.side // self.token_side)

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        tower = self.model.config.vision_config
        return tower.image_size // tower.patch_size

    @property
    def token_side(self) -> int:
        """Tokens along a side of an image."""
        return self.side

    def info(self) -> ModelInfo:
        depth = self.model.config.vision_config.num_hidden_layers
        return ModelInfo(
            family=self.name,
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | self.tower_signals,
            vision_depth=depth,
            feature_block=depth - 1,
            grid=(self.side, self.side),
            tokens_per_image=self.token_side**2,
            merge_unit=(self.side // self.token_side) ** 2,
            **tower_info(self.model.config.vision_config),
            **text_info(self.text_model.config),
        )

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        side = self.token_side
        shape = ImageShape(side**2, (View(side, side),))
        return {"image": self.same_shapes(shape, "image", kwargs, masks["image"], encoded)}


class PaliGemmaFamily(GemmaVisionFamily):
    """PaliGemma 1 and 2. The prompt is a prefix in which every token sees every other."""

    name = "paligemma"
    classes = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")


class Gemma3Family(GemmaVisionFamily):
    """Gemma 3: patches are averaged to ``mm_tokens_per_image`` tokens; the tokens of an image see each other."""

    name = "gemma3"
    classes = ("Gemma3ForConditionalGeneration", "Gemma3Model")
    exit_at = "tower"

    @property
    def token_side(self) -> int:
        return round(self.model.config.mm_tokens_per_image**0.5)

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        return pool_cells(values, self.side, self.side // self.token_side).flatten(1, 2)

    def rotary(self, name: str, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        text = self.text_model
        if hasattr(text, "rotary_emb_local"):  # transformers 4 hands each layer both tables
            return (text.rotary_emb_local if name.endswith("local") else text.rotary_emb)(hidden, positions)
        return text.rotary_emb(hidden, positions, self.layer_type(layer))
