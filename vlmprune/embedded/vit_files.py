"""Checkpoint folder of `tiny-vit`, in timm's own layout: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from .export import to_json
from .vit_model import ARCHITECTURE, PREPROCESSING, build_vit, model_arguments
from .vit_transform import PictureTransform

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def vit_config(model: VisionTransformer) -> dict[str, Any]:
    """Content of `config.json`."""
    arguments = model_arguments(len(model.blocks), model.blocks[0].mlp.fc1.out_features / model.embed_dim)
    return {
        "architecture": ARCHITECTURE,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": arguments,
        "pretrained_cfg": {**PREPROCESSING, "label_names": list(PictureTransform().labels)},
    }


def export_vit(model: VisionTransformer, target: Path) -> None:
    """Replace weights and config in `target`, each atomically; other files there stay.

    Args:
        model: built by `vit_model`; stored as float16.
        target: folder, created where missing.
    """
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source = Path(folder)
        save_file(weights, source / WEIGHTS_NAME, metadata={"format": "pt"})
        (source / CONFIG_NAME).write_text(to_json(vit_config(model)))
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (source / name).chmod(0o644)
            os.replace(source / name, target / name)


def load_vit(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[VisionTransformer, PictureTransform]:
    """Load a folder of `export_vit`, in eval mode, and its transform.

    Raises:
        InputError: timm is not installed.
    """
    arguments = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_args"]
    model = build_vit(arguments["depth"], arguments["mlp_ratio"])
    model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return model.to(dtype), PictureTransform()
