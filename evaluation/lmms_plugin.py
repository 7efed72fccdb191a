"""Entry point `lmms_eval.models`: names the model class without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "vlmprune"
CLASS_PATH = "vlmprune.evaluation.lmms_model.VlmPrune"


def manifests() -> list[ModelManifest]:
    """Registers `lmms-eval eval --model vlmprune --model_args pretrained=...,policy=...,keep=...`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(MODEL_NAME, chat_class_path=CLASS_PATH)]
