"""transformers' Idefics3 and SmolVLM: tiles with text between them, then the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmprune.adapters.batched_tower import BatchedTower
from vlmprune.adapters.family import text_info, tower_info
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.adapters.tiles import Runs, TiledFamily
from vlmprune.adapters.vision_family import TOWER_SIGNALS
from vlmprune.core import signals as s
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site


class Idefics3Family(TiledFamily):
    """An image's tiles stand apart, each behind a token that names its place; behind its whole view stands the same
    token in every image, by which images are told apart."""

    classes = ("Idefics3ForConditionalGeneration", "Idefics3Model")
    name = "idefics3"
    text_paths, tower_paths, projector_paths = ("text_model",), ("vision_model",), ("connector",)
    exit_at = "tower"

    @property
    def tower(self) -> BatchedTower:
        patch = self.model.config.vision_config.patch_size
        return BatchedTower(patch, has_cls=False, merge=self.merge, mask="patch_attention_mask")

    @property
    def side(self) -> int:
        tower = self.model.config.vision_config
        return tower.image_size // tower.patch_size

    @property
    def merge(self) -> int:
        return self.model.config.scale_factor

    def images_of_row(self, row: int, runs: Runs, kwargs: Mapping[str, Any]) -> list[int]:
        ids = kwargs.get("input_ids")
        tiles = [-(-length // self.tile_tokens) for _, length in runs]
        if ids is None or not runs:
            return tiles
        marks = np.asarray(ids[row].cpu())[[max(0, start - 1) for start, _ in runs]]
        images, open_tiles = [], 0
        for mark, count in zip(marks, tiles, strict=True):
            open_tiles += count
            if mark == marks[-1]:  # the whole view ends its image
                images.append(open_tiles)
                open_tiles = 0
        return images

    def info(self) -> ModelInfo:
        config = self.model.config
        depth = config.vision_config.num_hidden_layers
        return ModelInfo(
            family=self.name,
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | TOWER_SIGNALS | {s.Projector},
            vision_depth=depth,
            feature_block=depth - 1,
            grid=(self.side, self.side),
            merge_unit=self.merge**2,
            **tower_info(config.vision_config),
            **text_info(config.text_config),
        )


class SmolVLMFamily(Idefics3Family):
    """SmolVLM: Idefics3's layout; a video's frames are images."""

    classes = ("SmolVLMForConditionalGeneration", "SmolVLMModel")
    name = "smolvlm"
