"""Accuracy of `tiny-vit` on held-out pictures, measured with stock timm modules only.

    python -m vlmprune.embedded.vit_check --write

Shares no code with training. Beside the model with all patches it measures the model on some: random ones, and all
or none of those that the digit's card touches, so that one sees what the accuracy hangs on. `--write` puts the
JSON object beside the weights, where the model card takes it from.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .digit_pictures import CLASSES, HARDER, DigitPicture, digit_picture
from .vit_files import load_vit

logger = logging.getLogger("vlmprune.embedded.vit_check")
SIZES = ((36, 41), (42, 46), (47, 52))
CONTRASTS = ((100, 140), (140, 180), (180, 220))
RANDOM = (147, 98, 49, 20)
Counts = dict[str, dict[str, int]]


@torch.no_grad()
def logits_of(model: Any, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Class logits `[B, 10]` of a stock timm model from all patches or the kept ones.

    Args:
        model: timm vision transformer with a class token.
        pixels: `[B, 3, 224, 224]`.
        kept: patch numbers `[B, K]`; the others are removed before the first block.
    """
    if kept is None:
        return model(pixels)
    tokens = model._pos_embed(model.patch_embed(pixels))
    chosen = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
    hidden = model.blocks(model.norm_pre(torch.cat([tokens[:, :1], chosen], dim=1)))
    return model.forward_head(model.norm(hidden))


def groups_of(picture: DigitPicture) -> Iterator[str]:
    """Rows of the table that a picture counts in."""
    yield "all"
    yield f"digit {CLASSES[picture.label]}"
    yield from (f"card of {low} to {high} pixels" for low, high in SIZES if low <= picture.size <= high)
    yield from (f"contrast {low} to {high}" for low, high in CONTRASTS if low <= picture.contrast < high)
    yield picture.background.replace(":", " ")


def subset_logits(model: Any, transform: Any, pictures: list[DigitPicture], seed: int) -> dict[str, Tensor]:
    """Logits `[B, 10]` by the kept patches."""
    pixels = transform([Image.fromarray(picture.image) for picture in pictures])
    found = {"all patches": logits_of(model, pixels)}
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(np.argsort(rng.random((len(pictures), 196)), axis=1))
    for count in RANDOM:
        found[f"{count} random patches"] = logits_of(model, pixels, order[:, :count])
    digit = torch.from_numpy(np.stack([picture.patches.reshape(-1) for picture in pictures]))
    for name, wanted in (("the digit's patches alone", digit), ("all but the digit's patches", ~digit)):
        rows = [logits_of(model, pixels[i : i + 1], wanted[i].nonzero().T) for i in range(len(pictures))]
        found[name] = torch.cat(rows)
    return found


def check(folder: Path, n: int, seed: int, subsets: int, batch: int = 50) -> dict[str, Any]:
    """Counts of right answers by group, and by kept patches for the first `subsets` pictures."""
    model, transform = load_vit(folder)
    groups: Counts = defaultdict(lambda: {"n": 0, "right": 0})
    kept: Counts = defaultdict(lambda: {"n": 0, "right": 0})
    for start in range(0, n, batch):
        pictures = [digit_picture(index, "test", seed) for index in range(start, min(n, start + batch))]
        if start < subsets:
            logits = subset_logits(model, transform, pictures, seed + start)
            for name, values in logits.items():
                for picture, guess in zip(pictures, values.argmax(-1).tolist(), strict=True):
                    _count(kept[name], guess == picture.label)
            dense = logits["all patches"]
        else:
            dense = logits_of(model, transform([Image.fromarray(picture.image) for picture in pictures]))
        for picture, guess in zip(pictures, dense.argmax(-1).tolist(), strict=True):
            for name in groups_of(picture):
                _count(groups[name], guess == picture.label)
    for start in range(0, subsets, batch):
        pictures = [digit_picture(index, "test", seed, HARDER) for index in range(start, min(subsets, start + batch))]
        guesses = logits_of(model, transform([Image.fromarray(picture.image) for picture in pictures])).argmax(-1)
        for picture, guess in zip(pictures, guesses.tolist(), strict=True):
            _count(groups["harder pictures"], guess == picture.label)
    order = [name for name, _ in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0]))]
    return {"seed": seed, "chance": 1 / len(CLASSES), "digits": {name: groups[name] for name in order}, "patches": kept}


def _count(row: dict[str, int], right: bool) -> None:
    row["n"] += 1
    row["right"] += int(right)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy of tiny-vit through stock timm.")
    parser.add_argument("--path", type=Path, default=Path(__file__).parent / "assets" / "tiny-vit")
    parser.add_argument("--pictures", type=int, default=4000, help="held-out pictures")
    parser.add_argument("--subsets", type=int, default=1000, help="of these, pictures with some patches only")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write check.json into --path")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    text = json.dumps(check(given.path, given.pictures, given.seed, given.subsets), indent=2) + "\n"
    if given.write:
        (given.path / "check.json").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
