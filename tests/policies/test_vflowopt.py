"""VFlowOpt's rules against plain loops: importance, recycling, cuts, budgets, configurations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.core.attention import DenseAttention
from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError, SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Attention, Pixels, Projected, Signal
from vlmprune.core.sites import Site
from vlmprune.core.views import Newline, View
from vlmprune.policies._vflowopt_importance import attending_patches, patch_entropy
from vlmprune.policies._vflowopt_settings import RELEASED, mean_retention, solve_r3
from vlmprune.policies.per_image_budget import PerImageBudget
from vlmprune.policies.vflowopt import IMPORTANCE, NO_PATCH, VFlowOpt

BLOCK = Attention(contexts.LLAVA.feature_block)
PARTS = (10, 10, 12)  # of contexts.LLAVA
Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Given(VFlowOpt):
    """VFlowOpt whose importance is given per item."""

    values: list[Tensor] = field(default_factory=list, compare=False)

    def importance_signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return ()

    def importance(self, context: Context, thresholds: Sequence[float]) -> tuple[Tensor, tuple[str, ...]]:
        return contexts.pad(self.values), ()


def canvas(height: int, width: int, first: int) -> tuple[View, tuple[Newline, ...]]:
    """A canvas of `height x width` cells from place `first` on, with a newline behind each row, and these."""
    stride = width + 1
    cells = tuple(first + row * stride + column for row in range(height) for column in range(width))
    lines = tuple(Newline(first + row * stride + width, first + row * stride) for row in range(height))
    return View(height, width, first, "tile", cells), lines


def first_cut(
    views: Sequence[tuple[View, ...]],
    lengths: Sequence[int],
    importance: list[Tensor],
    features: list[Tensor],
    r1: float,
    a: float,
    newlines: tuple[tuple[Newline, ...], ...] = (),
    **fields: Any,
) -> Selection:
    """The first cut of a policy with R1 and a, on given importance."""
    keep = mean_retention(r1, 0.9, 1.0, PARTS)
    policy = Given(keep=keep, r1=r1, r2=0.9, r3=1.0, a=a, values=importance)
    context = contexts.post_encoder(views, keep)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    fields = {"lengths": tuple(lengths), "valid": valid, "newlines": newlines, **fields}
    return policy.select(replace(context, signals={Projected(): contexts.pad(features)}, **fields))


def by_hand(
    importance: list[float], features: np.ndarray, cells: list[Cell], r1: float, a: float
) -> dict[int, tuple[np.ndarray, float]]:
    """Steps 7 to 11 as loops: place of each token that is left -> its features and importance."""
    n = len(importance)
    count = min(n, round(n * (1 - r1)) + int(n / a**2))
    pool = sorted(range(n), key=lambda i: (importance[i], -i))[:count]
    left = {i: (features[i], importance[i]) for i in range(n) if i not in pool}
    groups: dict[Cell, list[int]] = {}
    for i in sorted(pool):
        grid, row, column = cells[i]
        groups.setdefault((grid, math.floor(row / a), math.floor(column / a)), []).append(i)
    for members in groups.values():
        total = sum(importance[i] for i in members)
        best = max(members, key=lambda i: (importance[i], -i))
        left[best] = (sum(importance[i] / total * features[i] for i in members), importance[best])
    return dict(sorted(left.items()))


def check(selection: Selection, item: int, features: Tensor, expected: dict[int, tuple[np.ndarray, float]]) -> None:
    """A selection's tokens, features, sources and carried importance of one item."""
    places = [place for place in selection.anchors()[item].tolist() if place >= 0]
    assert places == list(expected) and selection.out_counts()[item] == len(expected)
    wanted = np.stack([value for value, _ in expected.values()])
    n = len(features)
    sources = selection.source_map().weights[item, : len(places), :n].double().numpy()
    np.testing.assert_allclose(sources @ features.double().numpy(), wanted, rtol=1e-5, atol=1e-6)
    padded = contexts.pad([features] + [torch.zeros(selection.n_in, features.shape[1])], 0.0)[:1]
    whole = padded.expand(len(selection.anchors()), -1, -1)
    merged = selection.apply(whole, features=True)[item, : len(places)]
    np.testing.assert_allclose(merged.double().numpy(), wanted, rtol=1e-5, atol=1e-6)
    carried = selection.apply(selection.carry[IMPORTANCE])[item, : len(places)].float()
    assert carried.tolist() == [value for _, value in expected.values()]


# ---- importance


def test_importance_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = (3 * torch.randn(2, 3, 12, 12, generator=generator)).softmax(-1)
    for t in (0.0, 0.8, 1.5):
        context = contexts.post_encoder([contexts.image(3, 4)] * 2, 0.3, {BLOCK: [[m] for m in attention.mean(1)]})
        found, notes = VFlowOpt(keep=0.3).importance(context, [t, t])
        for view in range(2):
            mean = attention[view].mean(0).double().tolist()
            received = [sum(row[j] for row in mean) / 12 for j in range(12)]
            chosen = [j for j in range(12) if received[j] > t / 12 * sum(received)]
            assert 0 < len(chosen) <= 12 and (t == 0) == (len(chosen) == 12)
            expected = [sum(mean[k][j] for k in chosen) / len(chosen) for j in range(12)]
            assert found[view].tolist() == pytest.approx(expected, rel=1e-5)
        assert notes == ()


def test_a_view_without_such_a_patch_takes_the_one_that_receives_most() -> None:
    attention = torch.rand(2, 6, 6).softmax(-1)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    chosen, empty = attending_patches(DenseAttention(attention), torch.tensor([100.0, 100.0]), valid)
    assert empty.tolist() == [True, True]
    for view, n in enumerate((6, 4)):
        received = attention[view, :n, :n].sum(0)
        assert chosen[view].nonzero().tolist() == [[int(received.argmax())]]
    context = contexts.post_encoder([contexts.image(2, 3)] * 2, 0.25, {BLOCK: [[m] for m in attention]})
    values, notes = VFlowOpt(keep=0.25, t=100.0).importance(context, [100.0, 0.0])
    assert notes == (NO_PATCH,)
    torch.testing.assert_close(values[0], attention[0, int(attention[0].sum(0).argmax())])
    signals = {**context.signals, Projected(): torch.randn(2, 6, 3)}
    assert VFlowOpt(keep=0.25, t=100.0).select(replace(context, signals=signals)).notes == (NO_PATCH,)


def test_padding_of_views_counts_nowhere() -> None:
    policy = VFlowOpt(keep=0.3, alpha=0.5)
    views = [contexts.image(2, 3), contexts.image(1, 4)]
    attention = [[torch.rand(n, n).softmax(-1)] for n in (6, 4)]
    pixels = torch.randint(0, 256, (2, 6, 3, 2, 2)).float()

    def importance(items: list[int]) -> Tensor:
        context = contexts.post_encoder([views[i] for i in items], 0.3, {BLOCK: [attention[i] for i in items]})
        width = max(len(attention[i][0]) for i in items)
        signals = {**context.signals, Pixels(): pixels[items, :width]}
        return policy.importance(replace(context, signals=signals), [1.0] * len(items))[0]

    both = importance([0, 1])
    torch.testing.assert_close(both[1, :4], importance([1])[0])
    torch.testing.assert_close(both[0], importance([0])[0])


def test_entropy() -> None:
    pixels = torch.zeros(1, 4, 3, 2, 2)
    pixels[0, 0] = 200.0
    pixels[0, 1, :, 0] = 255.0  # two levels, half each
    pixels[0, 2] = torch.tensor([[0.0, 10.0], [20.0, 30.0]])  # four levels
    pixels[0, 3, 0] = torch.tensor([[1.0, 1.4], [0.6, 1.0]])  # 8-bit values with rounding errors
    assert patch_entropy(pixels)[0].tolist() == pytest.approx([0.0, 1.0, 2.0, 0.0], abs=1e-6)
    assert patch_entropy(pixels)[0, 0] == 0
    grey = pixels[:, :, :1]
    assert patch_entropy(grey)[0].tolist() == pytest.approx([0.0, 1.0, 2.0, 0.0], abs=1e-6)


def test_pixels_are_asked_for_only_where_they_count() -> None:
    assert VFlowOpt(keep=0.3).importance_signals(contexts.LLAVA) == (BLOCK,)
    assert VFlowOpt(keep=0.3, alpha=0.0).importance_signals(contexts.LLAVA) == (BLOCK,)
    assert VFlowOpt(keep=0.3, alpha=-0.1).importance_signals(contexts.LLAVA) == (BLOCK, Pixels())
    assert VFlowOpt(keep=0.3, layer=3).importance_signals(contexts.LLAVA) == (Attention(3),)


# ---- the first cut


@pytest.mark.parametrize("r1", [0.9, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("a", [1.0, 1.7, 3.0, 10.0])
def test_recycling_against_loops(r1: float, a: float) -> None:
    """A single view, a view with tiles that have grids of their own, and a canvas with newlines, in one batch."""
    generator = torch.Generator().manual_seed(4)
    tile, lines = canvas(4, 6, 9)
    views = [contexts.image(5, 7), contexts.any_resolution(3, 4, 2), (View(3, 3, 0, "thumbnail"), tile)]
    cells = [
        [(0, *divmod(i, 7)) for i in range(35)],
        [(grid, *divmod(i, 4)) for grid in range(3) for i in range(12)],
        [(0, *divmod(i, 3)) for i in range(9)] + [(1, *divmod(i, 7)) for i in range(28)],
    ]
    lengths = [len(rows) for rows in cells]
    importance = [torch.randint(1, 40, (n,), generator=generator) / 64 for n in lengths]  # with ties
    importance[2][[line.place for line in lines]] = 1.0
    features = [torch.randn(n, 3, generator=generator) for n in lengths]
    selection = first_cut(views, lengths, importance, features, r1, a, ((), (), lines))
    for item, n in enumerate(lengths):
        values = importance[item].tolist()
        expected = by_hand(values, features[item].double().numpy(), cells[item], r1, a)
        check(selection, item, features[item], expected)
        dropped = round(n * (1 - r1))
        assert len(expected) >= max(1, n - dropped - int(n / a**2))


def test_newlines_survive() -> None:
    tile, lines = canvas(5, 4, 4)
    importance = torch.rand(29) / 29
    places = [line.place for line in lines]
    importance[places] = 1.0
    features = torch.randn(29, 2)
    selection = first_cut(
        [(View(2, 2, 0, "thumbnail"), tile)], [29], [importance], [features], 5 / 29, 50.0, newlines=(lines,)
    )
    assert set(places) <= set(selection.kept[0].tolist())  # type: ignore[index]


def test_one_view_with_a_newline_at_its_end() -> None:
    """The newline stands alone in its cell, so even where it is pooled it stays as it is."""
    features = torch.randn(10, 2)
    importance = torch.linspace(0.1, 0.9, 10)
    selection = first_cut([(View(3, 3),)], [10], [importance], [features], 0.01, 1.5, newlines=((Newline(9, 0),),))
    cells = [(0, *divmod(i, 3)) for i in range(9)] + [(0, 3, 0)]
    check(selection, 0, features, by_hand(importance.tolist(), features.double().numpy(), cells, 0.01, 1.5))
    assert torch.equal(selection.apply(features[None], features=True)[0, -1], features[9])


def test_equal_importance_gives_the_mean_and_one_token_stays_as_it_is() -> None:
    features = torch.randn(4, 3)
    selection = first_cut([contexts.image(2, 2)], [4], [torch.full((4,), 0.3)], [features], 0.5, 1.0)
    out = selection.apply(features[None], features=True)[0]
    assert torch.equal(out, features)  # cells of one token each
    selection = first_cut([contexts.image(2, 2)], [4], [torch.full((4,), 0.3)], [features], 0.01, 4.0)
    torch.testing.assert_close(selection.apply(features[None], features=True)[0, 0], features.mean(0))
    zero = first_cut([contexts.image(2, 2)], [4], [torch.zeros(4)], [features], 0.01, 4.0)
    torch.testing.assert_close(zero.apply(features[None], features=True)[0, 0], features.mean(0))


def test_nothing_dropped_leaves_everything_as_it_is() -> None:
    features = torch.randn(12, 3)
    selection = first_cut([contexts.image(3, 4)], [12], [torch.rand(12)], [features], 1.0, 4.0)
    assert selection.anchors().tolist() == [list(range(12))]
    assert torch.equal(selection.apply(features[None], features=True)[0], features)


def test_videos_and_one_view_images_with_company_are_not_recycled() -> None:
    importance, features = [torch.rand(13), torch.rand(13)], [torch.randn(13, 2)] * 2
    video = [contexts.frames(2, 2, 3)] * 2
    selection = first_cut(video, [13, 13], importance, features, 0.4, 2.0, newlines=((Newline(12, 0),),) * 2)
    assert selection.synthetic is None and selection.out_counts() == (13 - round(13 * 0.6),) * 2
    pictures = [contexts.image(1, 13), contexts.image(1, 13)]
    together = first_cut(pictures, [13, 13], importance, features, 0.4, 2.0, sample=(0, 0))
    assert together.synthetic is None and together.out_counts() == (5, 5)
    best = [sorted(values.topk(5).indices.tolist()) for values in importance]
    assert contexts.kept_tokens(together) == best
    assert first_cut(pictures, [13, 13], importance, features, 0.4, 2.0, sample=(0, 1)).synthetic is not None


def test_without_a_the_cells_are_half_a_view() -> None:
    tokens = torch.randn(36, 2)
    policy = Given(keep=0.4, values=[torch.rand(36)])
    context = contexts.post_encoder([contexts.image(6, 6)], 0.4, {Projected(): [tokens]})
    share = policy.settings_of(0.4, contexts.LLAVA).r1
    explicit = replace(policy, a=3.0)
    assert torch.equal(policy.select(context).anchors(), explicit.select(context).anchors())
    selection = policy.select(context)
    assert selection.kept is not None and selection.kept.shape[1] == 36 - round(36 * (1 - share)) - 4


# ---- the cuts inside the LLM


def decide(policy: VFlowOpt, layer: int, importance: list[list[float]], **carry: Tensor) -> list[list[int]]:
    rows = [torch.tensor(row, dtype=torch.float64) for row in importance]
    context = contexts.decoder([len(row) for row in rows], layer, {}, keep=policy.keep)
    context = replace(context, carry={IMPORTANCE: contexts.pad(rows), **carry})
    return contexts.kept_tokens(policy.select(context))


def test_inner_cuts_drop_the_least_important() -> None:
    policy = VFlowOpt(keep=0.4, r1=0.6, r2=0.7)
    _, second, third = policy.requests(contexts.LLAVA)
    assert (second.layer, third.layer) == (10, 20)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.rand(n, generator=generator).tolist() for n in (20, 13)]
    r3 = policy.settings_of(0.4, contexts.LLAVA).r3
    for layer, share in ((10, 0.7), (20, r3)):
        for row, kept in zip(rows, decide(policy, layer, rows), strict=True):
            count = len(row) - round(len(row) * (1 - share))
            assert kept == sorted(sorted(range(len(row)), key=lambda i: -row[i])[:count])
    # Nested, and a matter of importance alone: the two cuts leave the most important of all.
    second_left = decide(policy, 10, rows[:1])[0]
    third_left = [second_left[i] for i in decide(policy, 20, [[rows[0][i] for i in second_left]])[0]]
    assert third_left == sorted(sorted(range(20), key=lambda i: -rows[0][i])[: len(third_left)])


def test_halves_are_rounded_to_the_even_side_and_one_token_stays() -> None:
    policy = VFlowOpt(keep=mean_retention(1.0, 0.5, 0.001, PARTS), r1=1.0, r2=0.5, r3=0.001)
    row = [float(i) for i in range(15)]
    assert len(decide(policy, 10, [row])[0]) == 15 - 8
    assert decide(policy, 20, [row]) == [[14]]


def test_inner_cuts_without_importance() -> None:
    context = contexts.decoder([4], 10, {}, keep=0.3)
    with pytest.raises(SignalError, match="first cut carries"):
        VFlowOpt(keep=0.3).select(context)
    assert VFlowOpt(keep=9).select(replace(context, budget=Budget.parse(9))).out_counts() == (4,)


def test_a_number_of_tokens_is_a_mean_over_layers() -> None:
    """Images of different sizes: their shares differ, and each sample loses what its images lose together."""
    views = [contexts.image(4, 10), contexts.image(2, 10), contexts.image(1, 8)]
    values = [torch.rand(n) for n in (40, 20, 8)]
    features = [torch.randn(n, 2) for n in (40, 20, 8)]
    policy = Given(keep=10, preset="released", a=100.0, values=values)
    context = contexts.post_encoder(views, 10, {Projected(): features}, sample=(0, 0, 1))
    selection = policy.select(context)
    settings = [policy.settings_of(share, contexts.LLAVA) for share in (0.25, 0.5)]
    assert settings[0].r1 == RELEASED[0.25].r1 and settings[1].r1 == RELEASED[0.5].r1
    counts = [n - round(n * (1 - s.r1)) for n, s in zip((40, 20), settings, strict=True)]
    assert selection.out_counts() == (*counts, 8)  # the third has fewer than ten tokens
    for name in ("r2", "r3"):
        carried = selection.apply(selection.carry[f"vflowopt.{name}"])
        assert carried[:, 0].tolist() == [*(getattr(s, name) for s in settings), 1.0]
    left = torch.cat([selection.apply(selection.carry["vflowopt.r3"])[i, :n] for i, n in enumerate(counts)])
    lost = sum(n * (1 - s.r3) for n, s in zip(counts, settings, strict=True))
    kept = decide(VFlowOpt(keep=10), 20, [torch.rand(sum(counts)).tolist()], **{"vflowopt.r3": left[None]})
    assert len(kept[0]) == sum(counts) - round(lost)


def test_per_image_budgets_reach_the_inner_cuts() -> None:
    policy = PerImageBudget(VFlowOpt(keep=0.5), keep=0.3)
    assert policy.newlines == "compete" and PerImageBudget("uniform").newlines == "rows"
    context = contexts.post_encoder(
        [contexts.image(4, 5)] * 2,
        0.3,
        contexts.random_signals(policy.inner, [contexts.image(4, 5)] * 2),
        sample=(0, 0),
    )
    selection = policy.select(context)
    assert set(selection.carry) == {IMPORTANCE, "vflowopt.r2", "vflowopt.r3"}


# ---- configurations


ONEVISION = replace(contexts.LLAVA, family="llava_onevision", text_depth=28)  # LLaVA-OneVision-7B


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.1])
def test_released_configurations(keep: float) -> None:
    released = RELEASED[keep]
    assert VFlowOpt(keep=keep).settings_of(keep, ONEVISION) == released
    # The released numbers agree with the budget equation to half a percent.
    assert mean_retention(released.r1, released.r2, released.r3, (9, 9, 10)) == pytest.approx(keep, abs=0.005)
    for info in (contexts.LLAVA, replace(ONEVISION, text_depth=24), replace(ONEVISION, family="qwen")):
        assert VFlowOpt(keep=keep).settings_of(keep, info).t == 1.0
    assert VFlowOpt(keep=keep, preset="none").settings_of(keep, ONEVISION).t == 1.0
    elsewhere = VFlowOpt(keep=keep, preset="released").settings_of(keep, contexts.LLAVA)
    assert replace(elsewhere, r3=None) == replace(released, r3=None)
    assert mean_retention(elsewhere.r1, elsewhere.r2, elsewhere.r3, PARTS) == pytest.approx(keep, abs=1e-9)


@pytest.mark.parametrize("keep", [0.9, 0.33, 0.05])
@pytest.mark.parametrize("depth", [28, 4])
def test_other_budgets_cut_by_equal_shares(keep: float, depth: int) -> None:
    info = replace(ONEVISION, text_depth=depth)
    policy = VFlowOpt(keep=keep, preset="released")
    found = policy.settings_of(keep, info)
    assert found.r1 == found.r2 == found.r3
    assert mean_retention(found.r1, found.r2, found.r3, policy.parts(info)) == pytest.approx(keep, abs=1e-9)
    assert (found.t, found.a, found.alpha) == (1.0, None, 0.0)


def test_given_values_replace_those_of_the_configuration() -> None:
    found = VFlowOpt(keep=0.25, r1=0.3, t=2.0).settings_of(0.25, ONEVISION)
    assert (found.r1, found.t, found.a) == (0.3, 2.0, RELEASED[0.25].a)
    assert mean_retention(found.r1, found.r2, found.r3, (9, 9, 10)) == pytest.approx(0.25, abs=1e-9)
    assert VFlowOpt(keep=0.25, t=2.0).settings_of(0.25, ONEVISION).r3 == RELEASED[0.25].r3
    # Above 1, R3 is 1 and the retention below the target.
    clipped = VFlowOpt(keep=0.25, r1=0.26, r2=0.6).settings_of(0.25, ONEVISION)
    assert clipped.r3 == 1.0 and mean_retention(0.26, 0.6, 1.0, (9, 9, 10)) < 0.25
    assert solve_r3(0.25, 0.9, 1.0, (9, 9, 10)) == (1e-6, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.25, "r1": 0.9}, "alone keep more than 0.25"),
        ({"keep": 0.25, "r1": 0.5, "r2": 0.5, "r3": 0.5}, "keep 0.2812 of the tokens.*not 0.25; give keep=0.2812"),
        ({"keep": 0.25, "layers": (9, 9)}, "do not increase"),
        ({"keep": 0.25, "layers": (0, 9)}, "layer from 1"),
        ({"keep": 0.25, "layers": (9, 32)}, "out of range"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VFlowOpt(**settings).requests(contexts.LLAVA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r1": 0.0}, "r1=0.0 is out of range"),
        ({"r2": 1.5}, "r2=1.5 is out of range"),
        ({"t": -1.0}, "t=-1.0 is out of range"),
        ({"preset": "best"}, "preset='best' is unknown"),
        ({"a": 0.0}, "a=0.0 is out of range"),
        ({"r1": 0.5}, "keep=1.0 keeps them all"),
        ({"keep": 5, "r3": 0.5}, "goes with one share"),
        ({"keep": [0.5, 0.25], "artefact": "x.json"}, "one share of every image"),
        ({"keep": 0.5, "artefact": "missing.json"}, "'missing.json' does not exist"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VFlowOpt(**settings)


@pytest.mark.parametrize(("depth", "layers"), [(28, (9, 18)), (32, (10, 20)), (40, (13, 26)), (6, (2, 4)), (4, (1, 3))])
def test_layers_of_the_inner_cuts(depth: int, layers: tuple[int, int]) -> None:
    info = replace(contexts.LLAVA, text_depth=depth)
    requests = VFlowOpt(keep=0.25).requests(info)
    assert [request.site for request in requests] == [Site.POST_ENCODER, Site.DECODER_LAYER, Site.DECODER_LAYER]
    assert tuple(request.layer for request in requests[1:]) == layers
    assert [request.positions for request in requests] == ["compact", "keep", "keep"]
    assert VFlowOpt(keep=1.0).requests(info) == ()


# ---- the search


def test_proposals_lie_inside_the_official_bounds() -> None:
    info = replace(contexts.LLAVA, text_depth=28, signals=contexts.LLAVA.signals | {Pixels})
    search = VFlowOpt(keep=0.25).calibration(info, calls=8, seed=0)
    assert search.search.bounds == {  # type: ignore[attr-defined]
        "r1": (0.25, 0.375),
        "r2": (pytest.approx(0.2 / 0.375), 1.0),
        "t": (0.0, 50.0),
        "a": (3.0, 24.0),
        "alpha": (-1.0, 1.0),
    }
    for _ in range(8):
        proposed = search.propose()
        assert proposed is not None and "r3" not in proposed
        trial = replace(VFlowOpt(keep=0.25), **proposed)
        assert trial.requests(info)
        search.update(proposed, {"objective": -abs(proposed["t"] - 30)})
    assert search.propose() is None
    best = search.result()
    settings = best["best"]
    assert best["value"] == -abs(settings["t"] - 30)
    assert settings["r3"] == solve_r3(0.25, settings["r1"], settings["r2"], (9, 9, 10))[0]


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("depth", [4, 6, 32])
def test_every_point_inside_the_bounds_is_feasible(keep: float, depth: int) -> None:
    info = replace(contexts.LLAVA, text_depth=depth)
    policy = VFlowOpt(keep=keep)
    bounds = policy.calibration(info, calls=1).search.bounds  # type: ignore[attr-defined]
    for r1 in bounds["r1"]:
        for r2 in bounds["r2"]:
            assert replace(policy, r1=r1, r2=r2).settings_of(keep, info).r3 > 0


def test_given_values_are_not_searched() -> None:
    search = VFlowOpt(keep=0.25, t=3.0, alpha=0.0).calibration(contexts.LLAVA, calls=2)
    proposed = search.propose()
    assert proposed is not None and proposed["t"] == 3.0 and proposed["alpha"] == 0.0
    assert set(search.search.bounds) == {"r1", "r2", "a"}  # type: ignore[attr-defined]
    # Without pixels there is no entropy to weigh.
    assert "alpha" not in VFlowOpt(keep=0.25).calibration(contexts.LLAVA, calls=2).search.bounds  # type: ignore[attr-defined]
    assert search.result() == {}


@pytest.mark.parametrize("settings", [{"keep": 1.0}, {"keep": 10}, {"keep": 0.25, "r1": 0.25, "r2": 1.0, "r3": 1.0}])
def test_what_cannot_be_searched(settings: dict[str, Any]) -> None:
    with pytest.raises((BudgetError, InputError)):
        VFlowOpt(**settings).calibration(contexts.LLAVA)
