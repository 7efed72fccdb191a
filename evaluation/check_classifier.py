"""The part of a model card that tells a classifier's accuracy: `check.json` of `tiny-vit` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmprune.core.errors import InputError
from vlmprune.evaluation.check_record import read_check
from vlmprune.evaluation.statistics import wilson
from vlmprune.evaluation.tables import percent

INTRO = (
    "Measured by `python -m vlmprune.embedded.vit_check` with stock timm, float32. Held-out pictures use photos and "
    "handwritten digits that training did not see. Percent right, 95 % Wilson intervals (over pictures: a digit or "
    "photo comes in several). *Harder pictures*: smaller cards, less contrast, more of the photo shining through, more "
    "rotation and shear (`HARDER` of `digit_pictures.py`)."
)
SUBSETS = (
    "The same weights where only some of the 196 patches enter the first block. The digit's card touches between 9 "
    "and 25 patches."
)


def classifier_tables(folder: Path) -> list[str]:
    """Accuracy by size, contrast, digit and photo, and by kept patches; empty where `check.json` has none of it.

    Raises:
        InputError: the file is damaged.
    """
    content = read_check(folder)
    if not content.get("digits"):
        return []
    try:
        chance = percent(content["chance"])
        return [
            "## Accuracy",
            f"{INTRO} Picture seed {content['seed']}. Chance: {chance}.",
            _table("pictures", content["digits"]),
            SUBSETS,
            _table("patches", content["patches"]),
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'check.json'} is damaged: {error!r}") from None


def classifier_architecture(settings: Mapping[str, Any]) -> str:
    """One sentence from a timm `config.json`."""
    arguments = settings["model_args"]
    side = settings["pretrained_cfg"]["input_size"][-1]
    heads, width = arguments["num_heads"], arguments["embed_dim"]
    tokens = f"{(side // 16) ** 2} tokens and a class token"
    return (
        f"timm VisionTransformer (`{settings['architecture']}` with other sizes): {arguments['depth']} blocks of width "
        f"{width}, {heads} heads of {width // heads}, MLPs of {round(width * arguments['mlp_ratio'])}, on {side} x "
        f"{side} pixels in patches of 16 ({tokens}), {settings['num_classes']} classes."
    )


def _table(title: str, rows: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"| {title} | n | right |", "| --- | ---: | ---: |"]
    for name, row in rows.items():
        low, high = wilson(row["right"], row["n"])
        shown = f"{percent(row['right'] / row['n'])} ({percent(low)} to {percent(high)})"
        lines.append(f"| {name} | {row['n']} | {shown} |")
    return "\n".join(lines)
