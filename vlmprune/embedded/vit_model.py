"""Architecture and starting weights of `tiny-vit`, a timm `VisionTransformer`.

It starts from the vision tower of `tiny-llava`: a CLIP tower is a timm vision transformer with a norm before its
blocks, so the weights carry over; each block then becomes two.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmprune.core.errors import InputError

from .digit_pictures import CLASSES
from .fastpath import PIXEL_MEAN, PIXEL_STD
from .model import HEADS, VISION_DEPTH, WIDTH
from .scenes import IMAGE_SIZE

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = "vit_base_patch16_clip_224"
"""The registered timm model whose sizes are overridden."""
DEPTH = 2 * VISION_DEPTH
MLP_RATIO = 2.0
PREPROCESSING = {
    "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": list(PIXEL_MEAN),
    "std": list(PIXEL_STD),
    "num_classes": len(CLASSES),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


def import_timm() -> Any:
    """The package timm, which is optional.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            f"tiny-vit needs timm, which cannot be imported ({error}); pip install vlmprune[vit]"
        ) from None


def model_arguments(depth: int = DEPTH, mlp_ratio: float = MLP_RATIO) -> dict[str, Any]:
    """What `timm.create_model(ARCHITECTURE, ...)` is called with, as it stands in `config.json`."""
    return {
        "embed_dim": WIDTH,
        "depth": depth,
        "num_heads": HEADS,
        "mlp_ratio": mlp_ratio,
        "act_layer": "relu",
        "num_classes": len(CLASSES),
    }


def build_vit(depth: int = DEPTH, mlp_ratio: float = MLP_RATIO, seed: int = 0) -> VisionTransformer:
    """Make the classifier with timm's random weights, float32, in eval mode.

    Args:
        depth: number of blocks.
        mlp_ratio: width of the MLPs as a multiple of the model's width.
        seed: seed of the weights; the caller's global generator is left as it was.

    Raises:
        InputError: timm is not installed.
    """
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(ARCHITECTURE, **model_arguments(depth, mlp_ratio))
    model.pretrained_cfg = model.default_cfg = {"architecture": ARCHITECTURE, **PREPROCESSING}
    return model.eval()


@torch.no_grad()
def vit_from_tower(tower: Any) -> VisionTransformer:
    """A CLIP tower as a timm vision transformer: equal features, as many blocks, a class head of zeros.

    Args:
        tower: module with `embeddings`, `encoder` and the norms (`vision_tower` of an embedded LLaVA).
    """
    model = build_vit(VISION_DEPTH, tower.config.intermediate_size / WIDTH)
    embeddings = tower.embeddings
    model.patch_embed.proj.weight.copy_(embeddings.patch_embedding.weight)
    model.cls_token.copy_(embeddings.class_embedding.view(1, 1, -1))
    model.pos_embed.copy_(embeddings.position_embedding.weight[None])
    _copy(tower.pre_layrnorm, model.norm_pre)
    _copy(tower.post_layernorm, model.norm)
    for layer, block in zip(tower.encoder.layers, model.blocks, strict=True):
        parts = [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        _copy(layer.layer_norm1, block.norm1)
        _copy(layer.self_attn.out_proj, block.attn.proj)
        _copy(layer.layer_norm2, block.norm2)
        _copy(layer.mlp.fc1, block.mlp.fc1)
        _copy(layer.mlp.fc2, block.mlp.fc2)
    model.head.weight.zero_()
    model.head.bias.zero_()
    return model


@torch.no_grad()
def split_blocks(model: VisionTransformer) -> VisionTransformer:
    """A model of twice the depth that starts out nearly the same.

    Of the two blocks in place of one, the first has its attention and every other unit of its MLP; the second has
    the remaining units, and the same attention with an output of zeros, which training can use.
    """
    deeper = build_vit(2 * len(model.blocks), model.blocks[0].mlp.fc1.out_features / WIDTH / 2)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    missing, unexpected = deeper.load_state_dict(weights, strict=False)
    if unexpected or not all(name.startswith("blocks.") for name in missing):
        raise InputError(f"the deeper model lacks {unexpected}, or the given one {missing}; both must be built here")
    for number, block in enumerate(model.blocks):
        for half in (0, 1):
            twin = deeper.blocks[2 * number + half]
            for name in ("norm1", "norm2"):
                _copy(getattr(block, name), getattr(twin, name))
            _copy(block.attn.qkv, twin.attn.qkv)
            _copy(block.attn.proj, twin.attn.proj)
            twin.mlp.fc1.weight.copy_(block.mlp.fc1.weight[half::2])
            twin.mlp.fc1.bias.copy_(block.mlp.fc1.bias[half::2])
            twin.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, half::2])
            twin.mlp.fc2.bias.copy_(block.mlp.fc2.bias)
        for zeroed in (twin.attn.proj.weight, twin.attn.proj.bias, twin.mlp.fc2.bias):
            zeroed.zero_()
    return deeper


def start_vit() -> VisionTransformer:
    """The untrained `tiny-vit`: the tower of `tiny-llava` with every block split in two and a class head of zeros."""
    from . import load_embedded
    from .model import vision_tower

    return split_blocks(vit_from_tower(vision_tower(load_embedded("tiny-llava")[0])))


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
