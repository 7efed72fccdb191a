"""Image towers of open_clip: inside a ``CLIP``, ``CustomTextCLIP`` or ``CoCa``, or by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.open_clip_port import CustomPort, MultiheadPort
from vlmprune.adapters.tower_reduction import AttentionPort
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
from vlmprune.adapters.vit_run import VitRun, size_bias, weighted_mean
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo

BLOCKS: Mapping[str, BlockKind] = MappingProxyType(
    {
        "ResidualAttentionBlock": BlockKind("attn", "ln_2", "ls_2"),
        "CustomResidualAttentionBlock": BlockKind("attn", "ln_2", "ls_2"),
    }
)
MODELS = ("CLIP", "CustomTextCLIP", "CoCa")
PREFIX = 1


class OpenClipFamily(VitFamily):
    """See the module. Towers that are timm models are :class:`~vlmprune.adapters.timm_vit.TimmFamily`'s."""

    served = "open_clip's CLIP, CustomTextCLIP, CoCa and their visual towers"
    entries = ("forward_intermediates",)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return derives(model, "open_clip", *MODELS, "VisionTransformer", "TimmModel")

    @property
    def tower(self) -> nn.Module:
        return image_tower(self.model)

    def info(self) -> ModelInfo:
        tower = self.tower
        if not derives(tower, "open_clip", "VisionTransformer"):
            raise UnsupportedError(
                f"{type(self.model).__name__} with a {type(tower).__name__} tower cannot be reduced; served are "
                "open_clip's VisionTransformer, and timm's VisionTransformer and Eva."
            )
        if not tower.transformer.batch_first:
            raise UnsupportedError("Towers that hold tokens before images (batch_first=False) are not supported.")
        block = tower.transformer.resblocks[0]
        height, width = tower.grid_size
        return ModelInfo(
            family="open_clip",
            model_class=type(self.model).__name__,
            sites=VIT_SITES,
            signals=VIT_SIGNALS,
            vision_depth=len(tower.transformer.resblocks),
            feature_block=len(tower.transformer.resblocks) - 1,
            has_cls=True,
            prefix_tokens=PREFIX,
            grid=(height, width),
            tokens_per_image=height * width,
            vision_hidden=tower.transformer.width,
            vision_heads=block.attn.num_heads,
            vision_ffn=block.mlp.c_fc.out_features,
        )

    def parts(self) -> Sequence[BlockParts]:
        return block_parts(self.tower.transformer.resblocks, BLOCKS)

    def attention_port(self, parts: BlockParts) -> AttentionPort:
        attention = parts.attention
        if isinstance(attention, nn.MultiheadAttention):
            return MultiheadPort(attention)
        if attention.scaled_cosine:
            raise UnsupportedError("Attention by scaled cosine cannot weigh merged tokens; it is not supported.")
        return CustomPort(attention)

    def prefix(self) -> int:
        return PREFIX

    def grid(self, images: Tensor) -> tuple[int, int]:
        height, width = self.tower.patch_size
        return images.shape[-2] // height, images.shape[-1] // width

    def check_call(self, entry: str, arguments: Mapping[str, Any], restore_length: bool) -> None:
        check_map(arguments, restore_length)
        if self.tower.transformer.grad_checkpointing:
            refuse_checkpointing()

    def taken(self, entry: str, arguments: Mapping[str, Any]) -> frozenset[int]:
        if entry != "forward_intermediates":
            return frozenset()
        return taken_blocks(arguments.get("indices"), len(self.tower.transformer.resblocks))

    def install(self, run: VitRun, hooks: HookStack) -> None:
        tower = self.tower
        run.follow_norm(tower.ln_post, hooks)
        hooks.wrap_method(tower, "_pool", partial(self._pool, run, tower._pool))
        hooks.wrap_method(tower, "_global_pool", partial(self._global_pool, run, tower._global_pool))
        if tower.attn_pool is not None:
            hooks.before(tower.attn_pool.attn, partial(self._pool_attention, run))
            if getattr(tower, "attn_pool_type", "") == "parallel":  # else it looks at what the first one returns
                hooks.before(tower.attn_pool_contrastive.attn, partial(self._pool_attention, run))

    def leave(self, entry: str, output: Any, run: VitRun) -> Any:
        if self.tower.pool_type != "none" or self.tower.attn_pool is not None:
            return output
        if isinstance(output, dict):
            return {name: run.full(v) if name == "image_features" else v for name, v in output.items()}
        return tuple(run.full(part) for part in output) if isinstance(output, tuple) else run.full(output)

    def _pool(self, run: VitRun, original: Any, x: Tensor) -> Any:
        """Stands in for the tower's pooling, which may be given features in full length: takes those that are left."""
        handed = run.handed(x)
        return original(x if handed is None else handed.short)

    def _global_pool(self, run: VitRun, original: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stands in for the mean over patches: a token counts as often as it stands for patches."""
        tower = self.tower
        if tower.attn_pool is not None or tower.pool_type == "none" or not run.changed:
            return original(x)
        tokens = run.full(x)[:, PREFIX:] if tower.output_tokens else x[:, PREFIX:]
        weights = run.weights(x) if tower.pool_type == "avg" else None
        if weights is None:
            return original(x)[0], tokens
        return weighted_mean(x[:, PREFIX:], weights[:, PREFIX:]), tokens

    def _pool_attention(
        self, run: VitRun, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """The pooling attention's keys, all tokens of the tower, count as often as they stand for patches."""
        weights = run.weights(args[1])
        if weights is None:
            return None
        return args, {**kwargs, "key_padding_mask": size_bias(weights, args[1].dtype)}
