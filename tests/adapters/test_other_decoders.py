"""Decoder signals of layers that are built otherwise: second norms, query norms, windows, multi-axis positions.

The recorders alone, without an adapter family, on stock models with eager attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from vlmprune.adapters import tap
from vlmprune.adapters.call import Prefill
from vlmprune.adapters.forward import new_prefill
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.layout import from_spans
from vlmprune.adapters.probe import LayerProbe
from vlmprune.adapters.text_signals import LayerRecorder
from vlmprune.adapters.transitions import TransitionRecorder
from vlmprune.core import signals as s
from vlmprune.core.report import Report

ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
# Text model and config, and the extra settings that make its layers special.
MODELS = {
    "Gemma2": ("Gemma2Model", "Gemma2Config", {"head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": None}),
    "Gemma3": ("Gemma3TextModel", "Gemma3TextConfig", {"head_dim": 8, "sliding_window": 64}),
    "Qwen3": ("Qwen3Model", "Qwen3Config", {"head_dim": 8}),
    "Qwen2_5_VL": ("Qwen2_5_VLTextModel", "Qwen2_5_VLTextConfig", {"rope_scaling": ROPE}),
    "Qwen3VL": ("Qwen3VLTextModel", "Qwen3VLTextConfig", {"head_dim": 8, "rope_scaling": ROPE}),
    "Llama": ("LlamaModel", "LlamaConfig", {}),
}
# Per module, the layer's modules whose outputs enter and leave it.
PLAIN = {"attn": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
GEMMA = {
    "attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
LAYER, START, N, LENGTH = 1, 3, 6, 14


def build(name: str) -> nn.Module:
    model_name, config_name, extra = MODELS[name]
    cls: Any = getattr(transformers, model_name, None)
    if cls is None:  # the text models of Qwen are not exported by every version
        module = {"Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[name]
        cls = getattr(getattr(transformers.models, module), f"modeling_{module}").__dict__[model_name]
    config_cls: Any = getattr(transformers, config_name, None) or cls.config_class
    torch.manual_seed(0)
    config = config_cls(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attn_implementation="eager",
        **extra,
    )
    model = cls(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


class Watch:
    """What enters layer ``LAYER`` and what its modules return."""

    def __init__(self, layer: nn.Module) -> None:
        self.outputs: dict[str, Tensor] = {}
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, module in layer.named_children():
            module.register_forward_hook(partial(self._leave, name))

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.hidden, self.kwargs = args[0] if args else kwargs["hidden_states"], kwargs

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs[name] = output[0] if isinstance(output, tuple) else output


def prompt() -> tuple[dict[str, Tensor], Prefill]:
    """Two rows, the first one padded by two tokens on the left."""
    embeds = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    layout = from_spans([[(START, N)]], 2, LENGTH, mask)
    return given, new_prefill(layout, given, embeds, Report("test", None))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_probe_and_transitions(name: str) -> None:
    model = build(name)
    given, call = prompt()
    if "VL" in name:
        axes = torch.stack([given["position_ids"] + i for i in range(3)])  # three axes that differ
        given["position_ids"] = axes
    layer, watch = model.layers[LAYER], Watch(model.layers[LAYER])
    hooks, signals = HookStack(), [s.ModuleTransition(LAYER, "attn"), s.ModuleTransition(LAYER, "mlp")]
    for signal in signals:
        TransitionRecorder(signal, lambda: call).install(layer, hooks)
    attention = model(**given, output_attentions=True).attentions[LAYER].mean(1)

    real = given["attention_mask"].bool()
    for signal in signals:
        into, out = (watch.outputs[part] for part in (GEMMA if "Gemma" in name else PLAIN)[signal.module])
        tokens, (ratio, cosine) = call.signals[signal]
        assert torch.equal(tokens.valid, real)
        assert torch.allclose(ratio, out.norm(dim=-1) / into.norm(dim=-1), rtol=1e-5)
        assert torch.allclose(cosine, torch.cosine_similarity(into, out, dim=-1), atol=1e-6)

    call.signals.clear()
    wanted = [s.ProbeAttention(LAYER, "last"), s.ProbeAttention(LAYER, "text_after"), s.AttentionRows("text", LAYER)]
    recorder = LayerRecorder(wanted, lambda: call)
    tap.install(layer.self_attn, recorder, hooks)
    watch.outputs.clear()
    LayerProbe(layer, recorder).run(watch.hidden, watch.kwargs)
    assert set(call.signals) == set(wanted[:2]) and not recorder.probing
    assert not {"self_attn", "mlp"} & set(watch.outputs)  # nothing behind queries and keys was computed
    after = START + N
    assert torch.allclose(call.signals[wanted[0]][1], attention[:, -1:], atol=1e-6)
    assert torch.allclose(call.signals[wanted[1]][1], attention[:, after:], atol=1e-6)
    hooks.remove()
    assert torch.equal(model(**given, output_attentions=True).attentions[LAYER].mean(1), attention)
