"""The report's decoder FLOPs equal what PyTorch's counter sees in the decoder layers, layer by layer."""

from __future__ import annotations

import pytest
import torch
from family_prompts import make_family_prompt, prefill
from fixed_policy import FixedGroups, FixedKeep
from llava_prompts import pick_tokens
from torch.utils.flop_counter import FlopCounterMode
from virtual_reference import pick_groups

import vlmprune
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import FAMILIES, random_vlm


def counted(model: torch.nn.Module, prompt: object) -> int:
    """FLOPs of all decoder layers in one forward over the prompt."""
    base = model.model
    text = getattr(base, "language_model", None) or base.text_model
    name = next(name for name, module in model.named_modules() if module is text)
    with FlopCounterMode(display=False, depth=20) as counter:
        prefill(model, prompt)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    return sum(sum(counts[f"{root}.{name}.layers.{i}"].values()) for i in range(len(text.layers)))


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_formula_equals_counter(family: str, layer: int | None) -> None:
    model = random_vlm(family)
    prompt = make_family_prompt(family, (1, 1), padded=True)
    site = Site.POST_ENCODER if layer is None else Site.DECODER_LAYER
    kept = pick_tokens(prompt.widths(site))
    dense = counted(model, prompt)
    with vlmprune.applied(model, FixedKeep(kept=kept, site=site, layer=layer)) as handle:
        pruned = counted(model, prompt)
        report = handle.last
    assert report.decoder_flops_dense == dense
    assert report.decoder_flops == pruned < dense
    assert report.summary()["decoder_flops"] == pruned
    depth = handle.info.text_depth
    expected = [prompt.length] * (layer or 0) + [max(report.lengths_per_layer[layer or 0 :])] * (depth - (layer or 0))
    assert list(report.lengths_per_layer) == expected


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_over_places_is_counted(family: str, cut: bool) -> None:
    """Linear layers work on merged tokens, attention on all their places."""
    model, prompt = random_vlm(family), make_family_prompt(family, (1, 1), padded=True)
    policies: list[Policy] = [FixedGroups(kept=pick_groups(prompt.widths()))]
    if cut:
        widths = [len(set(names)) for names in policies[0].kept]
        policies.append(FixedKeep(kept=pick_tokens(widths), site=Site.DECODER_LAYER, layer=2))
    with vlmprune.applied(model, policies) as handle:
        merged = counted(model, prompt)
    assert handle.last.decoder_flops == merged < handle.last.decoder_flops_dense
    assert handle.last.lengths_per_layer[0] < prompt.length
