"""transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any size, 2 x 2 patches per token, three-axis positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from vlmprune.adapters.family import Encoded, text_info
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.packed_port import PackedPort
from vlmprune.adapters.packed_tower import PackedTower
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.adapters.tower_reduction import AttentionPort
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.towers import TowerRun
from vlmprune.adapters.vision_blocks import BlockParts
from vlmprune.adapters.vision_family import TOWER_SIGNALS, VisionFamily
from vlmprune.core.context import View
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.layout import merge_unit_mass
from vlmprune.core.sites import Site

GRIDS: dict[Kind, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}


class QwenVLFamily(VisionFamily):
    """What the three generations share. A view is an image, or a temporal slice of a video."""

    kinds = ("image", "video")
    name: str
    tower_paths, projector_paths, block_paths = ("visual",), ("visual.merger",), ("blocks",)

    def vision_attention(self, block: int) -> nn.Module:
        return self.vision_blocks()[block].attn

    @property
    def tower(self) -> PackedTower:
        config = self.model.config.vision_config
        return PackedTower(config.spatial_merge_size, config.patch_size, config.temporal_patch_size, self.window)

    @property
    def window(self) -> int | None:
        """Side of an attention window of the tower in merge groups, None without windows."""
        return None

    @property
    def merge(self) -> int:
        """Patches along a side of a merge group."""
        return self.model.config.vision_config.spatial_merge_size

    @property
    def full_attention_blocks(self) -> tuple[int, ...] | None:
        """Tower blocks that see a whole image; None means all."""
        return None

    def info(self) -> ModelInfo:
        config = self.model.config
        depth = config.vision_config.depth
        if self.deepstack_levels >= self.text_model.config.num_hidden_layers:
            raise UnsupportedError(
                f"{type(self.model).__name__} adds visual features after all {self.deepstack_levels} decoder layers; "
                "a decoder with more layers is needed."
            )
        return ModelInfo(
            family=self.name,
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | TOWER_SIGNALS,
            vision_depth=depth,
            feature_block=depth - 1,
            merge_unit=self.merge**2,
            mrope=True,
            full_attention_blocks=self.full_attention_blocks,
            video=True,
            **self.tower_sizes(config.vision_config),
            **text_info(self.text_model.config),
        )

    def tower_sizes(self, config: Any) -> dict[str, Any]:
        """Sizes of the tower's blocks for :class:`ModelInfo` from its config."""
        return {
            "vision_hidden": config.hidden_size,
            "vision_heads": config.num_heads,
            "vision_ffn": config.intermediate_size,
        }

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        return {kind: self._shapes_of(kind, kwargs, bool(mask.any())) for kind, mask in masks.items()}

    def _shapes_of(self, kind: Kind, kwargs: Mapping[str, Any], needed: bool) -> list[ImageShape]:
        grids = kwargs.get(GRIDS[kind])
        if grids is None:
            if not needed:
                return []
            raise InputError(
                f"The prompt holds {kind} placeholders, but the call has no {GRIDS[kind]}, which says how many tokens "
                f"each {kind} has; pass what the processor returns."
            )
        return [self._shape(*grid, kind) for grid in grids.tolist()]

    def _shape(self, frames: int, height: int, width: int, kind: Kind) -> ImageShape:
        rows, columns = height // self.merge, width // self.merge
        name = "frame" if kind == "video" else "image"
        views = tuple(View(rows, columns, i * rows * columns, name) for i in range(frames))
        return ImageShape(frames * rows * columns, views, encoded=frames)

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        unit, view = self.merge**2, shape.views[0]
        patches = values[:, :, : view.length * unit].movedim(2, -1)  # [I, V, C, P]
        return merge_unit_mass(patches, unit).movedim(-1, 2).flatten(1, 2)

    def projector_patches(self, run: TowerRun, states: Tensor, tokens: TowerTokens | None) -> Tensor:
        return run.patches(states, tokens)

    def attention_port(self, parts: BlockParts) -> AttentionPort:
        return PackedPort(parts.attention)


class Qwen2VLFamily(QwenVLFamily):
    """Qwen2-VL."""

    name = "qwen2_vl"
    classes = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")

    def tower_sizes(self, config: Any) -> dict[str, Any]:
        return {
            "vision_hidden": config.embed_dim,
            "vision_heads": config.num_heads,
            "vision_ffn": int(config.embed_dim * config.mlp_ratio),
        }


class Qwen2_5_VLFamily(QwenVLFamily):
    """Qwen2.5-VL: most tower blocks attend inside windows."""

    name = "qwen2_5_vl"
    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")

    @property
    def window(self) -> int:
        config = self.model.config.vision_config
        return config.window_size // config.spatial_merge_size // config.patch_size

    @property
    def full_attention_blocks(self) -> tuple[int, ...]:
        return tuple(self.model.config.vision_config.fullatt_block_indexes)

    def tower_sizes(self, config: Any) -> dict[str, Any]:
        return {**super().tower_sizes(config), "vision_gated": True}


class Qwen3VLFamily(QwenVLFamily):
    """Qwen3-VL: features of earlier tower blocks are added after the first decoder layers."""

    name = "qwen3_vl"
    classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

    @property
    def deepstack_levels(self) -> int:  # type: ignore[override]
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.projector, *self.tower_module.deepstack_merger_list)
