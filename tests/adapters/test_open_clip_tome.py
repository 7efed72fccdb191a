"""ToMe on open_clip's towers equals its definition, written out in float64; retrieval and captions keep working."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("open_clip")

import open_clip
from clip_models import (
    DEPTH,
    PATCHES,
    VARIANTS,
    WIDTH,
    captions,
    clip_blocks,
    clip_features,
    clip_model,
    coca,
    timm_clip,
)
from explicit_tome import Image, run_block, run_blocks, timm_blocks, timm_embedded, timm_logits, unmerged
from model_state import model_state
from open_clip.model import CustomTextCLIP
from timm_models import images
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tower_policies import KeepPatches, MergeEach, Untouched

import vlmprune
from vlmprune.core.errors import ActiveError, InputError, SignalError, UnsupportedError
from vlmprune.core.flops import tower_flops
from vlmprune.policies.tome import ToMe

R = (3, 4, 2)
PICTURES = images(2, 64)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_features_sizes_and_sources(variant: str) -> None:
    model = clip_model(variant)
    tower = model.visual
    dense, before = model.encode_image(PICTURES), model_state(model)
    blocks, entering = clip_blocks(tower), tower._embeds(PICTURES)
    close(clip_features(tower, run_blocks(blocks, entering, (0,) * DEPTH, 1)), dense)
    expected = run_blocks(blocks, entering, R, 1)
    wanted = clip_features(tower, expected)
    assert (wanted - dense).abs().max() > 1e-2
    handle = vlmprune.apply(model, ToMe(r=R))
    close(model.encode_image(PICTURES), wanted)
    report = handle.last
    assert report.kept_tokens == (PATCHES - sum(R),) * 2
    for sample, image in enumerate(expected):
        assert report.groups(sample) == [sorted(m - 1 for m in members) for members in image.members[1:]]
    close(tower.forward_intermediates(PICTURES)["image_features"], wanted)
    with torch.enable_grad():  # PyTorch's shortcut for inference is off
        close(model.encode_image(PICTURES), wanted)
    handle.remove()
    assert torch.equal(model.encode_image(PICTURES), dense) and model_state(model) == before


@pytest.mark.parametrize("kind", [open_clip.model.CLIP, CustomTextCLIP])
@torch.no_grad()
def test_retrieval(kind: Any) -> None:
    """Text features keep every bit; scores are those of the reduced image features."""
    model, text = clip_model("tok", kind), captions()
    text_features = model.encode_text(text)
    expected = run_blocks(clip_blocks(model.visual), model.visual._embeds(PICTURES), R, 1)
    wanted = clip_features(model.visual, expected)
    scores = cosine_similarity(wanted[:, None], text_features[None], dim=2)
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        assert torch.equal(model.encode_text(text), text_features)
        assert handle.last is None
        image_features, again, scale = model(PICTURES, text)[:3]
        close(image_features @ again.T, scores)
        close(model.get_logits(PICTURES, text)[0], scale * scores)
        found = model.forward_intermediates(PICTURES, text, image_output_fmt="NLC")
        close(found["image_features"] @ found["text_features"].T, scores)
        assert [part.shape for part in found["image_intermediates"]] == [(2, PATCHES, WIDTH)] * DEPTH
        assert handle.info.model_class == kind.__name__


@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_intermediates(normalised: bool) -> None:
    model = clip_model("avg")
    tower, outputs = model.visual, []
    states = [Image(s, [[t] for t in range(len(s))]) for s in tower._embeds(PICTURES)]
    for block, r in zip(clip_blocks(tower), R, strict=True):
        states = [run_block(block, image, r, 1) for image in states]
        full = torch.stack([unmerged(image) for image in states])
        outputs.append(tower.ln_post(full) if normalised else full)
    with vlmprune.applied(tower, ToMe(r=R)):
        found = tower.forward_intermediates(
            PICTURES, indices=[0, 2], normalize_intermediates=normalised, output_extra_tokens=True
        )
        maps, front = found["image_intermediates"], found["image_intermediates_prefix"]
        for number, block in enumerate((0, 2)):
            close(maps[number].flatten(2).mT, outputs[block][:, 1:])
            close(front[number], outputs[block][:, :1])
        early = tower.forward_intermediates(PICTURES, indices=[1], stop_early=True, intermediates_only=True)
        assert early["image_intermediates"][0].shape == (2, WIDTH, 4, 4)
    with vlmprune.applied(tower, ToMe(r=R), restore_length=False):
        short = tower.forward_intermediates(PICTURES, output_fmt="NLC")
        close(short["image_features"], found["image_features"])
        assert [part.shape[1] for part in short["image_intermediates"]] == [13, 9, 7]
        with pytest.raises(InputError, match="NCHW"):
            tower.forward_intermediates(PICTURES)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dropped_patches_count_nowhere(variant: str) -> None:
    model, kept = clip_model(variant), ((0, 3, 5, 10, 15), (1, 2, 6, 8, 9, 14))
    tower = model.visual
    wanted = []
    for states, patches in zip(tower._embeds(PICTURES), kept, strict=True):
        blocks = clip_blocks(tower)
        image = run_block(blocks[0], Image(states, [[t] for t in range(len(states))]), 0, 1)
        image = Image(image.states[[0, *(1 + patch for patch in patches)]], [[t] for t in range(1 + len(patches))])
        for block in blocks[1:]:
            image = run_block(block, image, 0, 1)
        wanted.append(clip_features(tower, [image]))
    with vlmprune.applied(model, KeepPatches(kept=kept)):
        close(model.encode_image(PICTURES), torch.cat(wanted))
        close(tower.forward_intermediates(PICTURES)["image_features"], torch.cat(wanted))


@pytest.mark.parametrize("variant", ["tok", "avg", "attentional", "qk_norm"])
@torch.no_grad()
def test_different_numbers_per_image(variant: str) -> None:
    model, pictures, numbers = clip_model(variant), images(3, 64), (1, 4, 2)
    singles = []
    for picture, r in zip(pictures, numbers, strict=True):
        with vlmprune.applied(model, MergeEach(r=(r,))):
            singles.append(model.encode_image(picture[None]))
    with vlmprune.applied(model, MergeEach(r=numbers)):
        close(model.encode_image(pictures), torch.cat(singles))


@torch.no_grad()
def test_tokens_are_returned_in_full_length() -> None:
    for variant, pool in (("tok", "tok"), ("avg", "avg"), ("tok", "none")):
        model = clip_model(variant, output_tokens=True, pool_type=pool)
        tower = model.visual
        image = run_blocks(clip_blocks(tower), tower._embeds(PICTURES), R, 1)
        full = tower.ln_post(torch.stack([unmerged(i) for i in image]))
        with vlmprune.applied(model, ToMe(r=R)):
            pooled, tokens = tower(PICTURES)
            close(tokens, full if pool == "none" else full[:, 1:])
        with vlmprune.applied(model, ToMe(r=R), restore_length=False):
            short, few = tower(PICTURES)
            assert few.shape[1] == PATCHES - sum(R) + (pool == "none")
            if pool != "none":
                assert torch.equal(short, pooled)


@torch.no_grad()
def test_captions() -> None:
    model, text = coca(), captions(2)
    with vlmprune.applied(model, ToMe(r=R)):
        found = model(PICTURES, text)
        tower = model.visual
        expected = run_blocks(clip_blocks(tower), tower._embeds(PICTURES), R, 1)
        wanted = clip_features(tower, expected)
        close(found["image_features"], wanted / wanted.norm(dim=-1, keepdim=True))
        assert found["logits"].isfinite().all()


@torch.no_grad()
def test_towers_of_timm() -> None:
    model = timm_clip(timm_pool="avg", timm_proj="linear")
    trunk = model.visual.trunk
    dense = model.encode_image(PICTURES)
    expected = run_blocks(timm_blocks(trunk), timm_embedded(trunk, PICTURES), (3,) * 12, 1)
    wanted = model.visual.head(timm_logits(trunk, expected))
    with vlmprune.applied(model, ToMe(r=3)) as handle:
        close(model.encode_image(PICTURES), wanted)
        close(model.visual.forward_intermediates(PICTURES)["image_features"], wanted)
        assert (handle.info.family, handle.info.model_class) == ("timm", "CustomTextCLIP")
        with pytest.raises(ActiveError, match="pruned already"):
            vlmprune.apply(model.visual, "tome", r=1)
    assert torch.equal(model.encode_image(PICTURES), dense)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_identity_changes_no_bit(variant: str) -> None:
    """Without gradients nothing keeps blocks from PyTorch's shortcut for inference."""
    model, pictures = clip_model(variant, dtype=torch.float32), PICTURES.float()
    dense = model.encode_image(pictures)
    for policy in (Untouched(), Untouched(place="before")):
        with vlmprune.applied(model, policy), pytest.warns(UserWarning, match="nothing was reduced"):
            assert torch.equal(model.encode_image(pictures), dense)


def test_gradients_copies_and_half_precision() -> None:
    model = clip_model("tok")
    with vlmprune.applied(model, ToMe(r=R)):
        model.train()
        model.encode_image(PICTURES).square().sum().backward()
        assert all(p.grad is not None for p in model.visual.transformer.parameters())
        model.eval()
        with torch.no_grad():
            reduced, twin = model.encode_image(PICTURES), copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(twin.encode_image(PICTURES), reduced)
            half = twin.bfloat16().encode_image(PICTURES.bfloat16())
            assert half.dtype == torch.bfloat16
            assert twin._vlmprune.last.kept_tokens == (PATCHES - sum(R),) * 2


@torch.no_grad()
def test_flops() -> None:
    """The report's numbers are those of PyTorch's counter over the blocks, and the metric's cost stays small."""
    model = clip_model("qk_norm", qk_norm=False, scale_heads=True, dtype=torch.float32)
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        counter = FlopCounterMode(display=False)
        with counter:
            model.visual(PICTURES.float())
        report, info = handle.last, handle.info
        assert report.tower_flops == tower_flops(info, (17, 14, 10), (14, 10, 8), 2)
        rest = 2 * 2 * (PATCHES * 3 * 256 * WIDTH + WIDTH * WIDTH)  # patch embedding, projection
        metric = 2 * 2 * WIDTH * 16 * (17 + 14 + 10)  # one head's width: the weights are averaged first
        pairs = sum(2 * 2 * 16 * ((n - 1) // 2) * (n // 2) for n in (17, 14, 10))  # CLS looks for no partner
        assert counter.get_total_flops() == report.tower_flops + rest + metric + pairs


class Operators(TorchDispatchMode):
    """Names of the operators that run, and the shapes that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        self.shapes += [tuple(part.shape) for part in tree_leaves(output) if isinstance(part, Tensor)]
        return output


@torch.no_grad()
def test_attention_stays_fused() -> None:
    """Behind the first merge, 14 and 10 tokens: no matrix of scores, no mask as large as one."""
    model = clip_model("tok", dtype=torch.float32)
    with vlmprune.applied(model, ToMe(r=R)), Operators() as seen:
        model.encode_image(PICTURES.float())
    assert sum("scaled_dot_product" in name for name in seen.names) == 2
    assert not any(shape[-2:] in ((14, 14), (10, 10)) for shape in seen.shapes)


def test_what_cannot_be_served_is_refused() -> None:
    model = clip_model("tok")
    with pytest.raises(SignalError, match="'hiprune' acts at post_encoder, but CLIP offers vision_block"):
        vlmprune.apply(model, "hiprune", keep=0.5)
    with pytest.raises(UnsupportedError, match="CLIP with a ModifiedResNet tower"):
        vlmprune.apply(clip_model("tok", layers=(1, 1, 1, 1), head_width=32), "tome", r=2)
    with pytest.raises(UnsupportedError, match="scaled cosine"):
        vlmprune.apply(clip_model("tok", scaled_cosine_attn=True), "tome", r=2)
    model.visual.transformer.batch_first = False
    with pytest.raises(UnsupportedError, match="batch_first=False"):
        vlmprune.apply(model, "tome", r=2)
    model.visual.transformer.batch_first = True
    with vlmprune.applied(model, "tome", r=2):
        model.set_grad_checkpointing(True)
        with pytest.raises(UnsupportedError, match="set_grad_checkpointing"):
            model.encode_image(PICTURES)
        with torch.no_grad():
            assert model.encode_image(PICTURES).isfinite().all()
