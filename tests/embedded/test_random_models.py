"""Random-weight models and the prompts of tests: dense runs are right before anything is pruned."""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, decode, make_family_prompt, prefill
from prompt_styles import STYLES
from torch import nn

from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import FAMILIES, random_vlm

MIXED = (2, 1, 0)
ROWS = Site.DECODER_LAYER
VIDEO_FAMILIES = [family for family, style in STYLES.items() if style.video is not None]


def generated(model: nn.Module, prompt: FamilyPrompt, **mode: Any) -> Any:
    """Five greedy tokens and the logits that led to them."""
    with torch.no_grad():
        return model.generate(
            **prompt.inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **mode,
        )


def feature_counts(model: nn.Module, prompt: FamilyPrompt) -> list[int]:
    """Lengths of the features that the model makes: per image, per view, or per row, as the family has it."""
    found: list[int] = []
    vision = prompt.vision
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in vision:
            features = getattr(model.model, f"get_{name}_features")
            taken = inspect.signature(features).parameters
            given = {key: value for key, value in vision.items() if key != pixels and key in taken}
            with torch.no_grad():
                out = features(vision[pixels], **given)
            out = getattr(out, "pooler_output", out)
            found += [len(one) for one in (out[0] if isinstance(out[0], (tuple, list)) else out)]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_equal_single_runs(family: str, dtype: torch.dtype) -> None:
    model = random_vlm(family, dtype=dtype)
    prompt = make_family_prompt(family, MIXED, padded=True, dtype=dtype)
    check_rows(model, prompt, 1e-9 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_too(family: str) -> None:
    model = random_vlm(family, dtype=torch.float64)
    check_rows(model, make_family_prompt(family, MIXED, padded=True, dtype=torch.float64, video=True), 1e-9)


def check_rows(model: nn.Module, prompt: FamilyPrompt, tolerance: float) -> None:
    """Prefill and forced decode of a batch equal those of its rows; ``generate`` sees the same logits."""
    out = prefill(model, prompt, use_cache=True)
    greedy = generated(model, prompt)
    new = greedy.sequences[:, prompt.length :]
    assert new.shape == (len(prompt.rows), 5)
    steps = decode(model, prompt, out.past_key_values, new)
    logits = torch.cat([out.logits[:, -1:], steps], 1)
    seen = torch.stack(greedy.logits, 1)
    scale = max(1.0, float(seen.abs().max()))
    assert (seen - logits[:, :5]).abs().max() <= max(tolerance, 1e-6) * scale  # generate keeps them in float32
    for index in range(len(prompt.rows)):
        row = prompt.row(index)
        alone = prefill(model, row, use_cache=True)
        real = prompt.real[index]
        assert torch.isfinite(alone.logits).all()
        assert (out.logits[index][real] - alone.logits[0]).abs().max() <= tolerance * scale
        rest = decode(model, row, alone.past_key_values, new[index : index + 1])
        assert (steps[index] - rest[0]).abs().max() <= tolerance * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_gives_the_same(family: str) -> None:
    prompt = make_family_prompt(family, (1, 2), padded=True)
    real = prompt.real
    one, two = (prefill(random_vlm(family, attn_implementation=name), prompt).logits for name in ("sdpa", "eager"))
    assert (one[real] - two[real]).abs().max() <= 2e-4 * max(1.0, float(one[real].abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_placeholder_is_filled_with_a_feature(family: str) -> None:
    model = random_vlm(family)
    prompt = make_family_prompt(family, MIXED)
    ends, images, rows = (
        set(accumulate(count)) for count in (feature_counts(model, prompt), prompt.widths(), prompt.widths(ROWS))
    )
    assert max(ends) == max(images)
    assert ends >= (images if len(ends) >= len(images) else rows)
    views = [r * c for row in prompt.rows for part in row.parts for r, c in part.grids]
    newlines = sum(len(part.newlines) for row in prompt.rows for part in row.parts)
    assert sum(views) + newlines == max(images)
    found = prompt.kinds.bool()
    for row, images in enumerate(prompt.places()):
        assert found[row].nonzero()[:, 0].tolist() == sorted(sum(images, []))


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_change_what_follows_them(family: str) -> None:
    model = random_vlm(family)
    prompt = make_family_prompt(family, (1, 1))
    inputs = prompt.inputs
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        before, after = (model(**given).logits[:, -1] for given in (inputs, other))
    assert ((before - after).abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_weights_and_spares_the_global_generator(family: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (dict(random_vlm(family, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        random_vlm("fuyu")
