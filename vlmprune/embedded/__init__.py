"""Small trained models, their data generators and their training.

`load_embedded("tiny-llava")` gives a LLaVA of 2.7 million parameters that answers questions about synthetic
scenes and easy-VQA, `load_embedded("tiny-qwen")` a Qwen2.5-VL that does so at several resolutions; files, training
facts and curve of each lie in `assets/<name>`.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_MODELS = {"tiny-llava": "LlavaForConditionalGeneration", "tiny-qwen": "Qwen2_5_VLForConditionalGeneration"}
_LAZY = {
    "FAMILIES": "questions",
    "HEADLINE_FAMILIES": "questions",
    "SceneQuestion": "tasks",
    "scene_questions": "tasks",
    "load_easy_vqa": "easyvqa",
    "write_parquet": "easyvqa",
    "generate_scene": "scenes",
    "random_llava": "tiny_configs",
}
__all__ = ["embedded_models", "load_embedded", "model_path", *sorted(_LAZY)]


def embedded_models() -> tuple[str, ...]:
    """Names of the models that ship in the package."""
    return tuple(_MODELS)


def model_path(name: str = "tiny-llava") -> Path:
    """Folder of an embedded checkpoint, in the layout of `from_pretrained`.

    Raises:
        InputError: unknown name; the message names the nearest known one.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1, cutoff=0.0)
        raise InputError(f"unknown embedded model {name!r}; did you mean {near[0]!r}? Known: {', '.join(_MODELS)}")
    return Path(__file__).parent / "assets" / name


def load_embedded(
    name: str = "tiny-llava", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an embedded model and its processor with the stock transformers classes, in eval mode.

    Args:
        name: one of `embedded_models()`.
        dtype: dtype of the weights.

    Raises:
        InputError: unknown name.
    """
    path = model_path(name)
    import transformers

    model = getattr(transformers, _MODELS[name]).from_pretrained(path, dtype=dtype)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
