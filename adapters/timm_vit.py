"""Image models of timm: ``VisionTransformer`` and what derives from it, and ``Eva``; also inside those of open_clip."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.timm_port import QkvPort, RotaryPort, RotaryTokens
from vlmprune.adapters.tower_reduction import AttentionPort
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.vision_blocks import BlockKind, BlockParts, block_parts
from vlmprune.adapters.vit_family import (
    VIT_SIGNALS,
    VIT_SITES,
    VitFamily,
    check_map,
    derives,
    image_tower,
    refuse_checkpointing,
    taken_blocks,
)
from vlmprune.adapters.vit_run import VitRun, present_max, size_bias, weighted_mean
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo

BLOCKS: Mapping[str, BlockKind] = MappingProxyType(
    {
        "Block": BlockKind("attn", "norm2", "drop_path2"),
        "ResPostBlock": BlockKind("attn", "mlp", "drop_path2"),  # its norm stands behind the MLP
        "EvaBlock": BlockKind("attn", "norm2", "drop_path2"),
        "EvaBlockPostNorm": BlockKind("attn", "mlp", "drop_path2"),
    }
)
OLDEST = "1.0.20"
POOLS = ("", "token", "avg", "max", "avgmax", "map")


class TimmFamily(VitFamily):
    """See the module."""

    served = "timm's VisionTransformer and Eva"
    entries = ("forward_features", "forward_intermediates")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return derives(image_tower(model), "timm", "VisionTransformer", "Eva")

    @property
    def tower(self) -> nn.Module:
        return image_tower(self.model)

    def info(self) -> ModelInfo:
        return timm_info(self.tower, type(self.model).__name__)

    def parts(self) -> Sequence[BlockParts]:
        blocks = block_parts(self.tower.blocks, BLOCKS)
        for part in blocks:
            if "attn_mask" not in inspect.signature(part.attention.forward).parameters:
                raise UnsupportedError(
                    f"timm's {type(part.attention).__name__} takes no attn_mask, which merged tokens need; install "
                    f"timm {OLDEST} or newer."
                )
        return blocks

    def attention_port(self, parts: BlockParts) -> AttentionPort:
        attention = parts.attention
        if derives(attention, "timm", "EvaAttention", "AttentionRope"):
            return RotaryPort(attention)
        if type(attention).__name__ != "Attention":
            raise UnsupportedError(
                f"Tokens cannot be reduced around an attention of class {type(attention).__name__}; served are timm's "
                "Attention, EvaAttention and AttentionRope."
            )
        return QkvPort(attention)

    def prefix(self) -> int:
        return self.tower.num_prefix_tokens

    def grid(self, images: Tensor) -> tuple[int, int]:
        return grid_of(self.tower, images)

    def tokens(self, states: Tensor) -> TowerTokens:
        if getattr(self.tower, "rope", None) is None:
            return super().tokens(states)
        return RotaryTokens(states.shape[0], states.shape[1] - self.prefix(), self.prefix())

    def check_call(self, entry: str, arguments: Mapping[str, Any], restore_length: bool) -> None:
        if arguments.get("attn_mask") is not None or arguments.get("is_causal"):
            raise UnsupportedError(
                "attn_mask and is_causal are over all patches and cannot follow the tokens that are left; leave them "
                "out, or run inside handle.disabled()."
            )
        check_map(arguments, restore_length)
        if self.tower.grad_checkpointing:
            refuse_checkpointing()

    def taken(self, entry: str, arguments: Mapping[str, Any]) -> frozenset[int]:
        if entry != "forward_intermediates":
            return frozenset()
        return taken_blocks(arguments.get("indices"), len(self.tower.blocks))

    def install(self, run: VitRun, hooks: HookStack) -> None:
        run.follow_norm(self.tower.norm, hooks)
        hooks.wrap_method(self.tower, "pool", partial(self._pool, run, self.tower.pool))

    def leave(self, entry: str, output: Any, run: VitRun) -> Any:
        pooled = entry == "forward" and self.tower.global_pool != ""
        return output if pooled else super().leave(entry, output, run)

    def _pool(self, run: VitRun, original: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Stands in for the tower's pooling: a token counts as often as it stands for patches."""
        tower, weights = self.tower, run.weights(x)
        kind = tower.global_pool if pool_type is None else pool_type
        if weights is None or (tower.attn_pool is None and kind in ("", "token")):
            return original(x) if pool_type is None else original(x, pool_type)
        if tower.attn_pool is not None:
            if not derives(tower, "timm", "Eva") and not getattr(tower, "pool_include_prefix", False):
                x, weights = x[:, self.prefix() :], weights[:, self.prefix() :]
            return tower.attn_pool(x, attn_mask=size_bias(weights, x.dtype)[:, None, None])
        if not getattr(tower, "pool_include_prefix", False):
            x, weights = x[:, self.prefix() :], weights[:, self.prefix() :]
        if kind == "avg":
            return weighted_mean(x, weights)
        largest = present_max(x, weights)
        return largest if kind == "max" else 0.5 * (largest + weighted_mean(x, weights))


def timm_info(tower: nn.Module, model_class: str) -> ModelInfo:
    """Facts about a timm model, or one inside another.

    Raises:
        UnsupportedError: a head that cannot weigh tokens by what they stand for.
    """
    pool = tower.attn_pool
    if tower.global_pool not in POOLS or (pool is not None and not derives(pool, "timm", "AttentionPoolLatent")):
        raise UnsupportedError(
            f"global_pool={tower.global_pool!r} cannot count merged tokens as often as they stand for patches; "
            f"supported: {', '.join(repr(name) for name in POOLS)}."
        )
    if pool is not None and pool.pos_embed is not None:
        raise UnsupportedError("The attention pool adds positions of its own, which merged tokens do not have.")
    blocks, grid = tower.blocks, None
    if not getattr(tower, "dynamic_img_size", False):
        grid = tuple(tower.patch_embed.grid_size)
    mlp = blocks[0].mlp if hasattr(blocks[0], "mlp") else None
    width = None if mlp is None else mlp.fc2.in_features
    gated = mlp is not None and (hasattr(mlp, "fc1_g") or mlp.fc1.out_features == 2 * width)
    return ModelInfo(
        family="timm",
        model_class=model_class,
        sites=VIT_SITES,
        signals=VIT_SIGNALS,
        vision_depth=len(blocks),
        feature_block=len(blocks) - 1,
        has_cls=getattr(tower, "cls_token", None) is not None,
        prefix_tokens=tower.num_prefix_tokens,
        grid=grid,
        tokens_per_image=None if grid is None else grid[0] * grid[1],
        vision_hidden=tower.embed_dim,
        vision_heads=getattr(getattr(blocks[0], "attn", None), "num_heads", None),
        vision_ffn=width,
        vision_gated=gated,
    )


def grid_of(tower: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that a timm model cuts ``images [V, C, H, W]`` into."""
    embed = tower.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return int(height), int(width)
    return tuple(embed.grid_size)
