"""FLOPs of a decoder's prefill and of a vision tower: what a FLOP counter sees, by formula."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune.core.info import ModelInfo


def decoder_flops(
    info: ModelInfo, lengths: Sequence[int], rows: int = 1, attended: Sequence[int] | None = None
) -> float | None:
    """FLOPs (2 per multiply-add) of the decoder layers over a prompt.

    Per layer with n tokens, width d, H heads and G key heads of size h, an MLP of width m with a gate, and attention
    over a of them: ``2 n d h (2 H + 2 G) + 6 n d m + 4 a^2 H h``. Attention counts the full square of scores, as
    PyTorch's FLOP counter does for fused attention (the causal half that is computed costs half as much). Norms,
    rotary embedding, softmax, the embedding table and the LM head are left out.

    Args:
        info: the model.
        lengths: tokens that enter each layer, padding included.
        rows: batch size.
        attended: tokens that each layer's attention is over, where merged tokens stand at several places; default
            ``lengths``.

    Returns:
        The FLOPs, None where the model's sizes are not known or its layers have no gated MLP.
    """
    sizes = (info.text_hidden, info.text_heads, info.text_kv_heads, info.text_head_dim, info.text_ffn)
    if None in sizes:
        return None
    width, heads, kv_heads, head_dim, ffn = (size or 0 for size in sizes)
    per_token = 2 * width * head_dim * (2 * heads + 2 * kv_heads) + 6 * width * ffn
    pairs = zip(lengths, lengths if attended is None else attended, strict=True)
    return float(rows * sum(n * per_token + 4 * a * a * heads * head_dim for n, a in pairs))


def tower_flops(info: ModelInfo, attended: Sequence[float], passed: Sequence[float], views: int = 1) -> float | None:
    """FLOPs (2 per multiply-add) of a vision tower's blocks.

    Per block of width d and MLP width m, with n tokens in the attention and k in the MLP:
    ``8 n d^2 + 4 n^2 d + 4 k d m`` (``6 k d m`` with a gate). Patch embedding, norms and the head are left out;
    attention inside windows counts as if over the whole view.

    Args:
        info: the model.
        attended: tokens of a view, prefix included, in each block's attention.
        passed: tokens in each block's MLP; a merge in the middle of a block makes them fewer.
        views: how many.

    Returns:
        The FLOPs, None where the tower's sizes are not known.
    """
    if info.vision_hidden is None or info.vision_ffn is None:
        return None
    width, ffn = info.vision_hidden, info.vision_ffn
    mlp = (6 if info.vision_gated else 4) * width * ffn
    pairs = zip(attended, passed, strict=True)
    return float(views * sum(8 * n * width**2 + 4 * n * n * width + k * mlp for n, k in pairs))
