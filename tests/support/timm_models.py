"""Small timm models with random weights, one per variant that reductions inside the blocks must respect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

SIZES: Mapping[str, Any] = MappingProxyType(
    {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 7}
)
PATCHES = 16
DEPTH = 3

vit = partial(VisionTransformer, **SIZES)
eva = partial(Eva, **SIZES)
ALL: Mapping[str, partial[nn.Module]] = MappingProxyType(
    {
        "token": vit,
        "avg": partial(vit, global_pool="avg"),
        "max": partial(vit, global_pool="max"),
        "avgmax": partial(vit, global_pool="avgmax"),
        "map": partial(vit, global_pool="map", class_token=False),
        "no_class": partial(vit, global_pool="avg", class_token=False),
        "with_prefix": partial(vit, global_pool="avg", reg_tokens=1, pool_include_prefix=True),
        "registers": partial(vit, reg_tokens=4, no_embed_class=True),
        "distilled": partial(VisionTransformerDistilled, **SIZES),
        "layer_scale": partial(vit, init_values=0.5),
        "qk_norm": partial(vit, qk_norm=True, scale_attn_norm=True),
        "pre_norm": partial(vit, pre_norm=True, final_norm=False),
        "post_norm": partial(vit, block_fn=ResPostBlock),
        "eva": partial(eva, swiglu_mlp=True, init_values=0.5, use_abs_pos_emb=False, use_rot_pos_emb=True),
        "eva_unfused": partial(eva, qkv_fused=False, use_rot_pos_emb=True, global_pool="token", scale_attn_inner=True),
        "eva_map": partial(eva, global_pool="map", num_reg_tokens=2, use_rot_pos_emb=True, attn_type="rope"),
        "eva_mixed": partial(eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
        "eva_half": partial(eva, use_rot_pos_emb=True, rope_rotate_half=True, attn_type="rope", qk_norm=True),
        "eva_grouped": partial(eva, use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_kv_heads=2),
        "eva_post_norm": partial(eva, use_post_norm=True, qk_norm=False),
    }
)


def variants(*names: str) -> list[str]:
    """Those of ``names`` (all by default) that the installed timm can build."""
    return [name for name in names or ALL if set(ALL[name].keywords) <= _arguments(ALL[name].func)]


def _arguments(function: Callable[..., Any]) -> set[str]:
    found = set(inspect.signature(function).parameters)
    return found | _arguments(VisionTransformer) if "args" in found else found


def timm_model(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A variant in eval mode; weights large enough that every part matters."""
    torch.manual_seed(seed)
    return randomised(ALL[variant]()).to(dtype).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Random weights: matrices keep the scale of their inputs, vectors differ from 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                continue
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
            elif name.endswith(("pos_embed", "positional_embedding", "token", "latent")):
                parameter.normal_(0.0, 0.7)
            else:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
    return model


def images(
    number: int = 2, size: int | tuple[int, int] = 32, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random pictures ``[V, 3, H, W]``, smooth enough that neighbouring patches resemble each other."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, 3, 3, generator=generator, dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth + 0.1 * torch.randn(number, 3, height, width, generator=generator, dtype=torch.float64)).to(dtype)
