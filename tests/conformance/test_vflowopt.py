"""VFlowOpt against the official code, run on the CPU in float32.

Golden kind -> settings:
- `imp`: importance of every view's patches with the case's t and alpha, pixels un-normalised to 0..255.
- `rec`: `VFlowOpt(r1=r, a=grid)` on a thumbnail and a canvas with a newline behind each row.
- `align`: importance taken to the tokens of a LLaVA-OneVision image by `context.to_tokens(..., newline=1.0)`; see
  `PACKINGS`.
- `llm`: `VFlowOpt(r1=1, r2=..., r3=..., layers=prune_before_layer)` with given importance on the stock Qwen2Model.
  The target is `out/last_hidden_state`; `..._as_released` leaves one layer without its causal mask.
- `budget`: `VFlowOpt(keep=0.25, r1=..., r2=...)` for 28 layers with cuts at 9 and 18.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from golden_io import Case
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from vlmprune.adapters.detect import find_family
from vlmprune.adapters.layout import ImageShape
from vlmprune.core.attention import DenseAttention
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import Attention, Pixels, Projected, Signal
from vlmprune.core.views import Newline, View
from vlmprune.embedded.random_models import random_vlm
from vlmprune.policies._vflowopt_importance import attending_patches, patch_entropy
from vlmprune.policies._vflowopt_settings import SMALLEST, mean_retention, solve_r3
from vlmprune.policies.vflowopt import IMPORTANCE, VFlowOpt

BLOCK = Attention(contexts.LLAVA.feature_block)


def retention(r1: float, r2: float, r3: float, depth: int, cuts: Sequence[int]) -> float:
    """Mean share of tokens over decoder layers, counted layer by layer."""
    shares = [r1 * (r2 if i >= cuts[0] else 1.0) * (r3 if i >= cuts[1] else 1.0) for i in range(depth)]
    return sum(shares) / depth


@dataclass(frozen=True)
class Given(VFlowOpt):
    """VFlowOpt whose importance is given per item, not measured."""

    values: list[Tensor] = field(default_factory=list, compare=False)

    def importance_signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return ()

    def importance(self, context: Context, thresholds: Sequence[float]) -> tuple[Tensor, tuple[str, ...]]:
        return contexts.pad(self.values), ()


# ---- importance


def patches(pixels: np.ndarray, side: int) -> Tensor:
    """`[V, P, 3, 14, 14]` of pictures `[V, 3, 14 g, 14 g]`."""
    rows = torch.from_numpy(pixels).float().unflatten(3, (side, 14)).unflatten(2, (side, 14))
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


@pytest.mark.golden("vflowopt", "imp")
def test_importance(case: Case) -> None:
    attention = torch.from_numpy(case.inputs["attn"])
    n_views, n = attention.shape[0], attention.shape[-1]
    side = math.isqrt(n)
    policy = VFlowOpt(keep=0.25, t=case.ratio("t"), alpha=case.ratio("alpha"))
    assert (Pixels() in policy.importance_signals(contexts.LLAVA)) == (case.ratio("alpha") != 0)
    pixels = patches(case.inputs["pixels_u8"], side)
    views = [contexts.image(side, side)] * n_views
    context = contexts.post_encoder(views, 0.25, {BLOCK: [[matrix] for matrix in attention.mean(1)]})
    signals = {BLOCK: DenseAttention(attention), **({Pixels(): pixels} if policy.alpha else {})}
    importance, notes = policy.importance(replace(context, signals=signals), [case.ratio("t")] * n_views)
    torch.testing.assert_close(importance, torch.from_numpy(case.outputs["importance"]), rtol=1e-5, atol=1e-7)
    assert notes == ()
    mask, empty = attending_patches(DenseAttention(attention), torch.full((n_views,), case.ratio("t")))
    assert torch.equal(mask, torch.from_numpy(case.outputs["calibration_mask"]).bool()) and not empty.any()
    torch.testing.assert_close(patch_entropy(pixels), torch.from_numpy(case.outputs["entropy"]), rtol=1e-5, atol=1e-5)


# ---- recycling


@pytest.mark.golden("vflowopt", "rec")
def test_recycling(case: Case) -> None:
    features, importance = (torch.from_numpy(case.inputs[name]) for name in ("features", "importance"))
    thumb_h, thumb_w, height, stride = (
        case.integer(name) for name in ("thumb_h", "thumb_w", "local_h", "local_w_with_newline")
    )
    first = thumb_h * thumb_w
    cells = tuple(first + row * stride + column for row in range(height) for column in range(stride - 1))
    views = (View(thumb_h, thumb_w, 0, "thumbnail"), View(height, stride - 1, first, "tile", cells))
    newlines = tuple(Newline(first + (row + 1) * stride - 1, first + row * stride) for row in range(height))

    r1 = case.ratio("r")
    keep = retention(r1, 0.9, 1.0, 32, (10, 20))
    policy = Given(keep=keep, r1=r1, r2=0.9, r3=1.0, a=float(case.params["grid"]), t=1.0, values=[importance])
    valid = torch.ones(1, len(features), dtype=torch.bool)
    context = contexts.post_encoder([views], keep)
    context = replace(
        context, lengths=(len(features),), valid=valid, newlines=(newlines,), signals={Projected(): features[None]}
    )
    selection = policy.select(context)
    assert selection.anchors().tolist() == [case.outputs["kept"].tolist()]
    assert selection.out_counts() == (len(case.outputs["kept"]),)
    assert selection.kept is not None
    untouched = set(selection.kept[0].tolist()) - {-1}
    assert sorted(set(range(len(features))) - untouched) == case.outputs["pruned_pool"].tolist()
    assert len(untouched) == max(0, len(features) - case.integer("reduce") - case.integer("reserved"))
    merged = selection.apply(features[None], features=True)[0]
    torch.testing.assert_close(merged, torch.from_numpy(case.outputs["features"]), rtol=1e-5, atol=1e-5)
    carried = selection.apply(selection.carry[IMPORTANCE])[0].float()
    assert torch.equal(carried, torch.from_numpy(case.outputs["importance"]))


# ---- from patches to tokens

Packing = Callable[[Case, Tensor, Tensor], Tensor]


def pack_by_the_spec(case: Case, values: Tensor, newline: Tensor) -> Tensor:
    """Values of the tiles' patches `[V, P, D]` as LLaVA-OneVision packs features: one canvas without padding, made
    smaller where it has too many patches, a newline behind each row."""
    side, rows, columns = (case.integer(name) for name in ("side", "grid_h", "grid_w"))
    width, height = case.integer("image_w"), case.integer("image_h")
    canvas = values.unflatten(0, (rows, columns)).unflatten(2, (side, side))
    canvas = canvas.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # [D, h, w]
    high, wide = canvas.shape[1:]
    if width / height > wide / high:
        cut = (high - int(height * (wide / width))) // 2
        canvas = canvas[:, cut : high - cut]
    else:
        cut = (wide - int(width * (high / height))) // 2
        canvas = canvas[:, :, cut : wide - cut]
    high, wide = canvas.shape[1:]
    times = math.sqrt(high * wide / (case.integer("max_patches") * side**2))
    if times > 1.1:
        size = (int(high // times), int(wide // times))
        canvas = nn.functional.interpolate(canvas[None], size, mode="bilinear", align_corners=False)[0]
    column = newline[:, None, None].expand(-1, canvas.shape[1], 1)
    return torch.cat([canvas, column], 2).flatten(1).T


def pack_by_the_model(case: Case, values: Tensor, newline: Tensor) -> Tensor:
    """The same through the adapter of a LLaVA-OneVision of transformers, whose tiles are the case's."""
    model, side = random_vlm("llava_onevision"), case.integer("side")
    config = model.config
    config.vision_config.image_size = tile = side * config.vision_config.patch_size
    config.image_grid_pinpoints = [[case.integer("grid_h") * tile, case.integer("grid_w") * tile]]
    config.vision_aspect_ratio = f"anyres_max_{case.integer('max_patches')}"
    family, shape = find_family(model), ImageShape(0, geometry=(case.integer("image_h"), case.integer("image_w")))
    image = torch.cat([torch.full_like(values[:1], torch.nan), values])[None]  # a thumbnail comes first
    channels = [family.pack(shape, image[..., i : i + 1], value) for i, value in enumerate(newline.tolist())]
    return torch.cat(channels, 2)[0, side**2 :]


# How patch values become token values: by the text of the specification, and as the framework does it.
PACKINGS: Mapping[str, Packing] = {"spec": pack_by_the_spec, "model": pack_by_the_model}


@pytest.mark.golden("vflowopt", "align")
@pytest.mark.parametrize("packing", PACKINGS)
def test_alignment(case: Case, packing: str) -> None:
    pack = PACKINGS[packing]
    features, given, newline = (torch.from_numpy(case.inputs[name]) for name in ("features", "importance", "newline"))
    packed = pack(case, features, newline)
    torch.testing.assert_close(packed, torch.from_numpy(case.outputs["features"]), rtol=1e-5, atol=1e-5)

    def to_tokens(values: Tensor, newline: float = 0.0) -> Tensor:
        return pack(case, values[..., None], torch.tensor([newline]))[None, :, 0]

    # Each row of this "attention" is the importance, so whatever rows count, their mean is.
    attention = given[:, None].expand(-1, given.shape[1], -1)
    n, stride = len(packed), int(case.outputs["local_w_with_newline"])
    context = contexts.post_encoder([(View(1, n, 0, "tile"),)], 0.25)
    context = replace(
        context, signals={BLOCK: DenseAttention(attention)}, encoder_items=(0,) * len(given), to_tokens=to_tokens
    )
    importance, _ = VFlowOpt(keep=0.25, t=1.0).importance(context, [1.0])
    torch.testing.assert_close(importance[0], torch.from_numpy(case.outputs["importance"]), rtol=1e-5, atol=1e-7)
    assert torch.equal(importance[0, stride - 1 :: stride], torch.ones(n // stride))


# ---- cuts inside the LLM


def qwen2(case: Case) -> Qwen2Model:
    """The case's decoder: stock transformers code with the stored weights."""
    weights = {name: torch.from_numpy(value) for name, value in case.group("weights").items()}
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=weights["norm.weight"].numel(),
        intermediate_size=len(weights["layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        num_attention_heads=case.integer("num_heads"),
        num_key_value_heads=case.integer("num_kv_heads"),
        rms_norm_eps=float(case.params["rms_norm_eps"]),
        rope_theta=float(case.params["rope_theta"]),
        attn_implementation="sdpa",
    )
    model = Qwen2Model(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ["embed_tokens.weight"]
    return model


@pytest.mark.golden("vflowopt", "llm")
@torch.no_grad()
def test_cuts_in_a_decoder(case: Case) -> None:
    import vlmprune

    model, inputs = qwen2(case), torch.from_numpy(case.inputs["inputs_embeds"])
    start, n_visual = case.integer("image_start"), case.integer("image_len")
    cuts, (r2, r3) = tuple(case.params["prune_before_layer"].tolist()), case.params["keep_ratios"].round(6).tolist()
    r2, r3 = round(r2, 6), round(r3, 6)
    keep = retention(1.0, r2, r3, len(model.layers), cuts)
    policy = Given(
        keep=keep, r1=1.0, r2=r2, r3=r3, a=100.0, layers=cuts, values=[torch.from_numpy(case.inputs["importance"])]
    )
    dense = model(inputs_embeds=inputs).last_hidden_state
    handle = vlmprune.apply(model, policy, spans=[[(start, n_visual)]], restore_length=False)
    lengths: list[int] = []
    spies = [
        layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for layer in model.layers
    ]
    output = model(inputs_embeds=inputs, use_cache=True)

    expected = torch.from_numpy(case.outputs["last_hidden_state"])
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    released = torch.from_numpy(case.outputs["last_hidden_state_as_released"])
    assert (output.last_hidden_state - released).abs().max() > 1e-3
    assert lengths == case.outputs["seq_len"].tolist()
    assert [layer.keys.shape[-2] for layer in output.past_key_values.layers] == lengths
    text = [*range(start), *range(start + n_visual, inputs.shape[1])]
    for layer, name in zip(cuts, ("positions_after_stage2", "positions_after_stage3"), strict=True):
        kept = [start + token for token in handle.last.kept(layer=layer)]
        assert sorted(text + kept) == case.outputs[name].tolist()
    assert [site.positions for site in handle.last.sites] == ["compact", "keep", "keep"]
    assert handle.last.mean_kept_layers == sum(n - len(text) for n in lengths) / len(lengths)

    for registered in spies:
        registered.remove()
    handle.remove()
    assert torch.equal(model(inputs_embeds=inputs).last_hidden_state, dense)


# ---- budget


@pytest.mark.golden("vflowopt", "budget")
def test_budget_equation(case: Case) -> None:
    target, parts, info = case.ratio("target"), (9, 9, 10), replace(contexts.LLAVA, text_depth=28)
    for (r1, r2), r3, violation in zip(
        case.inputs["r1_r2"].tolist(), case.outputs["r3"], case.outputs["violation"], strict=True
    ):
        policy = VFlowOpt(keep=target, r1=r1, r2=r2)
        if r3 <= 0:  # the first two cuts alone keep too much
            assert solve_r3(target, r1, r2, parts) == (SMALLEST, False)
            with pytest.raises(InputError, match="alone keep more"):
                policy.settings_of(target, info)
            continue
        found: Any = policy.settings_of(target, info)
        assert found.r3 == pytest.approx(float(r3), abs=1e-5)
        real = mean_retention(r1, r2, found.r3, parts)
        assert real == pytest.approx(retention(r1, r2, found.r3, 28, (9, 18)), abs=1e-12)
        assert abs(real - target) == pytest.approx(float(violation), abs=1e-6)
