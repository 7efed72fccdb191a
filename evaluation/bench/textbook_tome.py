"""A plain ToMe to compare with: attention written out, a full sort, and sums by scattering.

Bipartite soft matching as in "Token Merging: Your ViT But Faster" (arXiv 2210.09461) on timm's ``VisionTransformer``,
in the form in which it is usually written: the attention matrix exists, because the sizes of merged tokens are added
to its scores; every merge gathers, scatters and divides all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TextbookToMe:
    """A timm model with a class token, run with merging; the model itself stays as it is.

    Args:
        model: ``timm.models.VisionTransformer`` with one prefix token, in eval mode.
        r: tokens merged per block, at most half of those that are left without the class token.
    """

    def __init__(self, model: Any, r: int) -> None:
        self.model = model
        self.r = r

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of ``images [B, 3, H, W]``."""
        model, size = self.model, None
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for block in model.blocks:
            mixed, keys = attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(mixed))
            r = min(self.r, (x.shape[1] - 1) // 2)
            if r > 0:
                x, size = merge(x, keys, torch.ones_like(x[..., :1]) if size is None else size, r)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))


def attend(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention, and the keys averaged over heads.

    Args:
        attention: ``timm.layers.Attention``.
        x: ``[B, N, D]``.
        size: ``[B, N, 1]`` tokens behind each token, None for one each.
    """
    batch, n, _ = x.shape
    q, k, v = attention.qkv(x).reshape(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = (q * attention.scale) @ k.mT  # [B, H, N, N]
    if size is not None:
        scores = scores + size.log()[:, None, None, :, 0]
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, -1)
    return attention.proj_drop(attention.proj(attention.norm(mixed))), k.mean(1)


def merge(x: Tensor, keys: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge the ``r`` best pairs; the class token stays in front. Returns tokens ``[B, N - r, D]`` and their sizes."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = unit[:, 0::2] @ unit[:, 1::2].mT
    cosine[:, 0] = -torch.inf
    best, partner = cosine.max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, left = order[:, :r], order[:, r:].sort(-1).values
    partner = partner.gather(1, gone)

    def combined(values: Tensor) -> Tensor:
        even, odd = values[:, 0::2], values[:, 1::2]
        wide = values.shape[-1]
        moved = even.gather(1, gone[..., None].expand(-1, -1, wide))
        sums = odd.scatter_reduce(1, partner[..., None].expand(-1, -1, wide), moved, "sum")
        return torch.cat([even.gather(1, left[..., None].expand(-1, -1, wide)), sums], 1)

    total = combined(size)
    return combined(x * size) / total, total
