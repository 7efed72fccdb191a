"""Fast functional forward passes that read the parameters of the stock transformers modules.

They exist for training on a CPU: bf16 matrix products, float32 residual stream, plain softmax attention
(faster there than the fused kernel's backward), and only the tokens that are needed. `tests/embedded` checks
them against the stock modules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import GRID, PATCH_SIZE

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's normalisation, as in CLIPImageProcessor
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
CENTRE = 128.0


def patchify(images: Tensor) -> Tensor:
    """Cut uint8 `[B, 224, 224, 3]` into patches `[B, 196, 768]`, in the order of the patch embedding."""
    batch = images.shape[0]
    cut = images.reshape(batch, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(batch, GRID * GRID, -1)


def embed_patches(tower: Any, patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Patch embedding of raw pixels `[B, P, 768]` by a CLIP tower."""
    return embed_pixels(tower.embeddings.patch_embedding.weight, patches, dtype)


def embed_pixels(weight: Tensor, patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of raw pixels `[B, P, 768]` and kernels `[C, 3, 16, 16]`, with CLIP's normalisation folded into them."""
    mean = torch.tensor(PIXEL_MEAN, device=weight.device).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=weight.device).view(1, 3, 1, 1)
    scaled = weight / (255.0 * std)
    # Pixels are centred before the product, so that little is lost to rounding in bf16.
    bias = (scaled * (CENTRE - 255.0 * mean)).sum(dim=(1, 2, 3))
    centred = patches.to(dtype) - CENTRE
    return F.linear(centred, scaled.flatten(1).to(dtype)).float() + bias


def tower_features(
    tower: Any, patches: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Output of the last block but one (`hidden_states[-2]`) with CLS first.

    Args:
        tower: CLIP vision transformer of the model.
        patches: uint8 `[B, P, 768]` from `patchify`, already reduced to the chosen patches.
        index: patch number of each row, int64 `[B, P]`; None means all 196 in order.
        dtype: dtype of the matrix products.

    Returns:
        float32 `[B, 1 + P, C]`.
    """
    embeddings = tower.embeddings
    x = embed_patches(tower, patches, dtype)
    positions = embeddings.position_embedding.weight
    x = x + (positions[1:] if index is None else positions[1:][index])
    cls = (embeddings.class_embedding + positions[0]).expand(x.shape[0], 1, -1)
    x = layer_norm(torch.cat([cls, x], dim=1), tower.pre_layrnorm)
    for layer in tower.encoder.layers[:-1]:
        x = _clip_block(layer, x, x, dtype)
    return x


def tower_pooled(tower: Any, features: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`pooler_output` `[B, C]` from the features `[B, 1 + P, C]`: the last block for the CLS query only."""
    cls = _clip_block(tower.encoder.layers[-1], features[:, :1], features, dtype)
    return layer_norm(cls[:, 0], tower.post_layernorm)


def project(projector: Any, features: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The stock two-layer projector, float32 out."""
    hidden = F.gelu(linear(features.to(dtype), projector.linear_1, dtype))
    return linear(hidden, projector.linear_2, dtype).float()


def _clip_block(layer: Any, x: Tensor, context: Tensor, dtype: torch.dtype) -> Tensor:
    """One CLIP block for the queries `x`, which are the first tokens of `context`."""
    attention = layer.self_attn
    batch, length, width = x.shape
    heads, head_dim = attention.num_heads, width // attention.num_heads
    normed = layer_norm(context, layer.layer_norm1).to(dtype)
    scale = 1 / math.sqrt(head_dim)
    q = linear(normed[:, :length], attention.q_proj, dtype).view(batch, length, heads, head_dim).transpose(1, 2)
    k = linear(normed, attention.k_proj, dtype).view(batch, -1, heads, head_dim).transpose(1, 2)
    v = linear(normed, attention.v_proj, dtype).view(batch, -1, heads, head_dim).transpose(1, 2)
    weights = torch.softmax((q * scale) @ k.transpose(2, 3), dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + linear(mixed, attention.out_proj, dtype)
    hidden = F.relu(linear(layer_norm(x, layer.layer_norm2).to(dtype), layer.mlp.fc1, dtype))
    return x + linear(hidden, layer.mlp.fc2, dtype)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    """A `nn.LayerNorm` in float32."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def linear(x: Tensor, module: Any, dtype: torch.dtype) -> Tensor:
    """A `nn.Linear` with its weights rounded to `dtype`."""
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(x, module.weight.to(dtype), bias)
