"""Facts of a training run, written beside the weights."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .common import load_checkpoint
from .decoder import (
    END_WEIGHT,
    FOCUS_HEADS,
    FOCUS_LAYER,
    FOCUS_WEIGHT,
    LOOKUP_SHARE,
    POSITION_WEIGHT,
    QUESTIONS_PER_IMAGE,
)

DATA = {
    "scenes": "generated, train photos and train digits only",
    "photos": (
        "the shipped run's stage tower also drew backgrounds from scikit-image's motorcycle_left and page, "
        "which are not packaged because they carry no licence note"
    ),
    "easy_vqa": "train split only (10 % of stage tower, 15 % of stage decoder)",
    "held_out": "test photos, test digits, easy-VQA test split; never trained on",
    "questions_per_image": QUESTIONS_PER_IMAGE,
    "lookup_families_only_share_of_stage_decoder": LOOKUP_SHARE,
}
AIDS = {
    "dense_patch_labels": "stage tower: kind, colour, object centre and position of every patch",
    "cls_labels": "stage tower: which colour-kind pairs and digits are present, from the CLS token",
    "projector_alignment": "projector started by matching word embeddings of the object on each patch",
    "attention_supervision": {"decoder_layer": FOCUS_LAYER, "heads": list(FOCUS_HEADS)},
    "attention_supervision_loss": (
        f"{FOCUS_WEIGHT} * mean -log(attention mass from the answer position to the tokens of the object)"
    ),
    "position_axes": (
        f"stage decoder: {POSITION_WEIGHT} * error of the object centre read from visual tokens along the word "
        "axes left-right and top-bottom"
    ),
    "random_token_subsets": "stage decoder: 8 to 149 random visual tokens in a quarter of the later steps",
    "end_token_weight": END_WEIGHT,
}


@dataclass(frozen=True)
class Recipe:
    """What the code of a recipe knows about it: name of the model, stages, data, aids, processes."""

    model: str
    stages: tuple[str, ...]
    data: dict[str, Any]
    aids: dict[str, Any]
    processes: int


LLAVA = Recipe("tiny-llava", ("tower", "decoder"), DATA, AIDS, processes=2)


def write_facts(out: Path, target: Path, seed: int, parameters: int, recipe: Recipe = LLAVA) -> None:
    """Write `target/training.json` and copy the curve.

    Args:
        out: folder of the run with a checkpoint per stage and `curve.csv`.
        target: folder of the exported model.
        seed: seed of the run.
        parameters: number of weights of the model.
        recipe: what was trained.
    """
    import transformers

    stages = {name: _stage(out / f"{name}.pt") for name in recipe.stages}
    facts: dict[str, Any] = {
        "model": recipe.model,
        "parameters": parameters,
        "seed": seed,
        "stages": {name: stage for name, stage in stages.items() if stage is not None},
        "weights": "exponential moving average of the last steps",
        "data": recipe.data,
        "training_aids": recipe.aids,
        "machine": {
            "system": platform.system(),
            "cpu": _cpu(),
            "processes": recipe.processes,
            "threads_per_process": 1,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    notes = out / "notes.json"  # optional: what happened to this run that the code does not tell
    if notes.exists():
        facts["notes"] = json.loads(notes.read_text())
    (target / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    if (out / "curve.csv").exists():
        shutil.copyfile(out / "curve.csv", target / "curve.csv")


def _stage(path: Path) -> dict[str, float] | None:
    state = load_checkpoint(path)
    if state is None:
        return None
    return {"steps": state["step"], "images": state["images"], "training_seconds": round(state["elapsed"])}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
