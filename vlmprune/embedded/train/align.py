"""Between the stages: align the projector with the word embeddings, so that tokens start as sums of words.

A visual token of a red circle on the left then already resembles the words `red`, `circle` and `left`, and
the decoder's first look-ups need not discover that.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import SHAPES
from ..easyvqa import image_facts, load_easy_vqa
from ..fastpath import project
from ..model import build_model, vision_tower
from ..scenes import DIGIT, IMAGE_SIZE
from .common import FlatParameters, load_checkpoint, logger, save_checkpoint
from .labels import ALL_COLOURS
from .scene_cache import Entry, SceneCache
from .tower import TowerHeads

WORDS = (*ALL_COLOURS, *SHAPES, DIGIT, *map(str, range(10)), "left", "right", "top", "bottom")
ROWS = 1024
SCALE, OFFSET = 2.5, 4.0  # a word counts as present from a component of 1.6; embeddings have norm 5.7
SEED = 31


def load_tower(model: Any, path: Path) -> None:
    """Copy the averaged tower weights of a stage-1 checkpoint into the model.

    Raises:
        FileNotFoundError: stage 1 has not written a checkpoint yet.
    """
    state = load_checkpoint(path)
    if state is None:
        raise FileNotFoundError(f"no stage-1 checkpoint at {path}; run the stage 'tower' first")
    modules = [vision_tower(model), TowerHeads()]
    flat = FlatParameters(modules, 0.0)
    flat.values.copy_(state["average"])
    for parameter in modules[0].parameters():
        parameter.grad = None


def word_targets(entry: Entry) -> np.ndarray:
    """Which of `WORDS` describe each patch: float32 `[196, len(WORDS)]`; background patches have none."""
    index = {word: i for i, word in enumerate(WORDS)}
    rows: list[set[str]] = []
    if entry.scene is not None:
        for item in entry.scene.objects:
            words = {item.colour, item.kind} | ({str(item.digit)} if item.digit is not None else set())
            x, y = item.centre
            rows.append(words | {"left" if x < IMAGE_SIZE / 2 else "right", "top" if y < IMAGE_SIZE / 2 else "bottom"})
    else:
        facts = image_facts([(q.question, q.answer) for q in entry.easy])
        rows.append({word for word in facts if word is not None})
    table = np.zeros((len(rows) + 1, len(WORDS)), dtype=np.float32)
    for i, words in enumerate(rows):
        table[i, [index[word] for word in words]] = 1
    return table[entry.owner]


def whiten(projector: Any, features: Tensor) -> None:
    """Fold the mean and spread of the features into the first linear layer."""
    mean, std = features.mean(0), features.std(0)
    with torch.no_grad():
        projector.linear_1.weight /= std
        projector.linear_1.bias.copy_(-(projector.linear_1.weight @ mean))


def align(out: Path, tokenizer: Any, seconds: float = 30.0, seed: int = 0) -> Any:
    """Make the starting point of stage 2 from `out/tower.pt`; the state goes to `out/aligned.pt`."""
    model = build_model(seed)
    load_tower(model, out / "tower.pt")
    rng = np.random.default_rng([seed, SEED])
    cache = SceneCache(vision_tower(model), rng, 1200, load_easy_vqa("train"))
    features = cache.features.flatten(0, 1)
    targets = torch.from_numpy(np.concatenate([word_targets(entry) for entry in cache.entries]))
    on_object = torch.from_numpy(np.concatenate([entry.owner >= 0 for entry in cache.entries]))
    pools = on_object.nonzero()[:, 0], (~on_object).nonzero()[:, 0]
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in WORDS]
    directions = model.model.language_model.embed_tokens.weight.detach()[torch.tensor([i[0] for i in ids])]
    directions = F.normalize(directions, dim=-1)
    projector = model.model.multi_modal_projector
    whiten(projector, features[pools[0][:20000]].float())
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.01)
    torch.manual_seed(seed)
    start, step = time.monotonic(), 0
    while (passed := (time.monotonic() - start) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - 0.9 * passed)
        rows = torch.cat(
            [p[torch.randint(len(p), (n,))] for p, n in zip(pools, (ROWS * 3 // 4, ROWS // 4), strict=True)]
        )
        output = project(projector, features[rows])
        logits = SCALE * (output @ directions.T) - OFFSET
        # The penalty keeps visual tokens at the scale of word embeddings.
        loss = F.binary_cross_entropy_with_logits(logits, targets[rows]) + 0.01 * output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    logger.info("align steps %d loss %.4f output rms %.2f", step, loss.item(), _rms(output))
    model.requires_grad_(True)
    save_checkpoint(out / "aligned.pt", model.state_dict())
    return model


def load_aligned(out: Path, seed: int = 0) -> Any:
    """The model that `align` left in `out`."""
    model = build_model(seed)
    model.load_state_dict(load_checkpoint(out / "aligned.pt"))
    return model


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


__all__ = ["align", "load_aligned", "load_tower"]
