"""DyMU's virtual unmerging against `tests/golden/dymu.npz`, made with the authors' functions.

Golden kind and settings: `vtu` -> `kernels.virtual_attention` (both implementations), its exact decomposition, which is
written out here, and a stock Llama layer through `vlmprune.apply` with `positions="virtual"`, whose projections give
the case's queries, keys and values; prefill, cache and one decoding step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fixed_policy import FixedGroups
from golden_io import Case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import vlmprune
from vlmprune.kernels.virtual_attention import expand, virtual_attention

BACKENDS = ("reference", "torch")


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def tables(case: Case, places: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[places, d]``, float64."""
    width = case.inputs["q"].shape[-1]
    frequency = float(case.params["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(places, dtype=torch.float64)[:, None] * torch.cat([frequency, frequency])
    return angle.cos(), angle.sin()


def close(got: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.float(), tensor(expected), atol=tolerance, rtol=0)


@pytest.mark.golden("dymu", "vtu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel(case: Case, backend: str) -> None:
    q, k, v = (tensor(case.inputs[name]) for name in "qkv")
    mapping = tensor(case.inputs["mapping"])
    n, total = q.shape[2], len(mapping)
    cos, sin = (table.float() for table in tables(case, total + 1))
    merged = virtual_attention(q, k, v, mapping, cos[:-1], sin[:-1], backend=backend)
    close(merged, case.outputs["attn_unique"])
    # Every place asked for by itself: nothing is averaged.
    each = virtual_attention(
        expand(q, mapping), k, v, mapping, cos[:-1], sin[:-1], queries=torch.arange(total), backend=backend
    )
    close(each, case.outputs["attn_full"])
    new_q, new_k, new_v = (tensor(case.inputs[f"decode_{name}"]) for name in "qkv")
    step = virtual_attention(
        new_q,
        torch.cat([k, new_k], 2),
        torch.cat([v, new_v], 2),
        torch.cat([mapping, torch.tensor([n])]),
        cos,
        sin,
        queries=torch.zeros(1, dtype=torch.long),
        backend=backend,
    )
    close(step, case.outputs["decode"])


@pytest.mark.golden("dymu", "vtu")
def test_exact_decomposition(case: Case) -> None:
    """Scores from products of unique tokens and angles of places, without rotated copies, give the same attention."""
    q, k, v = (tensor(case.inputs[name]).double() for name in "qkv")
    mapping = tensor(case.inputs["mapping"])
    n, total, half = q.shape[2], len(mapping), q.shape[3] // 2
    cos, sin = (table[:, :half] for table in tables(case, total))
    (q1, q2), (k1, k2) = q[:, :, :, None].chunk(2, -1), k[:, :, None].chunk(2, -1)
    dot, cross = q1 * k1 + q2 * k2, q2 * k1 - q1 * k2  # [1, H, n, n, d / 2] of unique pairs
    pair = mapping[:, None], mapping[None]
    same = cos[:, None] * cos + sin[:, None] * sin  # [N, N, d / 2]
    turned = cos[:, None] * sin - sin[:, None] * cos
    scores = (dot[:, :, pair[0], pair[1]] * same + cross[:, :, pair[0], pair[1]] * turned).sum(-1)
    scores = scores * q.shape[3] ** -0.5
    if "scores" in case.outputs:
        close(scores, case.outputs["scores"])
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    full = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[:, :, mapping]
    close(full, case.outputs["attn_full"])
    one_hot = torch.nn.functional.one_hot(mapping, n).double()
    mean = (one_hot / one_hot.sum(0)).T @ full
    close(mean, case.outputs["attn_unique"])
    got = virtual_attention(q, k, v, mapping, *tables(case, total))
    torch.testing.assert_close(got, mean, atol=1e-12, rtol=0)


@pytest.mark.golden("dymu", "vtu")
def test_repeated_tokens(case: Case) -> None:
    """`repeat_merged_tokens`: every place's token."""
    tracking = tensor(case.inputs["pos_tracking"])  # [1, M, N]
    got = expand(tensor(case.inputs["merged"]), tracking.argmax(1), dim=1)
    assert torch.equal(got, tensor(case.outputs["repeated"]))


class Projected:
    """Gives a case's queries, keys and values in place of a layer's projections, and keeps what its attention returns.

    Our tokens stand in the order of their first places; ``order [n]`` are these tokens' numbers in the case.
    """

    def __init__(self, attention: nn.Module, case: Case, order: Tensor) -> None:
        self.case, self.order = case, order
        self.step = False
        for name in "qkv":
            getattr(attention, f"{name}_proj").register_forward_hook(partial(self._give, name))
        attention.o_proj.register_forward_pre_hook(self._take)

    def _give(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given = tensor(self.case.inputs[f"decode_{name}" if self.step else name])
        if not self.step:
            given = given[:, :, self.order]
        assert given.shape[2] == output.shape[1]
        return given.transpose(1, 2).flatten(2)

    def _take(self, module: nn.Module, args: Any) -> None:
        heads = self.case.inputs["q"].shape[1]
        self.output = args[0].unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.golden("dymu", "vtu")
@pytest.mark.filterwarnings("ignore:.*nothing was reduced")
@torch.no_grad()
def test_through_a_stock_layer(case: Case) -> None:
    mapping = tensor(case.inputs["mapping"])
    heads, n, width = case.inputs["q"].shape[1:]
    start, length = case.integer("n_text_before"), case.integer("n_img")
    hidden = heads * width
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_theta=float(case.params["rope_theta"]),
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).eval()
    order = torch.tensor(list(dict.fromkeys(mapping.tolist())))  # by first place
    projected = Projected(model.layers[0].self_attn, case, order)
    image = mapping[start : start + length]
    names = {token: i for i, token in enumerate(sorted(set(image.tolist())))}
    groups = FixedGroups(kept=(tuple(names[token] for token in image.tolist()),))
    embeds = torch.randn(1, len(mapping) + 1, hidden, generator=torch.Generator().manual_seed(0))
    with vlmprune.applied(model, groups, spans=[[(start, length)]]) as handle:
        cache = model(inputs_embeds=embeds[:, :-1], use_cache=True).past_key_values
        close(projected.output, case.outputs["attn_unique"][:, :, order])
        assert handle.last.lengths_per_layer == (n,)
        # The cache holds the keys of unique tokens as they are.
        assert torch.equal(cache.layers[0].keys, tensor(case.inputs["k"])[:, :, order])
        projected.step = True
        model(inputs_embeds=embeds[:, -1:], past_key_values=cache, use_cache=True)
        close(projected.output, case.outputs["decode"])
        assert cache.layers[0].keys.shape[2] == n + 1
