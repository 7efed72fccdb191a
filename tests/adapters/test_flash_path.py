"""With flash attention's calling convention a pruned model computes what it computes with SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_prompts import MAJOR, FamilyPrompt, decode, make_family_prompt, prefill
from fixed_policy import FixedGroups, FixedKeep
from imitated_flash import NAME, flash_imitated
from llava_prompts import pick_tokens
from recording import Recording
from torch import Tensor, nn
from virtual_reference import pick_groups

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import random_vlm

FAMILIES = ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]
TOWER = (s.ColumnMass("vision", 0), s.ColumnMass("vision", 3, "sum"), s.Keys("vision", 1))
TEXT = (s.GroupMass(1), s.AttentionRows("text", 1))


def run(model: nn.Module, prompt: FamilyPrompt, policy: Any) -> tuple[Tensor, Tensor]:
    """Logits of the prompt's kept tokens and of decoded ones."""
    forced = torch.randint(12, 40, (len(prompt.rows), 4), generator=torch.Generator().manual_seed(5))
    with vlmprune.applied(model, policy):
        out = prefill(model, prompt, use_cache=True)
        return out.logits, decode(model, prompt, out.past_key_values, forced)


BATCHES = pytest.mark.parametrize("images", [(1,), (2, 1, 0)], ids=["single", "mixed"])
"""One row without padding comes without a mask, and what its positions look like matters."""


@BATCHES
@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_logits_equal_those_of_sdpa(family: str, layer: int | None, images: tuple[int, ...]) -> None:
    if family == "qwen3_vl" and MAJOR < 5 and len(images) == 1:
        pytest.skip("transformers 4 hands flash attention positions in time, which look like packed sequences")
    prompt = make_family_prompt(family, images, len(images) > 1, torch.float64)
    site = Site.POST_ENCODER if layer is None else Site.DECODER_LAYER
    kept = pick_tokens(prompt.widths(site), ragged=True)
    policy = FixedKeep(kept=kept, site=site, layer=layer)
    model = random_vlm(family, dtype=torch.float64)
    expected, expected_steps = run(model, prompt, policy)
    dense = prefill(model, prompt).logits
    with flash_imitated(model):
        assert (prefill(model, prompt).logits - dense)[prompt.real].abs().max() < 1e-9  # the imitation is right
        got, steps = run(model, prompt, policy)
    stay = prompt.real & ~prompt.dropped(kept, site)
    assert (got - expected)[stay].abs().max() < 1e-9
    assert (steps - expected_steps).abs().max() < 1e-9


@BATCHES
@pytest.mark.parametrize("family", FAMILIES)
def test_unmerged_logits_equal_those_of_sdpa(family: str, images: tuple[int, ...]) -> None:
    """Merged tokens at all their places, and a cut that leaves gaps between these."""
    prompt = make_family_prompt(family, images, len(images) > 1, torch.float64)
    groups = pick_groups(prompt.widths())
    widths = [sum(len(set(names)) for names in groups[sum(images[:row]) :][:n]) for row, n in enumerate(images) if n]
    cut = FixedKeep(kept=pick_tokens(widths, ragged=True), site=Site.DECODER_LAYER, layer=2)
    model = random_vlm(family, dtype=torch.float64)
    for policy in (FixedGroups(kept=groups), [FixedGroups(kept=groups), cut]):
        expected, expected_steps = run(model, prompt, policy)
        with flash_imitated(model):
            got, steps = run(model, prompt, policy)
        stay = expected.abs().sum(-1) > 0  # zeros where no token is left
        assert (got - expected)[stay & prompt.real].abs().max() < 1e-9
        assert (steps - expected_steps).abs().max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_signals_equal_those_of_sdpa(family: str) -> None:
    """Packed towers hand over all segments in one call."""
    model = random_vlm(family)
    prompt = make_family_prompt(family, (2, 1), True)
    for wanted, site, layer in ((TOWER, Site.POST_ENCODER, None), (TEXT, Site.DECODER_LAYER, 2)):
        tapes = [Recording(wanted=wanted, site=site, layer=layer) for _ in range(2)]
        with vlmprune.applied(model, tapes[0]):
            prefill(model, prompt)
        with flash_imitated(model), vlmprune.applied(model, tapes[1]):
            prefill(model, prompt)
        for signal in wanted:
            expected, got = (tape.tape.last.signal(signal) for tape in tapes)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_changing_from_flash_while_applied_is_refused() -> None:
    model = random_vlm("qwen2_5_vl")
    prompt = make_family_prompt("qwen2_5_vl")
    with flash_imitated(model), vlmprune.applied(model, "hiprune", keep=0.5):
        for module in model.modules():
            if hasattr(module, "config") and module.config._attn_implementation == NAME:
                module.config._attn_implementation_internal = "sdpa"
        if MAJOR < 5:  # towers of transformers 4 hand over segment by segment unless the name is the package's
            assert torch.isfinite(prefill(model, prompt).logits).all()
            return
        with pytest.raises(UnsupportedError, match="changed from flash.*apply again"):
            prefill(model, prompt)
