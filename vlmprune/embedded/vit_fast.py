"""Fast functional forward pass of `tiny-vit` for training on a CPU; see `fastpath.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fastpath import embed_pixels, layer_norm, linear


def vit_features(
    model: Any, patches: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """What enters the last block of the stock timm model, from all or some patches, class token first.

    Args:
        model: built by `vit_model`.
        patches: uint8 `[B, P, 768]` from `patchify`, already reduced to the chosen patches.
        index: patch number of each row, int64 `[B, P]`; None means all 196 in order.
        dtype: dtype of the matrix products.

    Returns:
        float32 `[B, 1 + P, C]`.
    """
    positions = model.pos_embed[0]
    x = embed_pixels(model.patch_embed.proj.weight, patches, dtype)
    x = x + (positions[1:] if index is None else positions[1:][index])
    cls = (model.cls_token[0] + positions[:1]).expand(x.shape[0], 1, -1)
    x = layer_norm(torch.cat([cls, x], dim=1), model.norm_pre)
    for block in model.blocks[:-1]:
        x = _block(block, x, x, dtype)
    return x


def vit_logits(model: Any, features: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Class logits `[B, 10]`, float32, from `vit_features`: the last block for the class token only."""
    cls = _block(model.blocks[-1], features[:, :1], features, dtype)
    return linear(layer_norm(cls[:, 0], model.norm).to(dtype), model.head, dtype).float()


def _block(block: Any, x: Tensor, context: Tensor, dtype: torch.dtype) -> Tensor:
    """One block for the queries `x`, which are the first tokens of `context`."""
    attention = block.attn
    batch, length, width = x.shape
    heads, head_dim = attention.num_heads, attention.head_dim
    normed = layer_norm(context, block.norm1).to(dtype)
    qkv = linear(normed, attention.qkv, dtype).view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0][:, :, :length], qkv[1], qkv[2]
    weights = torch.softmax((q * (1 / math.sqrt(head_dim))) @ k.transpose(2, 3), dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + linear(mixed, attention.proj, dtype)
    hidden = F.relu(linear(layer_norm(x, block.norm2).to(dtype), block.mlp.fc1, dtype))
    return x + linear(hidden, block.mlp.fc2, dtype)
