"""HiPrune's rule against a plain loop, its layers and its budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contexts
import pytest
import torch

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import ColumnMass
from vlmprune.core.views import View
from vlmprune.policies.hiprune import HiPrune


def by_hand(
    middle: list[float], deep: list[float], grid: tuple[int, int], count: int, alpha: float, buffer: str
) -> list[int]:
    """Steps 2 to 6 of the algorithm as a loop over Python lists."""
    height, width = grid
    n = height * width
    anchors = sorted(range(n), key=lambda i: (-middle[i], i))[: round(count * alpha / 5)]
    chosen = list(anchors)
    for anchor in anchors:
        row, column = divmod(anchor, width)
        if buffer == "code":
            near = [min(max(i, 0), n - 1) for i in (anchor - 1, anchor + 1, anchor - width, anchor + width)]
        else:
            cells = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            near = [r * width + c for r, c in cells if 0 <= r < height and 0 <= c < width]
        chosen += [i for i in dict.fromkeys(near) if i not in chosen]
    for i in sorted(range(n), key=lambda i: (-deep[i], i)):
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen[:count])


def select(policy: HiPrune, scores: list[tuple[torch.Tensor, torch.Tensor]], views: Any, **fields: Any) -> Any:
    info = fields.pop("info", contexts.LLAVA)
    middle, deep = policy.score_signals(info)
    signals = {middle: [pair[0] for pair in scores], deep: [pair[1] for pair in scores]}
    return policy.select(contexts.post_encoder(views, policy.keep, signals, info, **fields))


@pytest.mark.parametrize("buffer", ["code", "grid"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
def test_every_budget_against_a_loop(alpha: float, buffer: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for height, width in ((5, 7), (1, 6), (6, 1), (1, 1)):
        n = height * width
        # Few different values, so that there are ties.
        middle = torch.randint(0, 9, (n,), generator=generator).float() / 10
        deep = torch.randint(0, 9, (n,), generator=generator).float() / 10
        for count in range(1, n + 1):
            policy = HiPrune(keep=count, alpha=alpha, buffer=buffer)
            selection = select(policy, [(middle, deep)], [contexts.image(height, width)])
            expected = by_hand(middle.tolist(), deep.tolist(), (height, width), count, alpha, buffer)
            assert contexts.kept_tokens(selection) == [expected]
            assert selection.out_counts() == (count,)


def test_anchors_and_buffers_above_the_budget_lose_the_last_buffers() -> None:
    """alpha = 1, K = 3: one anchor has four buffers; left and right come first."""
    middle = torch.zeros(25)
    middle[12] = 1.0
    for compat in (None, "official"):
        policy = HiPrune(keep=3, alpha=1.0, compat=compat)
        selection = select(policy, [(middle, torch.arange(25.0) / 100)], [contexts.image(5, 5)])
        assert contexts.kept_tokens(selection) == [[11, 12, 13]]


def test_one_token_is_the_best_of_the_deep_block() -> None:
    middle, deep = torch.rand(36), torch.rand(36)
    selection = select(HiPrune(keep=1), [(middle, deep)], [contexts.image(6, 6)])
    assert contexts.kept_tokens(selection) == [[int(deep.argmax())]]


def test_official_exclusion_loses_tokens_only_above_1() -> None:
    generator = torch.Generator().manual_seed(2)
    middle, deep = (torch.rand(64, generator=generator) for _ in range(2))
    views = [contexts.image(8, 8)]
    strict, official = HiPrune(keep=20, alpha=0.8), HiPrune(keep=20, alpha=0.8, compat="official")
    below = [contexts.kept_tokens(select(policy, [(middle, deep)], views)) for policy in (strict, official)]
    assert below[0] == below[1]
    above = [contexts.kept_tokens(select(policy, [(middle, deep * 50)], views)) for policy in (strict, official)]
    assert above[0] == below[0]
    assert len(above[1][0]) < 20 and set(above[1][0]) < {*range(64)}


def test_budget_per_view() -> None:
    tiles = contexts.any_resolution(4, 4, 4)
    policy = HiPrune()

    def counts(keep: Any, views: tuple[View, ...] = tiles) -> tuple[int, ...]:
        return policy.view_counts(contexts.post_encoder([views], keep))[0]

    assert counts(32) == (6, 6, 6, 6, 6)  # int(32 / 5) each
    assert counts(80) == counts(1.0) == (16,) * 5
    assert counts(3) == (1, 1, 1, 0, 0)
    assert counts(0.25) == (4,) * 5
    uneven = (View(4, 4, 0, "thumbnail"), View(4, 2, 16, "tile"), View(4, 2, 24, "tile"))
    assert counts(32, uneven) == (16, 8, 8)
    assert counts(30, uneven) == (14, 8, 8)  # what a small view cannot take goes to the others
    assert counts(0.5, contexts.image(3, 3)) == (4,)  # half to even
    assert counts(0.5, contexts.image(1, 7)) == (4,)
    assert counts(0.01, contexts.image(3, 3)) == (1,)
    selection = select(replace(policy, keep=3), [(torch.rand(80), torch.rand(80))], [tiles])
    assert [token // 16 for token in contexts.kept_tokens(selection)[0]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("info", "middle", "deep"),
    [
        (contexts.LLAVA, 8, 22),
        (contexts.QWEN, 15, 31),
        (replace(contexts.LLAVA, vision_depth=12, feature_block=10), 4, 10),
        (replace(contexts.LLAVA, vision_depth=4, feature_block=2), 1, 2),
        (replace(contexts.LLAVA, vision_depth=3, feature_block=1), 0, 1),
        (replace(contexts.LLAVA, vision_depth=2, feature_block=1), 0, 1),
        (replace(contexts.LLAVA, vision_depth=1, feature_block=0), 0, 0),
        (replace(contexts.QWEN, vision_depth=2, feature_block=1), 0, 1),
        (replace(contexts.LLAVA, vision_depth=24, feature_block=5), 4, 5),
    ],
)
def test_default_layers(info: ModelInfo, middle: int, deep: int) -> None:
    signals = HiPrune().requests(info)[0].signals
    assert [signal.layer for signal in signals] == [middle, deep]


def test_layers_given() -> None:
    assert [s.layer for s in HiPrune(object_layer=3, deep_layer=-2).signals(contexts.LLAVA)] == [3, 21]
    assert [s.layer for s in HiPrune(object_layer=0.5).signals(contexts.LLAVA)] == [11, 22]
    with pytest.raises(InputError, match="blocks 0 to 22"):
        HiPrune(object_layer=23).requests(contexts.LLAVA)
    assert HiPrune().signals(contexts.LLAVA) == (ColumnMass("vision", 8), ColumnMass("vision", 22))


def test_scores_for_pictures_are_the_deep_ones() -> None:
    deep = torch.rand(9)
    selection = select(HiPrune(keep=4), [(torch.rand(9), deep)], [contexts.image(3, 3)])
    assert torch.equal(selection.scores, deep[None])


@pytest.mark.parametrize("wrong", [{"alpha": 1.2}, {"alpha": -0.1}, {"buffer": "none"}, {"compat": "paper"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        HiPrune(**wrong)
