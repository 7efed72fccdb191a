"""What a policy may know about a model before the first forward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlmprune.core.errors import InputError
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model, filled in by its adapter.

    Attributes:
        family: adapter family, e.g. ``"llava"`` or ``"text"`` (a bare decoder).
        model_class: class name of the wrapped model.
        sites: places where the adapter can reduce.
        signals: signal classes that the adapter can deliver.
        vision_depth, text_depth: number of blocks; None where there is no such stack.
        feature_block: 0-based vision block whose output feeds the projector.
        has_cls: the tower has a CLS token.
        prefix_tokens: tokens of the tower that stand before the patches (CLS, distillation, registers).
        grid: patch grid (height, width) of a view where the config fixes it.
        any_size: views may be of another size than ``grid``, so that nothing is planned by it.
        tokens_per_image: visual tokens per image where the config fixes it.
        merge_unit: patches that make one LLM token (4 for a 2 x 2 merger).
        mrope: the decoder uses multi-axis rotary positions.
        full_attention_blocks: vision blocks that attend to the whole image; None means all.
        view_windows: in a tower with windows, the products of attention over whole views, in those of attention inside
            the windows; pictures decide it, so it is 1 until a tower runs.
        text_hidden, text_heads, text_kv_heads, text_head_dim, text_ffn: sizes of the decoder.
        vision_hidden, vision_heads, vision_ffn: sizes of the tower's blocks.
        vision_gated: the tower's MLP has three matrices (SwiGLU), not two.
        video: the family takes videos.
    """

    family: str
    model_class: str
    sites: frozenset[Site] = frozenset()
    signals: frozenset[type[Signal]] = frozenset()
    vision_depth: int | None = None
    text_depth: int | None = None
    feature_block: int | None = None
    has_cls: bool = False
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    any_size: bool = False
    tokens_per_image: int | None = None
    merge_unit: int = 1
    mrope: bool = False
    full_attention_blocks: tuple[int, ...] | None = None
    view_windows: float = 1.0
    text_hidden: int | None = None
    text_heads: int | None = None
    text_kv_heads: int | None = None
    text_head_dim: int | None = None
    text_ffn: int | None = None
    vision_hidden: int | None = None
    vision_heads: int | None = None
    vision_ffn: int | None = None
    vision_gated: bool = False
    video: bool = False
    notes: dict[str, str] = field(default_factory=dict, compare=False)

    def vision_layer(self, layer: int | float) -> int:
        """Resolve a vision layer: an index (negative ones count from the feature block, ``-1`` is that block
        itself), or a float share in [0, 1] of the tower's depth, nearest block, never beyond the feature
        block.

        Raises:
            InputError: there is no tower, or the layer lies outside it.
        """
        if self.vision_depth is None or self.feature_block is None:
            raise InputError(
                f"{self.model_class} has no vision tower, so vision layer {layer} does not exist; choose a policy "
                "that needs no tower, such as 'random' or 'uniform'."
            )
        last = self.feature_block
        if isinstance(layer, float):
            return min(last, max(0, _share_of(layer, self.vision_depth) - 1))
        index = last + 1 + layer if layer < 0 else layer
        if not 0 <= index <= last:
            raise InputError(
                f"Vision layer {layer} is out of range for {self.model_class}: blocks 0 to {last} feed the "
                f"projector (the tower has {self.vision_depth})."
            )
        return index

    def text_layer(self, layer: int | float, minimum: int = 0) -> int:
        """Resolve a decoder layer: a 0-based index (negative from the end) or a float share of the depth.

        Args:
            layer: index, or share in [0, 1] of the depth (nearest, not below ``minimum``).
            minimum: smallest layer allowed, 1 where a previous layer is needed.

        Raises:
            InputError: there is no decoder, or the layer lies outside it.
        """
        if self.text_depth is None:
            raise InputError(f"{self.model_class} has no decoder, so decoder layer {layer} does not exist.")
        depth = self.text_depth
        if isinstance(layer, float):
            index = min(depth - 1, max(minimum, _share_of(layer, depth)))
        else:
            index = depth + layer if layer < 0 else layer
        if not minimum <= index < depth:
            raise InputError(
                f"Decoder layer {layer} is out of range for {self.model_class}: it has {depth} layers, "
                f"and this policy needs a layer from {minimum} to {depth - 1} (counted from 0)."
            )
        return index


def _share_of(share: float, depth: int) -> int:
    """Layers in a share of the depth, halves rounded up."""
    if not 0 <= share <= 1:
        raise InputError(f"Layer {share} is not a share of the depth in [0, 1]; for a layer give an integer.")
    return math.floor(share * depth + 0.5)
