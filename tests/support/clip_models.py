"""Small open_clip models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from explicit_tome import Block, Heads, Image, split_heads, unmerged
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm_models import randomised
from torch import Tensor, nn

WIDTH = 64
PATCHES = 16
DEPTH = 3
CONTEXT = 8
VOCABULARY = 50
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tok": {},
        "avg": {"pool_type": "avg", "output_tokens": False},
        "norm_after_pool": {"pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5},
        "attentional": {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4},
        "parallel": {"attentional_pool": "parallel", "attn_pooler_queries": 7, "attn_pooler_heads": 4},
        "cascade": {"attentional_pool": "cascade", "attn_pooler_queries": 8, "attn_pooler_heads": 4},
        "qk_norm": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True},
    }
)


def clip_model(
    variant: str = "tok", kind: type[nn.Module] = CLIP, dtype: torch.dtype = torch.float64, **vision: Any
) -> nn.Module:
    """A variant in eval mode, 64 x 64 pixels in patches of 16."""
    torch.manual_seed(0)
    sizes = {"layers": DEPTH, "width": WIDTH, "head_width": 16, "patch_size": 16, "image_size": 64}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
    model = kind(
        embed_dim=WIDTH,
        vision_cfg=CLIPVisionCfg(**{**sizes, **VARIANTS[variant], **vision}),
        text_cfg=CLIPTextCfg(**text),
    )
    return randomised(model).to(dtype).eval()


def timm_clip(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """A model whose image tower is timm's."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(timm_model_name="vit_tiny_patch16_224", timm_model_pretrained=False, **settings)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    model = CustomTextCLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
    model.visual.trunk.set_input_size(img_size=64)
    return randomised(model).to(dtype).eval()


def coca(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A CoCa, whose text decoder looks at what the attentional pooler returns."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        layers=DEPTH, width=WIDTH, head_width=16, patch_size=16, image_size=64, output_tokens=True, attn_pooler_heads=4,
        attentional_pool="cascade", attn_pooler_queries=8,
    )  # fmt: skip
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": 2}
    model = CoCa(
        embed_dim=WIDTH,
        multimodal_cfg=MultimodalCfg(**text),
        text_cfg=CLIPTextCfg(**text, embed_cls=True, output_tokens=True),
        vision_cfg=vision,
    )
    return randomised(model).to(dtype).eval()


def captions(number: int = 3) -> Tensor:
    """Token ids ``[number, CONTEXT]``."""
    return torch.randint(1, VOCABULARY, (number, CONTEXT), generator=torch.Generator().manual_seed(2))


def clip_blocks(tower: nn.Module) -> list[Block]:
    """Blocks of an open_clip tower, for :mod:`explicit_tome`."""
    return [_block(block) for block in tower.transformer.resblocks]


def _block(block: nn.Module) -> Block:
    attention = block.attn

    def project(mixed: Tensor) -> Tensor:
        scale = getattr(attention, "head_scale", None)
        if scale is not None:
            mixed = (split_heads(mixed, attention.num_heads) * scale).transpose(0, 1).flatten(1)
        inner = getattr(attention, "ln_inner", nn.Identity())
        return block.ls_1(getattr(block, "ln_attn", nn.Identity())(attention.out_proj(inner(mixed))))

    def heads(states: Tensor, members: list[list[int]]) -> Heads:
        found = (states @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, 1)
        query, key, value = (split_heads(part, attention.num_heads) for part in found)
        norms = (getattr(attention, name, nn.Identity()) for name in ("ln_q", "ln_k"))
        query, key = (norm(part) for norm, part in zip(norms, (query, key), strict=True))
        return query, key, value

    return Block(heads, block.ln_1, project, lambda states: block.ls_2(block.mlp(block.ln_2(states))))


def clip_features(tower: nn.Module, images: list[Image]) -> Tensor:
    """Image features from tokens in full length: what each one became, copied to all its members."""
    tokens = torch.stack([unmerged(image) for image in images])
    kind = getattr(tower, "attn_pool_type", "")
    if kind:
        tokens = tower.ln_post(tokens)
        found = tower.attn_pool(tokens)
        pooled = tower.attn_pool_contrastive(tokens if kind == "parallel" else found)
        return pooled @ tower.proj
    if tower.attn_pool is not None:
        return tower.ln_post(tower.attn_pool(tokens))[:, 0] @ tower.proj
    if not tower.final_ln_after_pool:
        tokens = tower.ln_post(tokens)
    pooled = tokens[:, 1:].mean(1) if tower.pool_type == "avg" else tokens[:, 0]
    return (tower.ln_post(pooled) if tower.final_ln_after_pool else pooled) @ tower.proj
