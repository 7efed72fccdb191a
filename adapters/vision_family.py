"""Families with a vision tower: where their placeholders are, and how patches become tokens of the LLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlmprune.adapters import layout as layouts
from vlmprune.adapters.family import Encoded, Family, find_module
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.sites import Step
from vlmprune.adapters.tap_port import TapPort
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.towers import Tower, TowerRun
from vlmprune.adapters.vision_blocks import BlockParts, block_parts
from vlmprune.core import signals as s
from vlmprune.core.errors import InputError
from vlmprune.core.sites import Site

TOWER_SIGNALS = frozenset(
    {s.KeyMean, s.HeadAttention, s.ColumnMass, s.Keys, s.QK, s.Attention, s.Hidden, s.PreProjector, s.Pixels}
)
CLS_SIGNALS = frozenset({s.ClsRow, s.ClsLogits})
PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


class VisionFamily(Family):
    """A vision-language model of transformers.

    Subclasses name the classes they serve in ``classes``, the model with its head and the one without, and where their
    parts are: ``*_paths`` are tried in order, blocks from the tower on.
    """

    classes: tuple[str, str]
    kinds: tuple[Kind, ...] = ("image",)
    text_paths: tuple[str, ...] = ("language_model",)
    tower_paths: tuple[str, ...] = ("vision_tower",)
    projector_paths: tuple[str, ...] = ("multi_modal_projector",)
    block_paths: tuple[str, ...] = ("encoder.layers", "vision_model.encoder.layers")
    exit_at: Literal["projector", "tower"] = "projector"
    """Where features get the tower's full length back after a reduction inside it: behind the projector, or, where the
    projector mixes neighbouring patches, behind the tower."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return type(model).__name__ in cls.classes

    @property
    def base(self) -> nn.Module:
        return self.model.model if type(self.model).__name__ == self.classes[0] else self.model

    @property
    def text_model(self) -> nn.Module:
        return find_module(self.base, self.text_paths, "text model")

    @property
    def tower_module(self) -> nn.Module:
        """The vision tower, called with pixels."""
        return find_module(self.base, self.tower_paths, "vision tower")

    @property
    def projector(self) -> nn.Module:
        """The module that takes the tower's features to the LLM's width."""
        return find_module(self.base, self.projector_paths, "projector")

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """All modules that take features of the tower to the LLM's width."""
        return (self.projector,)

    @property
    @abstractmethod
    def tower(self) -> Tower:
        """How the tower holds its patches."""

    def vision_blocks(self) -> Sequence[nn.Module]:
        """Blocks of the tower, in order."""
        return find_module(self.tower_module, self.block_paths, "vision blocks")  # type: ignore[return-value]

    def vision_attention(self, block: int) -> nn.Module:
        """The attention module of a tower block."""
        return self.vision_blocks()[block].self_attn

    def reducer(self, steps: Sequence[Step]) -> TowerReducer | None:
        """What reduces tokens inside the tower, None where no step does."""
        if not any(step.request.site == Site.VISION_BLOCK for step in steps):
            return None
        self.check_reducible()
        blocks = block_parts(self.vision_blocks())
        return TowerReducer(steps, self.info(), blocks, [self.attention_port(parts) for parts in blocks])

    def attention_port(self, parts: BlockParts) -> AttentionPort:
        """How a tower block's attention is read and biased."""
        return TapPort(parts.attention)

    def restore_length(self, restore: Callable[[Tensor], Tensor], hooks: HookStack) -> None:
        """Give features their full length back with ``restore`` where they leave the projector; where they have to
        have it before, the tower's output is given it."""
        if self.exit_at == "projector":
            for projector in self.projectors:
                hooks.after(projector, partial(_restore_projected, restore), prepend=True)

    def check_reducible(self) -> None:
        """Refuse configurations in which tokens cannot be reduced inside the tower; by default there are none.

        Raises:
            UnsupportedError: says which.
        """
        return None

    @abstractmethod
    def shapes(self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded) -> Any:
        """Per kind the shapes of the call's images, in the order in which they are encoded.

        Args:
            kwargs: the call; what earlier encodings were given stands in it, too.
            masks: per kind the placeholders ``[B, L]``.
            encoded: encodings that the call brings.

        Raises:
            InputError: the images' sizes are missing.
        """

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        """Patches to tokens, for images of one shape.

        Args:
            shape: theirs.
            values: ``[I, V, P, C]`` over the patches of each image's views.
            newline: value of newline tokens.

        Returns:
            ``[I, n, C]``; a token made of several patches has their mean.
        """
        return values.flatten(1, 2)

    def projector_patches(self, run: TowerRun, states: Tensor, tokens: TowerTokens | None) -> Tensor:
        """What the projector is given, as values ``[V, P, D]`` of patches; ``tokens`` as in
        :meth:`~vlmprune.adapters.towers.TowerRun.patches`."""
        return states if tokens is None else tokens.restore(states)

    def layout(self, kwargs: Mapping[str, Any], encoded: Encoded | None = None) -> layouts.PromptLayout | None:
        masks = self.placeholders(kwargs)
        if not any(mask.any() for mask in masks.values()):
            if self.brings_images(kwargs):
                raise InputError(
                    "Images were given, but the prompt has no image placeholder; put the processor's image token "
                    "(or an image item of the chat template) where the image belongs."
                )
            return None
        encoded = encoded or {}
        known = {name: value for part in encoded.values() for name, value in part.arguments.items()}
        given = {**known, **{name: value for name, value in kwargs.items() if value is not None}}
        return layouts.from_placeholders(masks, self.shapes(given, masks, encoded), kwargs.get("attention_mask"))

    def brings_images(self, kwargs: Mapping[str, Any]) -> bool:
        return bool(self.encoded_kinds(kwargs)) or any(kwargs.get(PIXELS[kind]) is not None for kind in self.kinds)

    def encoded_kinds(self, kwargs: Mapping[str, Any]) -> tuple[Kind, ...]:
        """Kinds of images that a call brings encoded."""
        outputs = kwargs.get("mm_encoder_outputs") or {}
        return tuple(kind for kind in self.kinds if isinstance(outputs, Mapping) and outputs.get(kind) is not None)

    def placeholders(self, kwargs: Mapping[str, Any]) -> dict[Kind, np.ndarray]:
        """Per kind ``[B, L]`` bool on the host, True at placeholders."""
        ids = kwargs.get("input_ids")
        if ids is not None:
            host = ids.cpu().numpy()
            return {kind: host == self.token_id(kind) for kind in self.kinds}
        embeds = kwargs["inputs_embeds"]
        table = self.base.get_input_embeddings()
        masks: dict[Kind, np.ndarray] = {}
        for kind in self.kinds:
            token = self.token_id(kind)
            if token >= table.num_embeddings:
                masks[kind] = np.zeros(tuple(embeds.shape[:2]), dtype=bool)
                continue
            placeholder = table(torch.tensor(token, device=embeds.device))
            masks[kind] = (embeds == placeholder).all(-1).cpu().numpy()
        return masks

    def token_id(self, kind: Kind) -> int:
        """Id of a placeholder token."""
        config = self.model.config
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if token is not None:
                return token
        raise InputError(f"{type(self.model).__name__}'s config names no {kind} placeholder token ({kind}_token_id).")

    def same_shapes(
        self, shape: ImageShape, kind: Kind, kwargs: Mapping[str, Any], mask: np.ndarray, encoded: Encoded
    ) -> list[ImageShape]:
        """The shapes of images that all have one view and ``shape``: as many as were or will be encoded, else as
        the placeholders say."""
        pixels = kwargs.get(PIXELS[kind])
        if pixels is not None:
            count = pixels.shape[0]
        elif kind in encoded:
            count = encoded[kind].n_views
        else:
            count = -(-int(mask.sum()) // shape.length)
        return [shape] * count


def _restore_projected(
    restore: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    return (restore(output[0]), *output[1:]) if isinstance(output, tuple) else restore(output)


def pool_cells(values: Tensor, side: int, factor: int) -> Tensor:
    """Means over ``factor x factor`` cells of square grids of patches.

    Args:
        values: ``[I, V, side * side, C]``.

    Returns:
        ``[I, V, (side / factor) ** 2, C]``.
    """
    grid = values.unflatten(2, (side // factor, factor, side // factor, factor))
    return grid.mean((3, 5)).flatten(2, 3)
