"""Fast functional decoder pass for training: one visual prefix, many question branches.

All branches of an image see its prefix but not each other, and their positions restart after the prefix, so
ten questions cost one prefix. Reads the parameters of the stock Llama modules; `tests/embedded` checks it
against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DecoderOutput:
    """Final hidden states of the branches, and what the training aids look at.

    Attributes:
        hidden: float32 `[B, Q, T, C]` after the final norm.
        attention: float32 `[B, Q, H, T, P]`, weights from branch tokens to the prefix at the watched layer.
        first: float32 `[B, P, C]`, the prefix after the first layer.
    """

    hidden: Tensor
    attention: Tensor
    first: Tensor


@dataclass(frozen=True)
class Layout:
    """Rotary tables and masks of one prefix with branches.

    Attributes:
        cos, sin: `[T', D]` or `[B, 1, T', D]` for the prefix and all branch tokens.
        n_prefix, n_branch, length: tokens of the prefix, branches, tokens of a branch.
    """

    cos: Tensor
    sin: Tensor
    n_prefix: int
    n_branch: int
    length: int


def decode(
    decoder: Any,
    prefix: Tensor,
    branches: Tensor,
    watch_layer: int,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.bfloat16,
    tables: tuple[Tensor, Tensor] | None = None,
) -> DecoderOutput:
    """Run a Llama-like decoder over a shared prefix and its branches.

    Args:
        decoder: `LlamaModel` or the text model of Qwen2.5-VL, with equal numbers of heads and key/value heads.
        prefix: float32 embeddings `[B, P, C]`.
        branches: token ids `[B, Q, T]`, padded on the right.
        watch_layer: 0-based layer whose attention is returned.
        theta: rotary base.
        dtype: dtype of the matrix products.
        tables: cosine and sine `[B, 1, P + Q * T, D]` where positions are not simply counted.
    """
    n_prefix, (_, n_branch, length) = prefix.shape[1], branches.shape
    x = torch.cat([prefix, decoder.embed_tokens(branches).flatten(1, 2)], dim=1)  # [B, P + Q*T, C]
    if tables is None:
        positions = torch.cat([torch.arange(n_prefix), n_prefix + torch.arange(length).repeat(n_branch)])
        tables = rotary(positions, x.shape[-1] // decoder.config.num_attention_heads, theta, dtype)
    layout = Layout(*tables, n_prefix, n_branch, length)
    watched = first = x.new_zeros(())
    for number, layer in enumerate(decoder.layers):
        x, attention = decoder_layer(layer, x, layout, decoder.config.num_attention_heads, dtype)
        watched = attention if number == watch_layer else watched
        first = x[:, :n_prefix] if number == 0 else first
    hidden = rms_norm(x[:, n_prefix:], decoder.norm).view(len(prefix), n_branch, length, -1)
    return DecoderOutput(hidden, watched.permute(0, 2, 1, 3, 4).float(), first)


def decoder_layer(layer: Any, x: Tensor, layout: Layout, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer over `[B, P + Q * T, C]`, and the attention from branches to the prefix `[B, H, Q, T, P]`."""
    batch, _, width = x.shape
    head_dim, n_prefix, n_branch, length = width // heads, layout.n_prefix, layout.n_branch, layout.length
    minus = torch.finfo(dtype).min
    prefix_mask = torch.full((n_prefix, n_prefix), minus, dtype=dtype).triu(1)
    branch_mask = torch.full((length, length), minus, dtype=dtype).triu(1)
    normed = rms_norm(x, layer.input_layernorm).to(dtype)
    attention = layer.self_attn
    q, k, v = (
        linear(normed, m).view(batch, -1, heads, head_dim).transpose(1, 2)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rotate(q, layout.cos, layout.sin) * (1 / math.sqrt(head_dim)), rotate(k, layout.cos, layout.sin)
    k_prefix, v_prefix = k[:, :, :n_prefix], v[:, :, :n_prefix]
    own = torch.softmax(q[:, :, :n_prefix] @ k_prefix.transpose(2, 3) + prefix_mask, dim=-1) @ v_prefix
    q_branch, k_branch, v_branch = (
        t[:, :, n_prefix:].reshape(batch, heads, n_branch, length, head_dim) for t in (q, k, v)
    )
    to_prefix = (q_branch.flatten(2, 3) @ k_prefix.transpose(2, 3)).view(batch, heads, n_branch, length, n_prefix)
    to_own = q_branch @ k_branch.transpose(3, 4) + branch_mask
    weights = torch.softmax(torch.cat([to_prefix, to_own], dim=-1), dim=-1)
    on_prefix, on_own = weights[..., :n_prefix], weights[..., n_prefix:]
    mixed = (on_prefix.flatten(2, 3) @ v_prefix) + (on_own @ v_branch).flatten(2, 3)
    out = torch.cat([own, mixed], dim=2).transpose(1, 2).reshape(batch, -1, width)
    x = x + linear(out, attention.o_proj)
    normed = rms_norm(x, layer.post_attention_layernorm).to(dtype)
    hidden = F.relu(linear(normed, layer.mlp.gate_proj)) * linear(normed, layer.mlp.up_proj)
    return x + linear(hidden, layer.mlp.down_proj), on_prefix


def linear(x: Tensor, module: Any) -> Tensor:
    """A stock linear layer in the dtype of its input."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables `[T, D]` of Llama's rotary embedding."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = positions[:, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class _RmsNorm(torch.autograd.Function):
    """RMS norm whose backward recomputes nothing: less memory traffic than the composed operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, weight = ctx.saved_tensors
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0)
        inner = (product @ weight)[..., None] / unit.shape[-1]
        return (grad * weight).addcmul_(unit, inner, value=-1.0).mul_(inverse), grad_weight, None


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """RMS norm with the weight and epsilon of a stock norm module."""
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
