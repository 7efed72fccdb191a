"""What a plan inside the tower refuses, what reports say, where warnings come, and what draws depend on."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from eager_reference import blocks_of
from family_prompts import prefill
from family_runs import DEPTH
from llava_prompts import make_prompt, small_llava
from recording import Recording, Tape
from torch.utils.flop_counter import FlopCounterMode
from tower_plans import Planned, PlannedStep
from tower_runs import PLANS, TOWERS, feature_block, tower_batch, tower_model

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError, SignalError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Place, Site, SiteRequest
from vlmprune.embedded.random_models import random_vlm


@dataclass(frozen=True)
class Drawing(Policy):
    """Notes its seeds at some places, keeps every second token of a view, and draws nothing."""

    meta = PolicyMeta(title="seeds inside the tower, for tests")
    name = "drawing"

    blocks: tuple[int, ...] = (0, 1)
    place: Place = "before"
    seed: int = 0
    keep: Any = 0.5
    tape: Tape = field(default_factory=Tape, compare=False)

    def is_random(self, info: ModelInfo) -> bool:
        return True

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return tuple(SiteRequest(Site.VISION_BLOCK, block, place=self.place) for block in self.blocks)

    def select_vision_block(self, context: Context) -> Selection:
        self.tape.contexts.append(context)
        return Selection.keep_all(context.valid, context.lengths)


def seeds(policy: Drawing, name: str, prompt: Any, **arguments: Any) -> list[tuple[int, ...]]:
    """Per block the seeds of all views."""
    policy.tape.contexts.clear()
    with vlmprune.applied(tower_model(name), policy), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefill(tower_model(name), prompt)
    return [tuple(context.seeds or ()) for context in policy.tape.contexts]


@pytest.mark.parametrize("name", TOWERS)
def test_seeds_depend_on_policy_picture_and_block(name: str) -> None:
    prompt = tower_batch(name, (1, 1))
    first, second = seeds(Drawing(), name, prompt)
    assert len(set(first + second)) == len(first + second)  # all pictures differ
    alone = [seeds(Drawing(), name, prompt.row(row)) for row in (0, 1)]
    assert [alone[0][block] + alone[1][block] for block in (0, 1)] == [first, second]
    assert not {*first, *second} & set(sum(seeds(Drawing(seed=1), name, prompt), ()))
    changed = seeds(Drawing(), name, prompt.repainted(0))[0]
    assert changed[-1] == first[-1] and changed[0] != first[0]


@pytest.mark.parametrize("name", TOWERS)
def test_layers_behind_which_nothing_is_read_are_refused(name: str) -> None:
    last = feature_block(name)
    for block in (last + 1, -1, DEPTH):
        with pytest.raises(InputError, match=rf"'planned' acts at vision_block {block}.*give a block from 0 to {last}"):
            vlmprune.apply(tower_model(name), Planned(steps=(PlannedStep(block),)))
    vlmprune.apply(tower_model(name), Planned(steps=(PlannedStep(last),))).remove()


@pytest.mark.parametrize(
    ("first", "second", "served"),
    [
        (PlannedStep(1), PlannedStep(2, "before"), False),
        (PlannedStep(1), PlannedStep(1), False),
        (PlannedStep(2, "before"), PlannedStep(2, "before"), False),
        (PlannedStep(2, "before"), PlannedStep(2), True),
        (PlannedStep(2, "before"), PlannedStep(1, "before"), True),
        (PlannedStep(2, "before"), PlannedStep(1), False),
    ],
    ids=lambda value: f"{value.block}-{value.place}" if isinstance(value, PlannedStep) else str(value),
)
def test_signals_of_tokens_that_are_gone_are_refused(first: PlannedStep, second: PlannedStep, served: bool) -> None:
    model = small_llava("siglip")
    keys = tuple(s.KeyMean(block) for block in range(4))
    both = [Planned(steps=(step,), signals=keys) for step in (first, second)]
    if served:
        vlmprune.apply(model, both).remove()
        return
    with pytest.raises(InputError, match="reads the attention of tower block 1 after 'planned' reduced the tokens"):
        vlmprune.apply(model, both)
    if first.block <= second.block:  # without signals of its own the second one may follow
        vlmprune.apply(model, [both[0], Planned(steps=(second,))]).remove()


def test_one_numbering_for_all_policies_inside() -> None:
    keep, compact = (Planned(steps=(PlannedStep(b),), positions=p) for b, p in ((0, "keep"), (1, "compact")))
    with pytest.raises(InputError, match="ask for the positions 'keep'.* and 'compact'.*; give all of them the same"):
        vlmprune.apply(small_llava(), [keep, compact])


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_features_of_several_blocks_are_refused(name: str) -> None:
    model = random_vlm(name)
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UnsupportedError, match="joins the features of several blocks.*acts after the encoder"):
        vlmprune.apply(model, Planned(steps=PLANS["merge"]))
    vlmprune.apply(model, "uniform", keep=0.5).remove()


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_calls_that_choose_other_features_are_refused(name: str) -> None:
    model, prompt = tower_model(name), tower_batch(name, (1,))
    with (
        vlmprune.applied(model, Planned(steps=PLANS["merge"])),
        pytest.raises(UnsupportedError, match="vision_feature_layer=-3 differs from the model's config"),
    ):
        prefill(model, prompt, vision_feature_layer=-3)


def test_unknown_blocks_are_refused() -> None:
    model = small_llava()
    blocks_of(model)[2].__class__ = type("OtherLayer", (type(blocks_of(model)[2]),), {})
    with pytest.raises(UnsupportedError, match="a tower of OtherLayer blocks cannot be reduced; known blocks: CLIP"):
        vlmprune.apply(model, Planned(steps=PLANS["merge"]))


def test_images_encoded_before_the_policy_are_refused() -> None:
    model, prompt = small_llava(), make_prompt((1,))
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers encodes images inside the forward only")
    given = {"input_ids": prompt.ids, "attention_mask": prompt.real.long()}
    with torch.no_grad():
        early = model.model.get_image_features(pixel_values=prompt.pixels)
        with vlmprune.applied(model, Planned(steps=PLANS["merge"])):
            with pytest.raises(SignalError, match="encoded before the policy was applied.*Apply first, then encode"):
                model(**given, mm_encoder_outputs={"image": early})
            expected = model(**prompt.inputs).logits
            late = model.model.get_image_features(pixel_values=prompt.pixels)
            assert torch.equal(model(**given, mm_encoder_outputs={"image": late}).logits, expected)


def test_a_warning_where_nothing_is_reduced() -> None:
    model, prompt = tower_model("llava"), tower_batch("llava")
    with vlmprune.applied(model, Planned(steps=(PlannedStep(1, kind="keep"),))) as handle:
        with pytest.warns(UserWarning, match="planned: nothing was reduced with keep=0.5"):
            prefill(model, prompt)
        assert len(handle.last.warnings) == 1
        assert handle.last.tower_flops == handle.last.tower_flops_dense


@pytest.mark.filterwarnings("error")
def test_no_warning_where_only_the_tower_has_fewer_tokens() -> None:
    """Every token of a pooled video blends patches that were merged."""
    name = "llava_onevision"
    model, prompt = tower_model(name), tower_batch(name, (1,), video=True)
    with vlmprune.applied(model, "tome", r=1) as handle:
        prefill(model, prompt)
    assert handle.last.kept_tokens == handle.last.visual_tokens
    assert handle.last.tower_flops < handle.last.tower_flops_dense


@pytest.mark.parametrize("name", TOWERS)
def test_the_report_of_the_tower(name: str) -> None:
    """Tokens of every block, and FLOPs as PyTorch's counter sees them."""
    model, prompt = tower_model(name), tower_batch(name)
    steps = (PlannedStep(0, "middle"), PlannedStep(2, "before", "prune"))
    dense = counted(model, prompt)
    with vlmprune.applied(model, Planned(steps=steps)) as handle:
        reduced = counted(model, prompt)
        report = handle.last
    one, two = report.tower_sites
    assert (one.layer, two.layer) == (0, 2) and report.layers_used == {"planned": [0, 2]}
    views = len(one.lengths)
    assert one.tokens_out == two.tokens_in and one.samples == tuple(range(views))
    n0, n1, n2 = (sum(counts) / views for counts in (one.tokens_in, one.tokens_out, two.tokens_out))
    assert report.tower_attended == (n0, n1, n2, n2) and report.tower_passed == (n1, n1, n2, n2)
    assert report.tower_flops_dense == dense and report.tower_flops == reduced < dense
    written = report.summary()
    assert written["tower_flops"] == reduced and len(written["tower_sites"]) == 2
    [whole] = report.sites
    assert whole.site == Site.VISION_BLOCK and whole.layer == 2 and whole.milliseconds is not None
    assert report.kept_tokens_per_layer == (report.kept_tokens,) * 4


def counted(model: torch.nn.Module, prompt: Any) -> int:
    """FLOPs of all blocks of the tower in one forward over the prompt."""
    blocks = list(blocks_of(model))
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    with FlopCounterMode(display=False, depth=20) as counter:
        prefill(model, prompt)
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in names)


def test_images_and_videos_in_one_report() -> None:
    name = "llava_onevision"
    model, prompt = tower_model(name), tower_batch(name, (2, 0, 1), video=True)
    with vlmprune.applied(model, Planned(steps=(PlannedStep(1, ragged=True),))) as handle:
        prefill(model, prompt)
    images, videos = handle.last.tower_sites
    assert len(images.lengths) != len(videos.lengths)
    out = [*images.tokens_out, *videos.tokens_out]
    assert handle.last.tower_attended == (9.0, 9.0, *[pytest.approx(sum(out) / len(out))] * 2)
    assert images.tokens_in + videos.tokens_in == (9,) * len(out)


@dataclass(frozen=True)
class Numbering(Planned):
    """Hands on the number that each token had in the first block, where it stands."""

    def select_vision_block(self, context: Context) -> Selection:
        chosen = super().select_vision_block(context)
        if context.carry:
            return chosen
        return replace(chosen, carry={"number": torch.arange(context.width).expand_as(context.valid).double()})


@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_carried_values_follow_the_tokens(kind: Any) -> None:
    policy = Numbering(steps=(PlannedStep(0, kind=kind, ragged=True), PlannedStep(2, "before")))
    with vlmprune.applied(tower_model("internvl"), policy):
        prefill(tower_model("internvl"), tower_batch("internvl"))
    first, second = policy.tape.contexts
    assert not first.carry
    for view, n in enumerate(first.lengths):
        groups = policy.steps[0].groups(view, n, frozenset([0]))
        members = [[token for token, group in enumerate(groups) if group == place] for place in range(max(groups) + 1)]
        got = second.carry["number"][view, : second.lengths[view]].tolist()
        assert got == pytest.approx([sum(group) / len(group) for group in members])


def test_nothing_happens_outside_the_encoder() -> None:
    """The tower called by itself, and a model that is switched off for a moment."""
    model, prompt = tower_model("llava"), tower_batch("llava", (1,))
    pixels = prompt.vision["pixel_values"]
    tower = model.model.vision_tower
    with torch.no_grad():
        dense, logits = tower(pixels).last_hidden_state, prefill(model, prompt).logits
        with vlmprune.applied(model, [Planned(steps=PLANS["merge"]), Recording()]) as handle:
            assert torch.equal(tower(pixels).last_hidden_state, dense)
            with handle.disabled():
                assert torch.equal(prefill(model, prompt).logits, logits)
            assert not torch.equal(prefill(model, prompt).logits, logits)
