"""Signals of the vision tower equal what a stock model with eager attention computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llava_prompts import LlavaPrompt, make_prompt, prefill, small_llava
from recording import Recording
from torch import Tensor, nn

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import SignalError

TOWERS = ["clip", "siglip"]
BATCHES = [
    pytest.param((1,), False, id="single"),
    pytest.param((1, 1, 1), False, id="batch"),
    pytest.param((2, 0, 1), True, id="left-padded"),
]
LAYERS = (0, 2)  # 2 is the block that feeds CLIP's projector


def wanted(vision: str) -> tuple[s.Signal, ...]:
    signals: list[s.Signal] = [s.PreProjector(), s.Projected(), s.Projector(), s.TextEmbeddings()]
    for layer in LAYERS:
        signals += [
            s.ColumnMass("vision", layer),
            s.ColumnMass("vision", layer, "sum"),
            s.Keys("vision", layer),
            s.QK("vision", layer),
            s.Hidden("vision", layer, "in"),
            s.Hidden("vision", layer, "out"),
        ]
        if vision == "clip":
            signals += [s.ClsRow(layer), s.ClsLogits(layer)]
    return tuple(signals)


class EagerTower:
    """What a stock LLaVA's tower and projector do with a batch of images, from eager attention."""

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        self.model = model
        tower = model.model.vision_tower
        blocks = getattr(tower, "vision_model", tower).encoder.layers
        self.projections: dict[tuple[int, str], Tensor] = {}
        hooks = [
            getattr(block.self_attn, name).register_forward_hook(
                lambda module, args, output, key=(i, name): self.projections.__setitem__(key, output)
            )
            for i, block in enumerate(blocks)
            for name in ("q_proj", "k_proj")
        ]
        with torch.no_grad():
            self.out = tower(pixels, output_attentions=True, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        self.first = int(model.config.vision_config.model_type.startswith("clip"))
        self.heads = model.config.vision_config.num_attention_heads

    def split_heads(self, values: Tensor) -> Tensor:
        """``[I, T, H * d]`` to ``[I, H, T, d]``."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def value(self, signal: s.Signal) -> Any:
        """The signal by its definition."""
        first = self.first
        if isinstance(signal, s.PreProjector):
            return self.out.hidden_states[-2 if first else -1][:, first:]
        if isinstance(signal, s.Projected):
            with torch.no_grad():
                return self.model.model.multi_modal_projector(self.value(s.PreProjector()))
        if isinstance(signal, s.Hidden):
            return self.out.hidden_states[signal.layer + (signal.when == "out")][:, first:]
        attention = self.out.attentions[signal.layer].mean(1)  # [I, T, T]
        query = self.split_heads(self.projections[signal.layer, "q_proj"])
        key = self.split_heads(self.projections[signal.layer, "k_proj"])
        if isinstance(signal, s.ColumnMass):
            mass = attention.sum(1)[:, first:]
            return mass / attention.shape[1] if signal.reduce == "mean" else mass
        if isinstance(signal, s.ClsRow):
            return attention[:, 0, 1:]
        if isinstance(signal, s.ClsLogits):
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            return scores.mean(1)[:, 0, 1:]
        if isinstance(signal, s.Keys):
            return self.projections[signal.layer, "k_proj"][:, first:]
        assert isinstance(signal, s.QK)
        return query[:, :, first:], key[:, :, first:]


def record(model: nn.Module, prompt: LlavaPrompt, signals: tuple[s.Signal, ...]) -> Context:
    policy = Recording(wanted=signals)
    with vlmprune.applied(model, policy):
        prefill(model, prompt)
    return policy.tape.last


def close(got: Any, expected: Any) -> bool:
    if isinstance(got, tuple):
        return all(close(a, b) for a, b in zip(got, expected, strict=True))
    scale = max(1.0, float(expected.abs().max()))
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_tower_signals_equal_eager_attention(
    images: tuple[int, ...], padded: bool, vision: str, implementation: str
) -> None:
    model = small_llava(vision, attn_implementation=implementation)
    stock = small_llava(vision, attn_implementation="eager")
    prompt = make_prompt(images, padded)
    context = record(model, prompt, wanted(vision))
    tower = EagerTower(stock, prompt.pixels)
    wrong = [
        signal
        for signal in wanted(vision)
        if not isinstance(signal, (s.Projector, s.TextEmbeddings))
        and not close(context.signal(signal), tower.value(signal))
    ]
    assert not wrong
    assert context.sample == tuple(row for row, count in enumerate(images) for _ in range(count))
    assert context.lengths == (16,) * sum(images)
    assert torch.equal(context.features, context.signal(s.Projected()))
    # The projector is the model's own, and the signals of two layers differ.
    projected = context.signal(s.Projector())(context.signal(s.PreProjector()))
    assert torch.allclose(projected, context.features, atol=1e-6)
    for kind in (s.ColumnMass, s.Keys):
        assert not close(context.signal(kind("vision", 0)), tower.value(kind("vision", 2)))
    for mean in (s.ColumnMass("vision", layer) for layer in LAYERS):
        total = context.signal(s.ColumnMass("vision", mean.layer, "sum"))
        assert close(total, context.signal(mean) * (16 + tower.first))


@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_text_embeddings_are_those_of_the_images_row(images: tuple[int, ...], padded: bool) -> None:
    model = small_llava()
    prompt = make_prompt(images, padded)
    context = record(model, prompt, (s.TextEmbeddings(),))
    embeddings, valid = context.signal(s.TextEmbeddings())
    for item, row in enumerate(context.sample):
        text = prompt.ids[row][prompt.real[row] & (prompt.ids[row] != model.config.image_token_index)]
        expected = model.get_input_embeddings()(text)
        assert torch.equal(embeddings[item][valid[item]], expected)


def test_head_mean_and_cls_column_matter() -> None:
    """The references discriminate: one head, or the CLS column left in, would be noticed."""
    model = small_llava(attn_implementation="eager")
    prompt = make_prompt()
    context = record(model, prompt, wanted("clip"))
    attention = EagerTower(model, prompt.pixels).out.attentions[2]
    mass = context.signal(s.ColumnMass("vision", 2))
    assert not close(mass, attention[:, 0].mean(1)[:, 1:])
    assert not close(mass, attention.mean(1)[:, 1:].mean(1)[:, 1:])  # without the CLS query row
    assert not close(mass, attention.mean(1).mean(1)[:, :-1])
    assert not close(context.signal(s.ClsRow(2)), attention.mean(1)[:, 0, :-1])
    assert not close(context.signal(s.ClsRow(2)).softmax(-1), context.signal(s.ClsLogits(2)).softmax(-1))


@pytest.mark.parametrize("signal", [s.ClsRow(1), s.ClsLogits(1)])
def test_cls_signals_fail_at_apply_without_a_cls_token(signal: s.Signal) -> None:
    model = small_llava("siglip")
    with pytest.raises(SignalError, match=f"{type(signal).__name__}.*no CLS token.*available"):
        vlmprune.apply(model, Recording(wanted=(signal,)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_optional_signal_that_the_model_lacks_is_left_out() -> None:
    model = small_llava("siglip")
    context = record(model, make_prompt(), (s.ClsRow(1, optional=True), s.Projected()))
    assert set(context.signals) == {s.Projected()}


def test_an_optional_signal_that_the_model_has_is_delivered() -> None:
    model, prompt = small_llava(), make_prompt()
    for signal in set(wanted("clip")) - {s.TextEmbeddings()}:
        optional = replace(signal, optional=True)
        full = record(model, prompt, (signal,)).signal(signal)
        got = record(model, prompt, (optional,)).signal(optional)
        assert got is full or close(got, full)


def test_todre_falls_back_to_a_random_pivot_without_a_cls_token() -> None:
    model, prompt = small_llava("siglip"), make_prompt((1, 1))
    with vlmprune.applied(model, "todre", keep=0.25, tau=0.0) as handle:
        prefill(model, prompt)
        first = handle.last.kept(0)
        prefill(model, prompt)
        assert handle.last.kept(0) == first and len(first) == 4
    with pytest.raises(ValueError, match="pivot='cls' needs a CLS token.*random"):
        vlmprune.apply(model, "todre", keep=0.25, pivot="cls")


@pytest.mark.parametrize(
    "signal",
    [
        s.Keys("text", 1),
        s.QK("text", 1),
        s.ColumnMass("text", 1),
        s.AttentionRows("vision", 1),
        s.GroupMass(1),
        s.FinalNorm(),
        s.Hidden("text", 1, "in"),
    ],
    ids=str,
)
def test_signals_that_do_not_exist_after_the_encoder_fail_at_apply(signal: s.Signal) -> None:
    with pytest.raises(SignalError, match=type(signal).__name__):
        vlmprune.apply(small_llava(), Recording(wanted=(signal,)))


@pytest.mark.parametrize("signal", [s.ColumnMass("vision", 9), s.Hidden("vision", 4), s.ClsRow(-1)], ids=str)
def test_a_vision_layer_that_does_not_exist_fails_at_apply(signal: s.Signal) -> None:
    with pytest.raises((SignalError, ValueError), match=type(signal).__name__):
        vlmprune.apply(small_llava(), Recording(wanted=(signal,)))


def test_images_encoded_before_apply_are_refused_with_advice() -> None:
    model, prompt = small_llava(), make_prompt()
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=prompt.pixels)
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds = model.get_input_embeddings()(prompt.ids)
        embeds[0, 3:19] = features
    policy = Recording(wanted=(s.ColumnMass("vision", 1),))
    with vlmprune.applied(model.model.language_model, policy.__class__(), spans=[[(3, 16)]]):
        model.model.language_model(inputs_embeds=embeds)  # a bare decoder needs no tower
    with (
        vlmprune.applied(model, policy),
        pytest.raises(SignalError, match="[Aa]pply first, then encode"),
        torch.no_grad(),
    ):
        ids = prompt.inputs | {"pixel_values": None}
        model(**ids)  # placeholders, but no images of this call
