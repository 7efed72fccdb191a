"""ToMe by its definition: explicit softmax with ``log(size)``, matching in Python loops, sums over lists of members.

Models give their embedded tokens, norms and MLPs; attention, matching, merging and pooling are written out here, in
the dtype of the model (float64 in the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of one image, ``[H, T, d]``."""


@dataclass
class Image:
    """One image's tokens.

    Attributes:
        states: ``[T, D]``.
        members: the tokens that entered behind each of them.
    """

    states: Tensor
    members: list[list[int]] = field(default_factory=list)

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([len(m) for m in self.members], dtype=self.states.dtype)


@dataclass
class Block:
    """What one block computes: ``attend(normed heads' mix [T, H * d])`` and so on, all over one image."""

    heads: Callable[[Tensor, list[list[int]]], Heads]
    norm1: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def match(metric: Tensor, r: int, prefix: int) -> list[int]:
    """Output of every token of one image, by bipartite soft matching of even and odd places."""
    n = len(metric)
    unit = metric / metric.norm(dim=1, keepdim=True)
    a = [t for t in range(0, n, 2) if t >= prefix]
    b = [t for t in range(1, n, 2) if t >= prefix]
    best = {t: max((float(unit[t] @ unit[o]), -o) for o in b) for t in a} if b else {}
    ranked = sorted(best, key=lambda t: (-best[t][0], t))
    merged = ranked[: min(r, (n - prefix) // 2)]
    left = ranked[len(merged) :]
    if not merged:
        return list(range(n))
    if prefix:
        left = sorted(left)
    order = [*range(min(prefix, n)), *left, *b]
    place = {token: i for i, token in enumerate(order)}
    for token in merged:
        place[token] = place[-best[token][1]]
    return [place[token] for token in range(n)]


def run_block(block: Block, image: Image, r: int, prefix: int, prop_attn: bool = True) -> Image:
    """One block with a merge of ``r`` tokens between its attention and its MLP."""
    query, key, value = block.heads(block.norm1(image.states), image.members)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if prop_attn:
        scores = scores + image.sizes.log()
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    states = image.states + block.project(mixed)
    image = merge(Image(states, image.members), match(key.mean(0), r, prefix)) if r else Image(states, image.members)
    return Image(image.states + block.mlp(image.states), image.members)


def merge(image: Image, place: Sequence[int]) -> Image:
    """Tokens of one place become their mean, each as often as it has members."""
    members: list[list[int]] = [[] for _ in range(max(place) + 1)]
    sums = image.states.new_zeros(len(members), image.states.shape[1])
    for token, to in enumerate(place):
        sums[to] += image.states[token] * len(image.members[token])
        members[to] += image.members[token]
    counts = torch.tensor([len(m) for m in members], dtype=sums.dtype)
    return Image(sums / counts[:, None], members)


def run_blocks(
    blocks: Sequence[Block], embedded: Tensor, schedule: Sequence[int], prefix: int, prop_attn: bool = True
) -> list[Image]:
    """All images of ``embedded [V, T, D]`` through all blocks; ``schedule`` is r per block."""
    images = []
    for states in embedded:
        image = Image(states, [[t] for t in range(len(states))])
        for block, r in zip(blocks, schedule, strict=True):
            image = run_block(block, image, r, prefix, prop_attn)
        images.append(image)
    return images


def unmerged(image: Image) -> Tensor:
    """Every token's copy of what it became, ``[T0, D]``."""
    full = image.states.new_zeros(sum(map(len, image.members)), image.states.shape[1])
    for token, members in enumerate(image.members):
        full[members] = image.states[token]
    return full


def split_heads(values: Tensor, heads: int) -> Tensor:
    """``[H, T, d]`` of ``[T, H * d]``."""
    return values.unflatten(1, (heads, -1)).transpose(0, 1)


def rotated(values: Tensor, table: Tensor, prefix: int, members: list[list[int]], half: bool = False) -> Tensor:
    """``values [H, T, d]`` turned by the angles of each token's first member.

    Args:
        values: queries or keys.
        table: sines, then cosines, ``[P, 2 * d]`` or one table per head.
        prefix: tokens that stay as they are.
        members: of every token.
        half: pairs are the first and the second half of ``d``, not neighbours.
    """
    turned = values.clone()
    for token in range(prefix, values.shape[1]):
        sine, cosine = table[..., min(members[token]) - prefix, :].chunk(2, -1)
        x = values[:, token]
        if half:
            swapped = torch.cat([-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1)
        else:
            swapped = torch.stack([-x[:, 1::2], x[:, 0::2]], -1).flatten(1)
        turned[:, token] = x * cosine + swapped * sine
    return turned


def timm_blocks(model: nn.Module) -> list[Block]:
    """Blocks of a timm ``VisionTransformer`` with ``Block`` or ``ResPostBlock``, or of an ``Eva``."""
    tables = [None] * len(model.blocks)
    if getattr(model, "rope", None) is not None:
        table = model.rope.get_embed()
        tables = list(table) if table.ndim == 4 else [table] * len(model.blocks)
    return [_timm_block(block, model, table) for block, table in zip(model.blocks, tables, strict=True)]


def _timm_block(block: nn.Module, model: nn.Module, table: Tensor | None) -> Block:
    post = type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm")
    scale1, scale2 = _scale(block, 1), _scale(block, 2)
    norm1 = block.norm1 if post else nn.Identity()
    norm2 = block.norm2 if post else nn.Identity()
    attention = block.attn

    def project(mixed: Tensor) -> Tensor:
        return scale1(norm1(attention.proj(attention.norm(mixed))))

    def mlp(states: Tensor) -> Tensor:
        return scale2(norm2(block.mlp(states if post else block.norm2(states))))

    return Block(
        heads=lambda states, members: _timm_heads(attention, states, members, model.num_prefix_tokens, table),
        norm1=nn.Identity() if post else block.norm1,
        project=project,
        mlp=mlp,
    )


def _scale(block: nn.Module, number: int) -> Callable[[Tensor], Tensor]:
    gamma = getattr(block, f"gamma_{number}", None)
    if gamma is not None:
        return lambda values: values * gamma
    return getattr(block, f"ls{number}", nn.Identity())


def _timm_heads(
    attention: nn.Module, states: Tensor, members: list[list[int]], prefix: int, table: Tensor | None
) -> Heads:
    if attention.qkv is None:
        found = [layer(states) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    else:
        found = list((states @ attention.qkv.weight.T).chunk(3, 1))
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        if bias is not None:
            found = [part + b for part, b in zip(found, bias.chunk(3), strict=True)]
    query, key, value = (split_heads(part, len(part[0]) // attention.head_dim) for part in found)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if table is not None:
        half = getattr(attention, "rotate_half", False)
        query, key = (rotated(x, table, prefix, members, half) for x in (query, key))
    shared = len(query) // len(key)  # queries per key
    return query, key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)


def timm_embedded(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens ``[V, T, D]`` as they enter the first block."""
    states = model._pos_embed(model.patch_embed(images))
    states = states[0] if isinstance(states, tuple) else states
    return model.norm_pre(states)


def timm_logits(model: nn.Module, images: Sequence[Image]) -> Tensor:
    """The head, with pooling written out over all patches that entered."""
    return torch.stack([_timm_head(model, model.norm(unmerged(image))) for image in images])


def _timm_head(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of one image from its tokens in full length: what each one became, copied to all its members."""
    if hasattr(model, "head_dist"):
        return (model.head(tokens[0]) + model.head_dist(tokens[1])) / 2
    whole = getattr(model, "pool_include_prefix", False)
    patches = tokens if whole else tokens[model.num_prefix_tokens :]
    if model.attn_pool is not None:
        patches = tokens if type(model).__name__ == "Eva" else patches
        pooled = model.attn_pool(patches[None])[0]
    else:
        pooled = {
            "token": lambda: tokens[0],
            "avg": lambda: patches.mean(0),
            "max": lambda: patches.amax(0),
            "avgmax": lambda: (patches.mean(0) + patches.amax(0)) / 2,
        }[model.global_pool]()
    return model.head(model.fc_norm(pooled))
