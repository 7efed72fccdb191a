"""HiPrune against the official code's outputs.

Golden kind -> settings:
- `llava`, `llava_next`: `HiPrune(keep=retention_total, alpha=...)`; scores are the attention's means.
- `qwen`: `HiPrune(keep=keep_ratio, alpha=...)` gives `ref/indices_strict`, and with `compat="official"`
  `out/indices_official`.
- `qwen_reduce`: `merge_unit_mass`, with which the adapter turns column masses of patches into tokens' scores.
"""

from __future__ import annotations

from dataclasses import replace

import contexts
import numpy as np
import pytest
import torch
from golden_io import Case
from torch import Tensor

from vlmprune.core.layout import merge_unit_mass
from vlmprune.core.signals import ColumnMass
from vlmprune.policies.hiprune import HiPrune


def received(attention: np.ndarray) -> Tensor:
    """`[crops, N]` from `[crops, H, Q, N + 1]`: mean over heads, then over rows, without the CLS column."""
    return torch.from_numpy(attention).mean(1).mean(1)[:, 1:]


def llava_policy(case: Case) -> HiPrune:
    # The golden layer counts from 1.
    return HiPrune(
        keep=case.integer("retention_total"),
        alpha=case.ratio("alpha"),
        object_layer=case.integer("object_layer") - 1,
    )


def kept_per_crop(case: Case, grid_width: int) -> list[list[int]]:
    """What the policy keeps of an image whose views are the case's crops, per crop."""
    policy = llava_policy(case)
    middle, deep = received(case.inputs["attn_object"]), received(case.inputs["attn_deep"])
    crops, n = deep.shape
    views = contexts.any_resolution(n // grid_width, grid_width, crops - 1)
    signals = {
        ColumnMass("vision", case.integer("object_layer") - 1): [middle.flatten()],
        ColumnMass("vision", contexts.LLAVA.feature_block): [deep.flatten()],
    }
    context = contexts.post_encoder([views], policy.keep, signals)
    [kept] = contexts.kept_tokens(policy.select(context))
    return [[token - n * i for token in kept if token // n == i] for i in range(crops)]


@pytest.mark.golden("hiprune", "llava")
def test_llava(case: Case) -> None:
    assert case.integer("n_crops") == len(case.inputs["attn_deep"])
    assert kept_per_crop(case, case.integer("grid_width")) == case.outputs["indices"].tolist()


@pytest.mark.golden("hiprune", "llava")
def test_llava_scores(case: Case) -> None:
    for name in ("object", "deep"):
        if f"score_{name}" in case.outputs:
            scores = received(case.inputs[f"attn_{name}"]).numpy()
            np.testing.assert_allclose(scores, case.outputs[f"score_{name}"], rtol=1e-5, atol=1e-9)


def tile_grid(width: int, height: int, pinpoints: np.ndarray, side: int) -> tuple[int, int]:
    """Rows and columns of tiles: the resolution that keeps most pixels, then the one that wastes least."""

    def quality(pinpoint: list[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - pinpoint[0] * pinpoint[1]

    best = max(pinpoints.tolist(), key=quality)
    return best[1] // side, best[0] // side


@pytest.mark.golden("hiprune", "llava_next")
def test_llava_next_in_official_order(case: Case) -> None:
    """The official code numbers kept tokens base crop first, then row by row through the whole tiled grid."""
    n = case.inputs["attn_deep"].shape[-1] - 1
    side = int(n**0.5)
    base, *tiles = kept_per_crop(case, side)
    size = case.integer("image_width"), case.integer("image_height")
    rows, columns = tile_grid(*size, case.params["pinpoints"], int(case.params["pinpoints"].min()))
    assert rows * columns == len(tiles)
    crop, token = np.divmod(np.arange(len(tiles) * n), n)
    place = np.empty((rows * side, columns * side), dtype=np.int64)
    row, column = crop // columns * side + token // side, crop % columns * side + token % side
    place[row, column] = (crop + 1) * n + token
    kept = {(i + 1) * n + token for i, tile in enumerate(tiles) for token in tile}
    sequence = [*base, *(int(token) for token in place.flat if int(token) in kept)]
    assert sequence == case.outputs["sequence"].tolist()
    assert len(sequence) == int(case.outputs["n_returned"])


@pytest.mark.golden("hiprune", "qwen")
@pytest.mark.parametrize("compat", [None, "official"])
def test_qwen(case: Case, compat: str | None) -> None:
    policy = HiPrune(keep=case.ratio("keep_ratio"), alpha=case.ratio("alpha"), compat=compat)
    frames, *patches = case.params["grid_thw"].tolist()
    height, width = (side // case.integer("spatial_merge") for side in patches)
    middle, deep = policy.score_signals(contexts.QWEN)
    signals = {
        middle: [torch.from_numpy(case.inputs["score_object"])],
        deep: [torch.from_numpy(case.inputs["score_deep"])],
    }
    context = contexts.post_encoder([contexts.frames(height, width, frames)], policy.keep, signals, info=contexts.QWEN)
    [kept] = contexts.kept_tokens(policy.select(context))
    expected = case.refs["indices_strict"] if compat is None else case.outputs["indices_official"]
    assert kept == expected.tolist()
    if compat is None:
        assert len(kept) == int(case.refs["budget"])


@pytest.mark.golden("hiprune", "qwen_reduce")
def test_qwen_reduction(case: Case) -> None:
    mass = torch.from_numpy(case.inputs["attn"]).mean(0).sum(0)
    window = torch.from_numpy(case.inputs["window_index"])
    score = merge_unit_mass(mass, case.integer("spatial_merge_unit"), window)
    np.testing.assert_allclose(score.numpy(), case.outputs["score"], rtol=1e-5)


def test_qwen_info_asks_for_sums_and_the_full_attention_blocks() -> None:
    expected = (ColumnMass("vision", 15, "sum"), ColumnMass("vision", 31, "sum"))
    assert HiPrune().score_signals(contexts.QWEN) == expected
    assert HiPrune().score_signals(replace(contexts.QWEN, mrope=False))[0].reduce == "mean"
