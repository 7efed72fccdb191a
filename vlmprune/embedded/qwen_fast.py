"""Fast functional forward pass of Qwen2.5-VL's vision tower for training on a CPU.

Reads the parameters of the stock transformers modules: bf16 matrix products, plain softmax attention, windows
as a batch dimension instead of a loop over windows. `tests/embedded` checks it against the stock modules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fastdecoder import linear, rms_norm, rotate
from .fastpath import CENTRE, PIXEL_MEAN, PIXEL_STD

VISION_THETA = 10000.0


def cut_patches(images: Tensor, patch: int, merge: int) -> Tensor:
    """Cut uint8 `[B, H, W, 3]` into `[B, h, w, merge * merge, 3 * patch * patch]`, a cell per visual token.

    Sides must be multiples of `patch * merge`; the order is that of `Qwen2VLImageProcessor` for one frame.
    """
    batch, height, width, _ = images.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = images.reshape(batch, rows, merge, patch, columns, merge, patch, 3)
    return cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows, columns, merge * merge, -1)


def visual_tokens(visual: Any, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the tower with its merger gives for equally large images.

    Args:
        visual: vision model of Qwen2.5-VL.
        images: uint8 `[B, H, W, 3]`.
        dtype: dtype of the matrix products and of the attention weights.

    Returns:
        float32 `[B, h, w, C]`, one row per visual token, in raster order.
    """
    return merge_cells(visual.merger, tower_cells(visual, images, dtype), dtype)


def tower_cells(visual: Any, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Output of the last block, the patches of a visual token side by side: float32 `[B, h, w, 4, D]`."""
    config = visual.config
    merge, patch = config.spatial_merge_size, config.patch_size
    x = _embed(visual, cut_patches(images, patch, merge), dtype)
    rows, columns, width = x.shape[1], x.shape[2], x.shape[-1]
    turns = _rotary(rows, columns, merge, width // config.num_heads, dtype)
    side = config.window_size // (patch * merge)
    for number, block in enumerate(visual.blocks):
        normed = rms_norm(x, block.norm1).to(dtype)
        mixed = _attend(block.attn, normed, turns, None if number in config.fullatt_block_indexes else side)
        x = x + linear(mixed, block.attn.proj)
        normed = rms_norm(x, block.norm2).to(dtype)
        hidden = F.relu(linear(normed, block.mlp.gate_proj)) * linear(normed, block.mlp.up_proj)
        x = x + linear(hidden, block.mlp.down_proj)
    return x


def merge_cells(merger: Any, cells: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The stock merger on `[..., 4, D]`: float32 `[..., C]`."""
    joined = rms_norm(cells, merger.ln_q).to(dtype).flatten(-2)
    return linear(F.gelu(linear(joined, merger.mlp[0])), merger.mlp[2]).float()


def _embed(visual: Any, patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Patch embedding of raw pixels: a still image fills both frames, CLIP's normalisation is folded in."""
    weight = visual.patch_embed.proj.weight.sum(2)  # [D, 3, P, P]
    mean = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
    scaled = weight / (255.0 * std)
    bias = (scaled * (CENTRE - 255.0 * mean)).sum(dim=(1, 2, 3))
    # Pixels are centred before the product, so that little is lost to rounding in bf16.
    return F.linear(patches.to(dtype) - CENTRE, scaled.flatten(1).to(dtype)).float() + bias


def _rotary(rows: int, columns: int, merge: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[h, w, merge * merge, 1, head_dim]` of the row and column of every patch."""
    half = head_dim // 2
    frequency = VISION_THETA ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    row = torch.arange(rows * merge).view(rows, 1, merge, 1).expand(rows, columns, merge, merge)
    column = torch.arange(columns * merge).view(1, columns, 1, merge).expand(rows, columns, merge, merge)
    angle = torch.cat([row.flatten(2)[..., None] * frequency, column.flatten(2)[..., None] * frequency], dim=-1)
    angle = torch.cat([angle, angle], dim=-1)[..., None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _attend(attention: Any, x: Tensor, turns: tuple[Tensor, Tensor], side: int | None) -> Tensor:
    """Self-attention over `[B, h, w, 4, D]`: within windows of `side` x `side` cells, or over everything."""
    batch, rows, columns, parts, width = x.shape
    heads = attention.num_heads
    head_dim = width // heads
    qkv = linear(x, attention.qkv).view(batch, rows, columns, parts, 3, heads, head_dim)
    cos, sin = (t[..., None, :, :] for t in turns)
    qk = rotate(qkv[..., :2, :, :], cos, sin)
    q, k, v = qk[..., 0, :, :] * (1 / math.sqrt(head_dim)), qk[..., 1, :, :], qkv[..., 2, :, :]
    if side is None:
        return _softmax_mix(*(t.reshape(batch, -1, heads, head_dim) for t in (q, k, v))).view(x.shape)
    strips = []
    for top, bottom, height in _spans(rows, side):
        blocks = []
        for left, right, breadth in _spans(columns, side):
            shape = (batch, (bottom - top) // height, height, (right - left) // breadth, breadth, parts)
            windows = (
                t[:, top:bottom, left:right]
                .reshape(*shape, heads, head_dim)
                .transpose(2, 3)
                .flatten(0, 2)
                .flatten(1, 3)
                for t in (q, k, v)
            )
            mixed = _softmax_mix(*windows).view(*shape[:2], shape[3], height, breadth, parts, width)
            blocks.append(mixed.transpose(2, 3).reshape(batch, bottom - top, right - left, parts, width))
        strips.append(torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0])
    return torch.cat(strips, dim=1) if len(strips) > 1 else strips[0]


def _spans(length: int, side: int) -> list[tuple[int, int, int]]:
    """Start, end and window size of the whole windows along an axis and of the smaller one that is left over."""
    whole = length // side * side
    spans = [(0, whole, side)] if whole else []
    return spans + ([(whole, length, length - whole)] if whole < length else [])


def _softmax_mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over `[N, L, H, D]` with scaled queries; `[N, L, H * D]`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v).transpose(1, 2).flatten(2)


def mrope_tables(
    positions: Tensor, head_dim: int, sections: tuple[int, ...], theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, T, D]` of the decoder's rotary embedding for positions `[3, B, T]`.

    The frequencies of a head are dealt out to time, height and width in `sections`, which add up to `D / 2`.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    angle = positions[axis].permute(1, 2, 0).float() * frequency  # [B, T, D / 2]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def prompt_positions(kept: Tensor, grid: tuple[int, int], before: int, after: int, branches: tuple[int, int]) -> Tensor:
    """Positions `[3, B, before + V + after + Q * T]` that Qwen2.5-VL gives to a prompt with one image.

    Args:
        kept: numbers of the visual tokens present `[B, V]`, ascending; pruning leaves positions as they were.
        grid: rows and columns of visual tokens.
        before: text tokens before the image.
        after: text tokens between image and branches.
        branches: number of branches and their length; each continues right after the prefix.
    """
    rows, columns = grid
    visual = before + torch.stack([torch.zeros_like(kept), kept // columns, kept % columns])
    start = before + max(rows, columns)
    tail = torch.cat([torch.arange(after), after + torch.arange(branches[1]).repeat(branches[0])]) + start
    shape = (3, len(kept), -1)
    return torch.cat([torch.arange(before).expand(shape), visual, tail.expand(shape)], dim=-1)
