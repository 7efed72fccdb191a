"""VFlowOpt on real models: recycled tokens reach the decoder, newlines survive, tokens per layer follow the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from family_prompts import make_family_prompt
from prompt_runs import prefill
from torch import Tensor, nn

import vlmprune
from vlmprune.core.context import Context
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Projected
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import random_vlm
from vlmprune.policies.vflowopt import NO_PATCH, VFlowOpt


@dataclass(frozen=True)
class Watched(VFlowOpt):
    """VFlowOpt that notes its contexts."""

    seen: list[tuple[Context, Selection]] = field(default_factory=list, compare=False)

    def select(self, context: Context) -> Selection:
        selection = super().select(context)
        self.seen.append((context, selection))
        return selection


def text_model_input(model: nn.Module) -> list[Tensor]:
    """Embeddings that enter the decoder in the next forwards, behind all hooks so far."""
    seen: list[Tensor] = []

    def spy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_recycled_tokens_stand_in_a_shorter_prompt(family: str) -> None:
    """R2 = R3 = 1: the dense decoder on the text and the tokens that the first cut leaves, numbered anew."""
    model, prompt = random_vlm(family, dtype=torch.float64), make_family_prompt(family, (1,), dtype=torch.float64)
    dense_embeds = text_model_input(model)
    prefill(model, prompt)
    [[places]] = prompt.places()
    policy = Watched(keep=0.4, r1=0.4, r2=1.0, r3=1.0, t=1.0, a=2.0)
    with vlmprune.applied(model, policy) as handle:
        logits = prefill(model, prompt).logits[0, -1]
        context, selection = policy.seen[0]
        assert handle.last.sites[0].tokens_out == selection.out_counts()
    made = selection.synthetic
    assert made is not None and (made.sources > 0).sum() > made.place.numel()
    tokens = dense_embeds[0][0, places]
    assert torch.equal(context.signal(Projected())[0], tokens)
    merged = selection.source_map().weights[0].double() @ tokens
    left = selection.anchors()[0].tolist()
    embeds = dense_embeds[0].clone()
    embeds[0, [places[i] for i in left]] = merged
    gone = {place for i, place in enumerate(places) if i not in left}
    short = embeds[:, [i for i in range(prompt.length) if i not in gone]]
    with torch.no_grad():
        states = model.model.language_model(inputs_embeds=short).last_hidden_state
        expected = model.lm_head(states[0, -1])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_survive_and_are_part_of_the_canvas(family: str) -> None:
    model, prompt = random_vlm(family), make_family_prompt(family, (1,), sizes=((20, 40),))
    policy = Watched(keep=0.6, t=1.0)
    with vlmprune.applied(model, policy):
        prefill(model, prompt)
    context, selection = policy.seen[0]
    places = {line.place for line in context.newlines[0]}
    assert len(places) > 1 and context.pinned is None
    importance = selection.scores
    assert importance is not None and importance[0, sorted(places)].tolist() == [1.0] * len(places)
    others = [i for i in range(context.lengths[0]) if i not in places]
    assert float(importance[0, others].max()) < 1
    assert places <= set(selection.anchors()[0].tolist())


PROMPTS = [
    ("llava", (2, 1), False),
    ("qwen2_5_vl", (2,), False),
    ("qwen2_5_vl", (1,), True),
    ("llava_onevision", (1,), True),
]


@pytest.mark.parametrize(("family", "images", "video"), PROMPTS)
def test_tokens_per_layer_follow_the_budget(family: str, images: tuple[int, ...], video: bool) -> None:
    """Layer by layer what the cuts say, and in the mean over layers ``keep``. Only a lone image is recycled, here into
    one more token."""
    model = random_vlm(family, text_layers=6)
    prompt = make_family_prompt(family, images, padded=len(images) > 1, video=video)
    policy = Watched(keep=0.45, t=1.0, a=100.0)
    with vlmprune.applied(model, policy) as handle:
        prefill(model, prompt, use_cache=True)
        report = handle.last
    settings = policy.settings_of(0.45, handle.info)
    for row, lengths in enumerate([len(tokens) for tokens in parts] for parts in prompt.places()):
        left = [n - round(n * (1 - settings.r1)) for n in lengths]
        first = sum(left) + (len(lengths) == 1 and not video)
        second = first - round(first * (1 - settings.r2))
        third = second - round(second * (1 - settings.r3))
        counts = [per_row[row] for per_row in report.kept_tokens_per_layer]
        assert counts == [first] * 2 + [second] * 2 + [third] * 2
        total = sum(lengths)
        assert sum(counts) / 6 / total == pytest.approx(0.45, abs=1.5 * (1 + len(lengths)) / total)
    positions = "keep" if handle.info.mrope else "compact"
    assert [(site.site, site.layer, site.positions) for site in report.sites] == [
        (Site.POST_ENCODER, None, positions),
        (Site.DECODER_LAYER, 2, "keep"),
        (Site.DECODER_LAYER, 4, "keep"),
    ]
    assert report.warnings == []


def test_the_report_tells_of_an_empty_set() -> None:
    model, prompt = random_vlm("llava"), make_family_prompt("llava", (1,))
    with vlmprune.applied(model, "vflowopt", keep=0.25, t=1e6) as handle:
        prefill(model, prompt)
        assert handle.last.warnings == [NO_PATCH] == handle.last.warnings
    with vlmprune.applied(model, "vflowopt", keep=0.25, t=0.5) as handle:
        prefill(model, prompt)
        assert handle.last.warnings == []
