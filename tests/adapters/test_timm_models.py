"""A policy on a timm model: identity and undo bit by bit, copies, gradients, precision, sizes, what is refused."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

import timm
from model_state import hooked, model_state
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from timm_models import PATCHES, SIZES, images, timm_model, variants, vit
from torch import nn
from tower_policies import KeepPatches, MergeEach, Untouched

import vlmprune
from vlmprune.core.errors import ActiveError, UnsupportedError, VlmpruneError
from vlmprune.core.flops import tower_flops
from vlmprune.policies.tome import ToMe

R = (3, 4, 2)


@pytest.mark.parametrize("variant", variants())
@torch.no_grad()
def test_identity_changes_no_bit(variant: str) -> None:
    """Through every hook: the stream is taken out between attention and MLP, and put back."""
    model, pictures = timm_model(variant, dtype=torch.float32), images(2, dtype=torch.float32)
    dense, features = model(pictures), model.forward_features(pictures)
    maps = model.forward_intermediates(pictures, intermediates_only=True)
    for policy in (Untouched(), Untouched(place="before"), vlmprune.ToMe(keep=1.0)):
        with vlmprune.applied(model, policy) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(model(pictures), dense)
            assert torch.equal(model.forward_features(pictures), features)
            again = model.forward_intermediates(pictures, intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
            assert handle.last.kept_tokens == (PATCHES, PATCHES)
            assert handle.last.tower_flops == handle.last.tower_flops_dense


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind() -> None:
    model, pictures = timm_model("token"), images(2)
    dense, before = model(pictures), model_state(model)
    handle = vlmprune.apply(model, ToMe(r=R))
    reduced = model(pictures)
    broken = model.blocks[1].mlp.fc2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(pictures)
    assert isinstance(handle.last_error, RuntimeError)
    with pytest.raises(RuntimeError, match="broken"):
        model.forward_features(pictures)
    broken.remove()
    assert torch.equal(model(pictures), reduced) and handle.last_error is None
    with handle.disabled():
        assert torch.equal(model(pictures), dense)
        assert torch.equal(model.forward_head(model.forward_features(pictures)), dense)
    assert torch.equal(model(pictures), reduced)
    handle.remove()
    handle.remove()
    assert torch.equal(model(pictures), dense) and model_state(model) == before


def fail(*_: Any) -> None:
    raise RuntimeError("broken")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def test_after_an_interrupt() -> None:
    """PyTorch runs no hooks then."""
    model, pictures = timm_model("token"), images(2)
    with vlmprune.applied(model, ToMe(r=R)):
        reduced, features = model(pictures), model.forward_features(pictures)
        for call in (model, model.forward_features):
            stop = model.blocks[1].mlp.fc2.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(pictures)
            stop.remove()
            assert torch.equal(model(pictures), reduced)
        stop = model.blocks[1].mlp.fc2.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(pictures)
        stop.remove()
        with pytest.raises(UnsupportedError, match="call again"):
            model.forward_features(pictures)
        assert torch.equal(model.forward_features(pictures), features)


@torch.no_grad()
def test_a_copy_is_independent() -> None:
    model, pictures = timm_model("avg"), images(2)
    dense = model(pictures)
    handle = vlmprune.apply(model, ToMe(r=R))
    reduced, features = model(pictures), model.forward_features(pictures)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(model(pictures), dense)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(pictures), reduced) and torch.equal(twin.forward_features(pictures), features)
    assert torch.equal(twin.forward_head(features), twin.forward_head(features.clone()))
    other = twin._vlmprune
    other.remove()
    assert torch.equal(twin(pictures), dense)
    assert not any(hooked(module, other._engine.hook_ids) for module in twin.modules())


@pytest.mark.parametrize("variant", variants("token", "layer_scale", "map", "eva"))
def test_gradients_in_training(variant: str) -> None:
    """They flow through merges: as the finite difference says, along one direction."""
    model, pictures = timm_model(variant), images(2)
    with vlmprune.applied(model, ToMe(r=R)):
        model.train()
        model(pictures).square().sum().backward()
        weight = model.patch_embed.proj.weight
        direction = weight.grad / weight.grad.norm()
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                weight += step * direction
                values.append(model(pictures).square().sum())
                weight -= step * direction
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(slope, weight.grad.norm(), rtol=1e-4, atol=1e-6)
        assert all(p.grad is not None for p in model.blocks.parameters())


@torch.no_grad()
def test_stochastic_depth_and_dropped_patches_in_training() -> None:
    torch.manual_seed(0)
    model = vit(drop_path_rate=0.5, patch_drop_rate=0.25, attn_drop_rate=0.1, proj_drop_rate=0.1).train()
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        assert model(images(4, dtype=torch.float32)).isfinite().all()
        assert handle.last.visual_tokens == (12,) * 4 and handle.last.kept_tokens == (3,) * 4
        assert handle.last.images[0].views == ()


@pytest.mark.parametrize("variant", variants("token", "map", "qk_norm", "eva"))
@torch.no_grad()
def test_half_precision(variant: str) -> None:
    """bfloat16 merges as the same model in float64 merges with the keys at hand, up to its rounding."""
    model, pictures = timm_model(variant, dtype=torch.bfloat16), images(2, dtype=torch.bfloat16)
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        logits = model(pictures)
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert handle.last.kept_tokens == (PATCHES - sum(R),) * 2
        assert model.forward_features(pictures).dtype == torch.bfloat16
        sizes = handle.last.sites[0].selection.group_id
    wide = timm_model(variant)
    with vlmprune.applied(wide, ToMe(r=(0, 0, 1))):
        exact = wide(pictures.double())
    with vlmprune.applied(model, ToMe(r=(0, 0, 1))):
        assert (model(pictures) - exact).abs().max() < 0.15 * exact.abs().max()
    assert sizes.unique().numel() == PATCHES - sum(R)


@torch.no_grad()
def test_autocast() -> None:
    model, pictures = timm_model("avg", dtype=torch.float32), images(2, dtype=torch.float32)
    with vlmprune.applied(model, MergeEach(r=(2, 3))):
        exact = model(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(pictures) - exact).abs().max() < 0.2 * exact.abs().max()


@torch.no_grad()
def test_sizes_of_pictures() -> None:
    """One model, pictures of several sizes, one after the other; odd ones are padded to whole patches."""
    torch.manual_seed(0)
    model = vit(dynamic_img_size=True, dynamic_img_pad=True, global_pool="avg").eval()
    with vlmprune.applied(model, ToMe(keep=0.5)) as handle:
        assert handle.info.grid is None
        for size, (height, width) in (((32, 32), (4, 4)), ((37, 24), (5, 3)), ((8, 40), (1, 5))):
            pictures = images(3, size, dtype=torch.float32)
            together = model(pictures)
            assert handle.last.visual_tokens == (height * width,) * 3
            assert handle.last.kept_tokens == (height * width // 2,) * 3
            [view] = handle.last.images[0].views
            assert (view.height, view.width) == (height, width)
            alone = torch.cat([model(picture[None]) for picture in pictures])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
            assert model.forward_intermediates(pictures)[1][0].shape == (3, 32, height, width)


@torch.no_grad()
@pytest.mark.parametrize(("policy", "keep"), [("tome", 16), ("tome", 0.95), ("dymu", 40)])
def test_a_budget_on_pictures_larger_than_the_config_says(policy: str, keep: Any) -> None:
    """16 patches by the config, 64 in the picture: budgets that leave the former as they are reduce the latter."""
    parameters = {"mode": "instance"} if policy == "dymu" else {}
    with vlmprune.applied(timm_model("token"), "tome", keep=16) as handle, torch.no_grad():
        assert handle.policy.keep == 16  # all patches of the config's size
    model = vit(dynamic_img_size=True).eval()
    with vlmprune.applied(model, policy, keep=min(keep, 16), **parameters) as handle, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
        assert handle.last.tower_sites[-1].tokens_out == (1 + (60 if keep == 0.95 else 16),) * 2


def test_no_pictures() -> None:
    model = timm_model("token", dtype=torch.float32)
    for policy in ("tome", "zero_tprune"):
        with vlmprune.applied(model, policy, keep=0.5), torch.no_grad():
            assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 7)
            assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_two_pictures_of_one_channel() -> None:
    torch.manual_seed(0)
    model = vit(in_chans=1, img_size=(16, 24), global_pool="token").eval()
    with vlmprune.applied(model, ToMe(r=1)) as handle:
        model(torch.randn(1, 1, 16, 24))
        assert handle.last.kept_tokens == (3,) and handle.last.images[0].views[0].width == 3


@torch.no_grad()
def test_report() -> None:
    model, pictures = timm_model("registers"), images(2)
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        assert handle.last is None
        model(pictures)
        report, info = handle.last, handle.info
        assert (info.family, info.prefix_tokens, info.grid, info.vision_depth) == ("timm", 5, (4, 4), 3)
        assert report.visual_tokens == (16, 16) and report.kept_tokens == (7, 7)
        assert report.tower_attended == (21, 18, 14) and report.tower_passed == (18, 14, 12)
        assert report.tower_flops == tower_flops(info, (21, 18, 14), (18, 14, 12), 2)
        assert report.tower_flops_dense == tower_flops(info, (21,) * 3, (21,) * 3, 2)
        assert [record.layer for record in report.tower_sites] == [0, 1, 2]
        assert [record.tokens_out for record in report.tower_sites] == [(18, 18), (14, 14), (12, 12)]
        assert report.sites[0].layer == 2 and report.milliseconds > 0
        assert report.summary()["tower_flops"] == report.tower_flops
        assert sorted(sum(report.groups(1), [])) == list(range(16))
        assert handle.tower_sites == tuple(report.tower_sites)


@torch.no_grad()
def test_seeds_follow_the_picture() -> None:
    model, pictures = timm_model("token"), images(3)
    policy = ToMe(r=R, matching="random", seed=5)
    with vlmprune.applied(model, policy) as handle:
        logits, groups = model(pictures), handle.last.groups(2)
        torch.testing.assert_close(model(pictures[2:]), logits[2:])
        assert handle.last.groups(0) == groups
        handle.sample_ids = ["a", "b"]
        model(pictures[[2, 2]])
        renamed = handle.last.groups(1)
        assert handle.last.groups(0) != renamed != groups
        handle.sample_ids = ["b"]
        model(pictures[2:])
        assert handle.last.groups(0) == renamed
        handle.sample_ids = ["a", "b"]
        with pytest.raises(ValueError, match="2 ids, but the batch has 3"):
            model(pictures)


@torch.no_grad()
def test_a_warning_if_nothing_was_reduced() -> None:
    model, pictures = timm_model("token"), images(2)
    everything = (tuple(range(PATCHES)),) * 2
    with vlmprune.applied(model, KeepPatches(kept=everything)) as handle:
        with pytest.warns(UserWarning, match="keep_patches: nothing was reduced; the images have 16 patches"):
            model(pictures)
        assert "nothing was reduced" in handle.last.warnings[0]


def test_other_threads_are_refused() -> None:
    model, pictures = timm_model("token"), images(2)
    found: list[BaseException] = []

    def intrude(*_: Any) -> None:
        def call() -> None:
            try:
                model(pictures)
            except ActiveError as error:
                found.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with torch.no_grad(), vlmprune.applied(model, ToMe(r=R)):
        alone = model(pictures)
        hook = model.blocks[1].register_forward_hook(intrude)
        assert torch.equal(model(pictures), alone)
        hook.remove()
        assert len(found) == 1 and "Another thread" in str(found[0])
        assert torch.equal(model(pictures), alone)


@pytest.mark.parametrize("policy", ["hiprune", "divprune", "todre", "fastv", "downsample"])
def test_policies_of_other_sites_are_refused(policy: str) -> None:
    wanted = f"'{policy}' acts at .*, but VisionTransformer offers vision_block|VisionTransformer has no decoder"
    with pytest.raises(VlmpruneError, match=wanted):
        vlmprune.apply(timm_model("token"), policy, keep=0.5)


def test_what_cannot_be_served_is_refused() -> None:
    model, pictures = timm_model("token"), images(2)
    before = model_state(model)
    for block in (ParallelScalingBlock, ParallelThingsBlock):
        with pytest.raises(UnsupportedError, match=f"{block.__name__} blocks cannot be reduced; known blocks: Block"):
            vlmprune.apply(vit(block_fn=block), "tome", r=2)
    if hasattr(timm.layers, "DiffAttention"):
        with pytest.raises(UnsupportedError, match="attention of class DiffAttention"):
            vlmprune.apply(vit(attn_layer="diff"), "tome", r=2)
    if hasattr(timm.layers, "AttentionPoolPrr"):
        with pytest.raises(UnsupportedError, match="global_pool='prr' cannot count merged tokens"):
            vlmprune.apply(vit(global_pool="prr"), "tome", r=2)
    with pytest.raises(UnsupportedError, match="ResNet is not a model .* timm's VisionTransformer and Eva"):
        vlmprune.apply(timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), "tome", r=2)
    with pytest.raises(UnsupportedError, match="spans is for bare decoders; VisionTransformer"):
        vlmprune.apply(model, "tome", r=2, spans=[[(0, 4)]])
    with vlmprune.applied(model, "tome", r=2), pytest.raises(ActiveError, match="pruned already"):
        vlmprune.apply(model, "tome", r=2)
    with vlmprune.applied(model, "tome", r=2) as handle:
        for masked in ({"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}):
            with pytest.raises((UnsupportedError, TypeError), match="cannot follow the tokens|unexpected keyword"):
                model(pictures, **masked)
        model.set_grad_checkpointing(True)
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(UnsupportedError, match="set_grad_checkpointing"):
                call(pictures)
        with torch.no_grad():
            assert model(pictures).isfinite().all()
        with handle.disabled():
            model(pictures).sum().backward()
    assert model_state(model) == before


def test_an_attention_without_masks_is_refused() -> None:
    """As in timm before 1.0.16."""
    model = timm_model("token")
    model.blocks[1].attn = Maskless(model.blocks[1].attn)
    with pytest.raises(UnsupportedError, match="takes no attn_mask.*install timm 1.0.20 or newer"):
        vlmprune.apply(model, "tome", r=2)


class Maskless(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


@torch.no_grad()
def test_models_for_features_only() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, features_only=True, out_indices=(1, -1)).eval()
    pictures = images(2, 64, dtype=torch.float32)
    dense = model(pictures)
    with vlmprune.applied(model, "tome", r=1) as handle:
        maps = model(pictures)
        assert [part.shape for part in maps] == [part.shape for part in dense] == [(2, 192, 4, 4)] * 2
        assert not torch.equal(maps[1], dense[1]) and handle.last.kept_tokens == (4, 4)
        inner = model.model.forward_intermediates(pictures, indices=[1, -1], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, inner, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model(pictures), dense, strict=True))


@torch.no_grad()
def test_subclasses_are_served() -> None:
    class Mine(VisionTransformer):
        pass

    torch.manual_seed(0)
    model = Mine(**SIZES).eval()
    with vlmprune.applied(model, "tome", keep=0.5) as handle:
        model(images(1, dtype=torch.float32))
        assert handle.last.kept_tokens == (8,) and handle.info.model_class == "Mine"
    assert isinstance(timm_model("eva"), Eva)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_compiled() -> None:
    torch.manual_seed(0)
    model, pictures, policy = vit(depth=2, global_pool="avg").eval(), images(2, dtype=torch.float32), ToMe(r=4)
    dense = model(pictures)
    with vlmprune.applied(model, policy):
        expected = model(pictures)
    compiled = torch.compile(model, backend="eager")
    try:
        torch.testing.assert_close(compiled(pictures), dense)
        handle = vlmprune.apply(compiled, policy)
        for _ in range(2):
            torch.testing.assert_close(compiled(pictures), expected)
        assert handle.last.kept_tokens == (8, 8)
        handle.remove()
        torch.testing.assert_close(compiled(pictures), dense)
    finally:
        torch._dynamo.reset()
