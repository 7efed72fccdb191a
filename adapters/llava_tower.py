"""What all LLaVA models share: a CLIP or SigLIP tower, one block of which feeds the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.adapters.batched_tower import BatchedTower
from vlmprune.adapters.family import text_info, tower_info
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.adapters.towers import Tower
from vlmprune.adapters.vision_family import CLS_SIGNALS, TOWER_SIGNALS, VisionFamily
from vlmprune.core import signals as s
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported towers: model type -> has a CLS token."""


class LlavaTowerFamily(VisionFamily):
    """Parts and facts of a LLaVA model; subclasses say how its images are laid out."""

    name: str

    @property
    def tower(self) -> Tower:
        return BatchedTower(self.model.config.vision_config.patch_size, self.has_cls)

    @property
    def has_cls(self) -> bool:
        """True if token 0 of the tower is a CLS token (cut off before the projector)."""
        return TOWERS[self.model.config.vision_config.model_type]

    @property
    def side(self) -> int:
        """Patches along a side of a view."""
        tower = self.model.config.vision_config
        return tower.image_size // tower.patch_size

    def info(self) -> ModelInfo:
        config = self.model.config
        self._check_config(config)
        return ModelInfo(
            family=self.name,
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | TOWER_SIGNALS | {s.Projector} | (CLS_SIGNALS if self.has_cls else frozenset()),
            vision_depth=config.vision_config.num_hidden_layers,
            feature_block=feature_block(config),
            has_cls=self.has_cls,
            prefix_tokens=int(self.has_cls),
            grid=(self.side, self.side),
            **tower_info(config.vision_config),
            video="video" in self.kinds,
            **self.fixed_sizes(),
            **text_info(config.text_config),
        )

    def fixed_sizes(self) -> dict[str, Any]:
        """Tokens of an image where the config fixes them."""
        return {}

    def _check_config(self, config: Any) -> None:
        kind = config.vision_config.model_type
        name = type(self.model).__name__
        if kind not in TOWERS:
            raise UnsupportedError(f"{name} with a {kind!r} tower is not supported; supported: {', '.join(TOWERS)}.")
        wanted = "default" if TOWERS[kind] else "full"
        if config.vision_feature_select_strategy != wanted:
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {kind!r} tower is "
                f"not supported (its patch grid would be off by a token); expected {wanted!r}."
            )

    def check_reducible(self) -> None:
        check_one_layer(self.model.config)

    def check_call(self, kwargs: Mapping[str, Any]) -> None:
        check_feature_choice(self.model.config, kwargs)


def feature_block(config: Any) -> int:
    """0-based block whose output feeds the projector; the last one where several do.

    Raises:
        UnsupportedError: the tower's input feeds it.
    """
    depth = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    states = [chosen] if isinstance(chosen, int) else list(chosen)
    block = max(state % (depth + 1) for state in states) - 1
    if block < 0:
        raise UnsupportedError(f"vision_feature_layer={chosen} reads the tower's input; no block feeds the projector.")
    return block


def check_one_layer(config: Any) -> None:
    """Refuse features of several blocks, which differ in length once tokens are reduced between them.

    Raises:
        UnsupportedError: the config names several.
    """
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(
            f"vision_feature_layer={config.vision_feature_layer!r} joins the features of several blocks, whose tokens "
            "differ once some are reduced inside the tower; choose a policy that acts after the encoder."
        )


def check_feature_choice(config: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that chooses other features than the config.

    Raises:
        UnsupportedError: it does.
    """
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        value = kwargs.get(name)
        if value is not None and value != getattr(config, name):
            raise UnsupportedError(
                f"{name}={value!r} differs from the model's config; set it in model.config before apply()."
            )
