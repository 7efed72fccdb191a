"""transformers' ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import layout as layouts
from vlmprune.adapters.family import Family, find_module, text_info
from vlmprune.adapters.text import TEXT_SIGNALS
from vlmprune.core import signals as s
from vlmprune.core.context import View
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site

VISION_SIGNALS = frozenset({s.ColumnMass, s.Keys, s.QK, s.Hidden, s.PreProjector, s.Projector})
CLS_SIGNALS = frozenset({s.ClsRow, s.ClsLogits})
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported towers: model type -> has a CLS token."""


class LlavaFamily(Family):
    """LLaVA-1.5 and its kin: one view per image, a fixed number of tokens."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return type(model).__name__ in ("LlavaForConditionalGeneration", "LlavaModel")

    @property
    def base(self) -> nn.Module:
        return self.model.model if type(self.model).__name__ == "LlavaForConditionalGeneration" else self.model

    @property
    def text_model(self) -> nn.Module:
        return find_module(self.base, ("language_model",), "text model")

    @property
    def tower(self) -> nn.Module:
        return find_module(self.base, ("vision_tower",), "vision tower")

    @property
    def projector(self) -> nn.Module:
        return find_module(self.base, ("multi_modal_projector",), "projector")

    def vision_blocks(self) -> Sequence[nn.Module]:
        blocks = find_module(self.tower, ("encoder.layers", "vision_model.encoder.layers"), "vision blocks")
        return blocks  # type: ignore[return-value]

    @property
    def has_cls(self) -> bool:
        """True if token 0 of the tower is a CLS token (cut off before the projector)."""
        return TOWERS[self.model.config.vision_config.model_type]

    def info(self) -> ModelInfo:
        config = self.model.config
        tower = config.vision_config
        self._check_config(config)
        side = tower.image_size // tower.patch_size
        return ModelInfo(
            family="llava",
            model_class=type(self.model).__name__,
            sites=frozenset({Site.IMAGE, Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS | VISION_SIGNALS | (CLS_SIGNALS if self.has_cls else frozenset()),
            vision_depth=tower.num_hidden_layers,
            feature_block=self._feature_block(config),
            has_cls=self.has_cls,
            grid=(side, side),
            tokens_per_image=side * side,
            **text_info(config.text_config),
        )

    def _feature_block(self, config: Any) -> int:
        """0-based block whose output feeds the projector; the last one where several do."""
        depth = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        states = [chosen] if isinstance(chosen, int) else list(chosen)
        block = max(state % (depth + 1) for state in states) - 1
        if block < 0:
            raise UnsupportedError(
                f"vision_feature_layer={chosen} reads the tower's input; no block feeds the projector."
            )
        return block

    def _check_config(self, config: Any) -> None:
        kind = config.vision_config.model_type
        if kind not in TOWERS:
            raise UnsupportedError(f"LLaVA with a {kind!r} tower is not supported; supported: {', '.join(TOWERS)}.")
        wanted = "default" if TOWERS[kind] else "full"
        if config.vision_feature_select_strategy != wanted:
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {kind!r} tower is "
                f"not supported (its patch grid would be off by a token); expected {wanted!r}."
            )

    def check_call(self, kwargs: Mapping[str, Any]) -> None:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = kwargs.get(name)
            if value is not None and value != getattr(self.model.config, name):
                raise UnsupportedError(
                    f"{name}={value!r} differs from the model's config; set it in model.config before apply()."
                )

    def brings_images(self, kwargs: Mapping[str, Any]) -> bool:
        encoded = kwargs.get("mm_encoder_outputs") or {}
        return kwargs.get("pixel_values") is not None or encoded.get("image") is not None

    def layout(self, kwargs: Mapping[str, Any]) -> layouts.PromptLayout | None:
        mask = self._placeholders(kwargs)
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        found = layouts.from_placeholders(mask, side * side, (View(side, side),), kwargs.get("attention_mask"))
        if found.images:
            return found
        if self.brings_images(kwargs):
            raise InputError(
                "Images were given, but the prompt has no image placeholder; put the processor's image token "
                "(or an image item of the chat template) where the image belongs."
            )
        return None

    def _placeholders(self, kwargs: Mapping[str, Any]) -> Tensor:
        ids, image_token = kwargs.get("input_ids"), self._image_token_id
        if ids is not None:
            return ids == image_token
        embeds = kwargs["inputs_embeds"]
        placeholder = self.base.get_input_embeddings()(torch.tensor(image_token, device=embeds.device))
        return (embeds == placeholder).all(-1)

    @property
    def _image_token_id(self) -> int:
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        return token if token is not None else config.image_token_index
