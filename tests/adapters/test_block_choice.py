"""HiPrune and ToDRE read the right blocks of a real tower: their choice is found again from eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vlmprune
from vlmprune.embedded import generate_scene, load_embedded, random_llava
from vlmprune.embedded.tiny_configs import random_inputs

# Depth, object block, deep block (0-based). The paper's tower has 24 blocks: the 9th, and the last but one.
DEEP = (24, 8, 22)
TRAINED = (6, 1, 4)


def hiprune(middle: np.ndarray, deep: np.ndarray, count: int, alpha: float, width: int) -> list[int]:
    """The specification's algorithm for one image of LLaVA-1.5, written out plainly."""
    n = len(deep)
    anchors = sorted(range(n), key=lambda i: (-middle[i], i))[: round(count * alpha / 5)]
    chosen = dict.fromkeys(anchors)
    for i in anchors:
        for j in (i - 1, i + 1, i - width, i + width):
            chosen.setdefault(min(max(j, 0), n - 1))
    kept = list(chosen)[:count]
    rest = sorted((i for i in range(n) if i not in chosen), key=lambda i: (-deep[i], i))
    return sorted(kept + rest[: count - len(kept)])


def attentions(model: nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """``[blocks, images, T, T]`` head mean of a tower under eager attention."""
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_attentions=True)
    return torch.stack([layer.mean(1) for layer in out.attentions]).double().numpy()


class Tower:
    """A model under SDPA, its inputs, and the eager attention of a stock copy."""

    def __init__(
        self, model: nn.Module, stock: nn.Module, inputs: dict[str, Any], blocks: tuple[int, int, int]
    ) -> None:
        self.model, self.inputs = model, inputs
        self.depth, self.middle, self.deep = blocks
        attention = attentions(stock, inputs["pixel_values"])
        self.mass = attention.mean(2)[:, :, 1:]  # [blocks, images, N]
        self.cls = attention[:, :, 0, 1:]
        self.n = self.mass.shape[2]
        self.side = round(self.n**0.5)

    def kept(self, policy: Any) -> list[list[int]]:
        with vlmprune.applied(self.model, policy) as handle, torch.no_grad():
            self.model(**self.inputs)
            return [handle.last.kept(i) for i in range(len(self.inputs["input_ids"]))]

    def expected(self, middle: int, deep: int, count: int, alpha: float) -> list[list[int]]:
        images = range(self.mass.shape[1])
        return [hiprune(self.mass[middle, i], self.mass[deep, i], count, alpha, self.side) for i in images]


@pytest.fixture(scope="module")
def deep_tower() -> Tower:
    """A tower as deep as LLaVA-1.5's, 64 patches."""
    sizes = {"vision_depth": DEEP[0], "image_size": 64, "text_layers": 2, "hidden": 32, "init_std": 0.3}
    stock = random_llava(attn_implementation="eager", **sizes)
    model = random_llava(**sizes)
    return Tower(model, stock, random_inputs(model, batch=2), DEEP)


@pytest.fixture(scope="module")
def trained_tower() -> Tower:
    """The embedded trained model on two scenes, 196 patches."""
    model, processor = load_embedded("tiny-llava")
    stock = load_embedded("tiny-llava")[0]
    stock.set_attn_implementation("eager")
    rng = np.random.default_rng(11)
    images = [Image.fromarray(generate_scene(rng, "test").image) for _ in range(2)]
    text = "USER: <image>\nwhat is on the left? ASSISTANT:"
    inputs = processor(images=images, text=[text] * 2, return_tensors="pt", padding=True)
    return Tower(model, stock, dict(inputs), TRAINED)


@pytest.fixture(params=["deep_tower", "trained_tower"])
def tower(request: pytest.FixtureRequest) -> Tower:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75, 1.0])
def test_hiprune_finds_anchors_and_registers_in_the_right_blocks(
    tower: Tower, alpha: float, implementation: str
) -> None:
    count = round(0.34 * tower.n)
    tower.model.set_attn_implementation(implementation)
    try:
        got = tower.kept(vlmprune.HiPrune(keep=0.34, alpha=alpha))
    finally:
        tower.model.set_attn_implementation("sdpa")
    assert got == tower.expected(tower.middle, tower.deep, count, alpha)
    assert [len(tokens) for tokens in got] == [count, count]
    # Any other block would be noticed: all others as the object block, and the last one as the deep block.
    if alpha >= 0.5:
        for middle in set(range(tower.depth)) - {tower.middle}:
            assert got != tower.expected(middle, tower.deep, count, alpha)
    if alpha < 1:
        for deep in set(range(tower.depth)) - {tower.deep}:
            assert got != tower.expected(tower.middle, deep, count, alpha)


def test_layers_by_number(tower: Tower) -> None:
    policy = vlmprune.HiPrune(keep=0.34, alpha=0.6, object_layer=0, deep_layer=tower.deep - 1)
    assert tower.kept(policy) == tower.expected(0, tower.deep - 1, round(0.34 * tower.n), 0.6)


def test_todre_starts_at_the_patch_that_the_cls_token_looks_at(tower: Tower) -> None:
    got = tower.kept(vlmprune.ToDRE(keep=1, tau=0.0))
    assert got == [[int(row.argmax())] for row in tower.cls[tower.deep]]
    others = [[[int(row.argmax())] for row in block] for i, block in enumerate(tower.cls) if i != tower.deep]
    assert any(other != got for other in others)


def test_todre_picks_what_the_specification_picks(tower: Tower) -> None:
    """Greedy max-sum diversification over projector outputs, in float64 NumPy."""
    with torch.no_grad():
        features = tower.model.model.get_image_features(pixel_values=tower.inputs["pixel_values"])
    features = list(getattr(features, "pooler_output", features))
    expected = []
    for image, cls in zip(features, tower.cls[tower.deep], strict=True):
        x = image.double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        chosen = [int(cls.argmax())]
        score = x @ x[chosen[0]]
        while len(chosen) < 9:
            score[chosen[-1]] = np.inf
            chosen.append(int(score.argmin()))
            score = score + x @ x[chosen[-1]]
        expected.append(sorted(chosen))
    assert tower.kept(vlmprune.ToDRE(keep=9, tau=0.0)) == expected
