"""transformers' ``InternVLForConditionalGeneration``: tiles and a thumbnail, 2 x 2 patches per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlmprune.adapters.batched_tower import BatchedTower
from vlmprune.adapters.family import text_info, tower_info
from vlmprune.adapters.llava_tower import check_feature_choice, check_one_layer, feature_block
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.adapters.tiles import TiledFamily
from vlmprune.adapters.vision_family import CLS_SIGNALS, TOWER_SIGNALS
from vlmprune.core import signals as s
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site


class InternVLFamily(TiledFamily):
    """InternVL 2.5 and 3. An image's tiles stand side by side in the prompt, its thumbnail last; frames of a video
    are images. The projector's input is per token: its patches' features side by side."""

    classes = ("InternVLForConditionalGeneration", "InternVLModel")
    block_paths = ("encoder.layer",)
    exit_at = "tower"

    def vision_attention(self, block: int) -> nn.Module:
        return self.vision_blocks()[block].attention

    @property
    def tower(self) -> BatchedTower:
        return BatchedTower(_side(self.model.config.vision_config.patch_size), has_cls=True, merge=self.merge)

    @property
    def side(self) -> int:
        tower = self.model.config.vision_config
        return _side(tower.image_size) // _side(tower.patch_size)

    @property
    def merge(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    def info(self) -> ModelInfo:
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported on "
                "InternVL (its patch grid would be off by a token); expected 'default'."
            )
        return ModelInfo(
            family="internvl",
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | TOWER_SIGNALS | CLS_SIGNALS | {s.Projector},
            vision_depth=config.vision_config.num_hidden_layers,
            feature_block=feature_block(config),
            has_cls=True,
            prefix_tokens=1,
            grid=(self.side, self.side),
            merge_unit=self.merge**2,
            **tower_info(config.vision_config),
            **text_info(config.text_config),
        )

    def check_reducible(self) -> None:
        check_one_layer(self.model.config)

    def check_call(self, kwargs: Mapping[str, Any]) -> None:
        check_feature_choice(self.model.config, kwargs)


def _side(size: Any) -> int:
    """A side in pixels from an int or a pair."""
    return size if isinstance(size, int) else size[0]
