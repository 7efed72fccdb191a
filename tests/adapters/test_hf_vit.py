"""ToMe and dropping inside transformers' image models equal their definitions, written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from explicit_tome import Image, run_block, unmerged
from hf_vit_models import (
    CLASSES,
    DEPTH,
    PATCHES,
    WIDTH,
    answer,
    call,
    embedded,
    hf_blocks,
    hf_model,
    last_state,
    pictures,
    pooled,
    prefix_of,
    tower,
)
from model_state import model_state
from torch import Tensor, nn
from tower_policies import KeepPatches, MergeEach, Untouched

import vlmprune
from vlmprune.core.errors import UnsupportedError
from vlmprune.policies.tome import ToMe

R = (2, 2, 2)
SEEN = pictures()
KEPT = ((0, 3, 5, 10, 15), (1, 2, 6, 8, 9, 14))
TOWERS = (
    *("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "ViTModel", "DeiTModel"),
    *("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def explicit(model: nn.Module, r: tuple[int, ...]) -> tuple[list[Image], list[Tensor]]:
    """The images behind all blocks, and the full states behind each of them."""
    states = embedded(model, lambda: call(model, SEEN))
    images, noted = [Image(s, [[t] for t in range(len(s))]) for s in states], [states]
    for block, number in zip(hf_blocks(model, SEEN), r, strict=True):
        images = [run_block(block, image, number, prefix_of(model)) for image in images]
        noted.append(torch.stack([unmerged(image) for image in images]))
    return images, noted


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_tome_identity_and_removal(name: str) -> None:
    model = hf_model(name)
    dense, before = answer(model, SEEN), model_state(model)
    close(pooled(model, explicit(model, (0,) * DEPTH)[1][-1]), dense)
    images, noted = explicit(model, R)
    wanted = pooled(model, noted[-1])
    assert (wanted - dense).abs().max() > 1e-3
    for place in ("middle", "before"):
        with vlmprune.applied(model, Untouched(place=place)), pytest.warns(UserWarning, match="nothing was reduced"):
            assert torch.equal(answer(model, SEEN), dense)
    handle = vlmprune.apply(model, "tome", r=2)
    close(answer(model, SEEN), wanted)
    report, prefix = handle.last, prefix_of(model)
    assert handle.info.model_class == name and handle.info.prefix_tokens == prefix
    assert report.kept_tokens == (PATCHES - sum(R),) * 2
    for sample, image in enumerate(images):
        assert report.groups(sample) == [sorted(m - prefix for m in members) for members in image.members[prefix:]]
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(answer(model, SEEN), dense) and model_state(model) == before
    close(answer(twin, SEEN), wanted)
    half = twin.bfloat16()
    found = answer(half, SEEN.bfloat16())
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    with vlmprune.applied(model, ToMe(r=R), restore_length=False):
        close(answer(model, SEEN), wanted)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_states(name: str) -> None:
    model = hf_model(name)
    _, noted = explicit(model, R)
    dense = call(model, SEEN, output_hidden_states=True)
    assert all(torch.equal(a.to(b), b) for a, b in zip(noted[:1], dense.hidden_states[:1], strict=True))
    with vlmprune.applied(model, ToMe(r=R)):
        found = call(model, SEEN, output_hidden_states=True)
        close(found.last_hidden_state, last_state(model, noted[-1]))
        assert len(found.hidden_states) == len(dense.hidden_states) == DEPTH + 1
        for state, wanted in zip(found.hidden_states, noted, strict=True):
            close(state, wanted)
        parts = call(model, SEEN, output_hidden_states=True, return_dict=False)
        close(parts[0], found.last_hidden_state)
        for state, wanted in zip(parts[-1], noted, strict=True):
            close(state, wanted)
    with vlmprune.applied(model, ToMe(r=R), restore_length=False):
        short = call(model, SEEN, output_hidden_states=True)
        whole = PATCHES + prefix_of(model)
        assert [s.shape[1] for s in short.hidden_states] == [whole, whole - 2, whole - 4, whole - 6]
        assert short.last_hidden_state.shape == (2, whole - 6, WIDTH)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_dropped_patches_count_nowhere(name: str) -> None:
    model = hf_model(name)
    prefix, wanted, last = prefix_of(model), [], []
    blocks = hf_blocks(model, SEEN)
    for states, patches in zip(embedded(model, lambda: call(model, SEEN)), KEPT, strict=True):
        image = run_block(blocks[0], Image(states, [[t] for t in range(len(states))]), 0, prefix)
        kept = [*range(prefix), *(prefix + patch for patch in patches)]
        image = Image(image.states[kept], [[t] for t in kept])
        for block in blocks[1:]:
            image = run_block(block, image, 0, prefix)
        wanted.append(pooled(model, image.states[None]))
        full = states.new_zeros(len(states), WIDTH)
        full[kept] = last_state(model, image.states[None])[0]
        last.append(full)
    for whole in (True, False):
        with vlmprune.applied(model, KeepPatches(kept=KEPT), restore_length=whole):
            close(answer(model, SEEN), torch.cat(wanted))
    equal = tuple(patches[:5] for patches in KEPT)
    with vlmprune.applied(model, KeepPatches(kept=equal)):
        both = answer(model, SEEN)
        close(
            torch.cat([*(_alone(model, picture, patches) for picture, patches in zip(SEEN, equal, strict=True))]), both
        )
    if name in TOWERS:
        with vlmprune.applied(model, KeepPatches(kept=KEPT)):
            close(call(model, SEEN).last_hidden_state, torch.stack(last))


def _alone(model: nn.Module, picture: Tensor, patches: tuple[int, ...]) -> Tensor:
    twin = hf_model(type(model).__name__)
    with vlmprune.applied(twin, KeepPatches(kept=(patches,))):
        return answer(twin, picture[None])


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_different_numbers_per_image(name: str) -> None:
    model, seen, numbers = hf_model(name), pictures(3), (1, 4, 2)
    singles = []
    for picture, r in zip(seen, numbers, strict=True):
        with vlmprune.applied(model, MergeEach(r=(r,))):
            singles.append(answer(model, picture[None]))
    with vlmprune.applied(model, MergeEach(r=numbers)):
        close(answer(model, seen), torch.cat(singles))


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", *(n for n in CLASSES if "Classification" in n)])
@torch.no_grad()
def test_states_of_models_around_a_tower(name: str) -> None:
    """Logits do not depend on the length that hidden states have."""
    model = hf_model(name)
    _, noted = explicit(model, R)
    for whole in (True, False):
        with vlmprune.applied(model, ToMe(r=R), restore_length=whole):
            found = call(model, SEEN, output_hidden_states=True)
            close(answer(model, SEEN), pooled(model, noted[-1]))
            if whole:
                for state, wanted in zip(found.hidden_states, noted, strict=True):
                    close(state, wanted)
            else:
                assert [s.shape[1] - prefix_of(model) for s in found.hidden_states] == [16, 14, 12, 10]


@pytest.mark.parametrize("name", ["CLIPVisionModel", "ViTModel", "Dinov2Model", "DINOv3ViTModel", "Siglip2VisionModel"])
@torch.no_grad()
def test_eager_attention(name: str) -> None:
    model = hf_model(name, torch.float32)
    with vlmprune.applied(model, MergeEach(r=(1, 3))):
        fused = answer(model, SEEN.float())
    model.set_attn_implementation("eager")
    with vlmprune.applied(model, MergeEach(r=(1, 3))):
        torch.testing.assert_close(answer(model, SEEN.float()), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
@torch.no_grad()
def test_text_keeps_every_bit(name: str) -> None:
    model = hf_model(name, torch.float32)
    text = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2], [9, 8, 7, 6, 5, 4, 3, 2]])}
    dense = _features(model.get_text_features(**text))
    both = {} if name == "Siglip2Model" else {"pixel_values": SEEN.float(), **text}
    embeds = model(**both).text_embeds if both else None
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        assert torch.equal(_features(model.get_text_features(**text)), dense) and handle.last is None
        image = answer(model, SEEN.float())
        if both:
            found = model(**both)
            torch.testing.assert_close(found.image_embeds, image / image.norm(dim=-1, keepdim=True))
            assert torch.equal(found.text_embeds, embeds)


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2Model"])
@torch.no_grad()
def test_padded_patches(name: str) -> None:
    """Padding is never merged and counts nowhere: whatever stands there changes nothing."""
    model = hf_model(name)
    mask = torch.ones(2, PATCHES, dtype=torch.long)
    mask[1, 12:] = 0
    dense = answer(model, SEEN, mask)
    other = SEEN.clone()
    other[1, :, 24:] = 3.0  # the padded row of patches
    close(answer(model, other, mask), dense)
    with vlmprune.applied(model, Untouched()), pytest.warns(UserWarning, match="nothing was reduced"):
        assert torch.equal(answer(model, SEEN, mask), dense)
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        reduced = answer(model, SEEN, mask)
        close(answer(model, other, mask), reduced)
        assert [12] in handle.last.groups(1) and [15] in handle.last.groups(1)
        assert (reduced - dense).abs().max() > 1e-3
        close(reduced[:1], answer(model, SEEN[:1], mask[:1]))


def test_gradients_and_refused_calls() -> None:
    model = hf_model("ViTForImageClassification")
    with vlmprune.applied(model, ToMe(r=R)):
        model.train()
        answer(model, SEEN).square().sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "mask_token" not in n)
        model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
            answer(model, SEEN)
        with torch.no_grad():
            assert answer(model, SEEN).isfinite().all()
        with pytest.raises(UnsupportedError, match="attention_mask|head_mask"):
            tower(model)(SEEN, attention_mask=torch.ones(2, 17), head_mask=torch.ones(4))
