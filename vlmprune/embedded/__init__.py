"""Small trained models, their data generators and their training.

`load_embedded("tiny-llava")` gives a LLaVA of 2.7 million parameters that answers questions about synthetic
scenes and easy-VQA, `load_embedded("tiny-qwen")` a Qwen2.5-VL that does so at several resolutions,
`load_embedded("tiny-vit")` a timm classifier of the handwritten digit in a picture; files, training facts and curve
of each lie in `assets/<name>`.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

import torch

from vlmprune.core.errors import InputError

_CLASSIFIER = "tiny-vit"
_MODELS = {"tiny-llava": "LlavaForConditionalGeneration", "tiny-qwen": "Qwen2_5_VLForConditionalGeneration"}
_NAMES = (*_MODELS, _CLASSIFIER)
_LAZY = {
    "FAMILIES": "questions",
    "HEADLINE_FAMILIES": "questions",
    "SceneQuestion": "tasks",
    "scene_questions": "tasks",
    "load_easy_vqa": "easyvqa",
    "write_parquet": "easyvqa",
    "DigitPicture": "digit_pictures",
    "PictureTransform": "vit_transform",
    "digit_picture": "digit_pictures",
    "generate_scene": "scenes",
    "random_llava": "tiny_configs",
}
__all__ = ["embedded_models", "is_classifier", "load_embedded", "model_path", *sorted(_LAZY)]


def embedded_models() -> tuple[str, ...]:
    """Names of the models that ship in the package, vision-language models first."""
    return _NAMES


def is_classifier(name: str) -> bool:
    """True for an embedded model that classifies images and writes no text."""
    return name == _CLASSIFIER


def model_path(name: str = "tiny-llava") -> Path:
    """Folder of an embedded checkpoint, in the layout of `from_pretrained` (`tiny-vit`: of timm's `local-dir:`).

    Raises:
        InputError: unknown name; the message names the nearest known one.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)
        raise InputError(f"unknown embedded model {name!r}; did you mean {near[0]!r}? Known: {', '.join(_NAMES)}")
    return Path(__file__).parent / "assets" / name


def load_embedded(name: str = "tiny-llava", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load an embedded model with the stock classes of transformers or timm, in eval mode.

    Args:
        name: one of `embedded_models()`.
        dtype: dtype of the weights.

    Returns:
        `(model, processor)`; for `tiny-vit`, a timm `VisionTransformer` and a
        :class:`~vlmprune.embedded.vit_transform.PictureTransform`, which turns one PIL image or a list into the
        batch: `logits = model(transform(images))`, classes `transform.labels`.

    Raises:
        InputError: unknown name; `tiny-vit` without timm installed.
    """
    path = model_path(name)
    if is_classifier(name):
        from .vit_files import load_vit

        return load_vit(path, dtype)
    import transformers

    model = getattr(transformers, _MODELS[name]).from_pretrained(path, dtype=dtype)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
