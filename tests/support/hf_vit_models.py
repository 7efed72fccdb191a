"""Small image models of transformers with random weights; their blocks and heads for ToMe's written-out definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from explicit_tome import Block, Heads, rotated, split_heads
from torch import Tensor, nn

DEPTH = 3
PATCHES = 16
WIDTH = 32
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }
)  # fmt: skip
TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
        "max_position_embeddings": 8, "projection_size": WIDTH, "bos_token_id": 0,
        "eos_token_id": 2,
    }
)  # fmt: skip
# Class -> its config's class and further settings.
CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "CLIPVisionModel": ("CLIPVisionConfig", {}),
        "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {"projection_dim": 24}),
        "CLIPModel": ("CLIPConfig", {"projection_dim": 24}),
        "SiglipVisionModel": ("SiglipVisionConfig", {}),
        "SiglipModel": ("SiglipConfig", {}),
        "Siglip2VisionModel": ("Siglip2VisionConfig", {"num_patches": PATCHES}),
        "Siglip2Model": ("Siglip2Config", {"num_patches": PATCHES}),
        "ViTModel": ("ViTConfig", {}),
        "ViTForImageClassification": ("ViTConfig", {"num_labels": 7}),
        "DeiTModel": ("DeiTConfig", {}),
        "DeiTForImageClassification": ("DeiTConfig", {"num_labels": 7}),
        "DeiTForImageClassificationWithTeacher": ("DeiTConfig", {"num_labels": 7}),
        "Dinov2Model": ("Dinov2Config", {"mlp_ratio": 2}),
        "Dinov2ForImageClassification": ("Dinov2Config", {"mlp_ratio": 2, "num_labels": 7, "use_swiglu_ffn": True}),
        "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {"mlp_ratio": 2, "num_register_tokens": 3}),
        "Dinov2WithRegistersForImageClassification": (
            "Dinov2WithRegistersConfig",
            {"mlp_ratio": 2, "num_register_tokens": 3, "num_labels": 7},
        ),
        "DINOv3ViTModel": ("DINOv3ViTConfig", {"num_register_tokens": 2, "use_gated_mlp": True}),
    }
)


def hf_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """A model of the class ``name`` in eval mode; weights large enough that every part matters."""
    torch.manual_seed(0)
    config_class, further = CLASSES[name]
    config_type = getattr(transformers, config_class)
    vision = {**SIZES, **further, **settings}
    if name in ("CLIPModel", "SiglipModel", "Siglip2Model"):
        projection = {"projection_dim": further["projection_dim"]} if "projection_dim" in further else {}
        config = config_type(vision_config=vision, text_config=dict(TEXT), **projection)
    else:
        config = config_type(**vision)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if key.endswith(("weight", "lambda1")) else 0.0, 0.3)
            elif parameter.ndim > 1 and "embedding" not in key and "token" not in key:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.5)
    return model.to(dtype).eval()


def tower(model: nn.Module) -> nn.Module:
    """The module that holds embeddings and blocks."""
    for name in ("vision_model", "vit", "deit", "dinov2", "dinov2_with_registers"):
        model = getattr(model, name, model)
    return model


def layers(model: nn.Module) -> nn.ModuleList:
    """The tower's blocks."""
    return next(m for m in tower(model).modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH)


def embedded(model: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Tokens ``[V, T, D]`` as they enter the first block while ``run`` runs the model."""
    seen: list[Tensor] = []
    handle = layers(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    run()
    handle.remove()
    return seen[0]


def prefix_of(model: nn.Module) -> int:
    """Tokens before the patches."""
    starts = {"Siglip": 0, "DeiT": 2, "Dinov2With": 4, "DINOv3": 3}
    return next((number for start, number in starts.items() if type(model).__name__.startswith(start)), 1)


def hf_blocks(model: nn.Module, pictures: Tensor) -> list[Block]:
    """The tower's blocks; ``pictures`` say where patches stand."""
    table = None
    if hasattr(tower(model), "rope_embeddings"):
        cosine, sine = tower(model).rope_embeddings(pictures)
        table = torch.cat([sine, cosine], 1)
    return [_block(layer, prefix_of(model), table) for layer in layers(model)]


def _first(module: nn.Module, *paths: str) -> nn.Module | None:
    for path in paths:
        node: Any = module
        for name in path.split("."):
            node = getattr(node, name, None)
        if node is not None:
            return node
    return None


def _block(layer: nn.Module, prefix: int, table: Tensor | None) -> Block:
    attention = _first(layer, "self_attn", "attention.attention", "attention")
    out = _first(layer, "self_attn.out_proj", "attention.o_proj", "attention.output.dense")
    scale1, scale2 = (getattr(layer, f"layer_scale{i}", nn.Identity()) for i in (1, 2))
    norm2 = _first(layer, "layer_norm2", "layernorm_after", "norm2")
    assert attention is not None and out is not None and norm2 is not None

    def heads(states: Tensor, members: list[list[int]]) -> Heads:
        found = []
        for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            found.append(split_heads(_first(attention, new, old)(states), 4))  # type: ignore[misc]
        if table is not None:
            found[:2] = [rotated(part, table, prefix, members, half=True) for part in found[:2]]
        return found[0], found[1], found[2]

    def mlp(states: Tensor) -> Tensor:
        states = norm2(states)
        if hasattr(layer, "mlp"):
            return scale2(layer.mlp(states))
        return layer.output.dense(layer.intermediate(states))

    norm1 = _first(layer, "layer_norm1", "layernorm_before", "norm1")
    assert norm1 is not None
    return Block(heads=heads, norm1=norm1, project=lambda mixed: scale1(out(mixed)), mlp=mlp)


def last_state(model: nn.Module, full: Tensor) -> Tensor:
    """The tower's ``last_hidden_state`` from what left its blocks, ``[V, T0, D]``."""
    body = tower(model)
    if type(model).__name__.startswith("CLIP"):
        return full
    return _first(body, "post_layernorm", "layernorm", "norm")(full)  # type: ignore[misc]


def pooled(model: nn.Module, full: Tensor) -> Tensor:
    """What :func:`answer` returns, written out over all patches that entered."""
    body, name, last = tower(model), type(model).__name__, last_state(model, full)
    if name.startswith("CLIP"):
        first = body.post_layernorm(full[:, 0])
        return first if name == "CLIPVisionModel" else model.visual_projection(first)
    if name.startswith("Siglip"):
        return body.head(last)
    if name.startswith("DeiTFor") and name.endswith("Teacher"):
        return (model.cls_classifier(last[:, 0]) + model.distillation_classifier(last[:, 1])) / 2
    if name.startswith("Dinov2") and name.endswith("Classification"):
        return model.classifier(torch.cat([last[:, 0], last[:, prefix_of(model) :].mean(1)], 1))
    if name.endswith("Classification"):
        return model.classifier(last[:, 0])
    return body.pooler(last) if getattr(body, "pooler", None) is not None else last[:, 0]


def call(model: nn.Module, pictures: Tensor, mask: Tensor | None = None, **further: Any) -> Any:
    """The image side's output; SigLIP 2 gets the pictures' patches."""
    function = model.get_image_features if hasattr(model, "get_image_features") else model
    if "Siglip2" not in type(model).__name__:
        return function(pixel_values=pictures, **further)
    cut = pictures.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(pictures), PATCHES, -1)
    mask = torch.ones(len(pictures), PATCHES, dtype=torch.long) if mask is None else mask
    shapes = torch.tensor([[int(row.sum()) // 4, 4] for row in mask])
    return function(pixel_values=cut, pixel_attention_mask=mask, spatial_shapes=shapes, **further)


def answer(model: nn.Module, pictures: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pooled features, projected ones or logits."""
    output = call(model, pictures, mask)
    if isinstance(output, Tensor):
        return output
    return next(output[key] for key in ("logits", "image_embeds", "pooler_output") if output.get(key) is not None)


def pictures(number: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random pictures ``[V, 3, 32, 32]``, smooth enough that neighbouring patches resemble each other."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(number, 3, 3, 3, generator=generator, dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return (smooth + 0.1 * torch.randn(number, 3, 32, 32, generator=generator, dtype=torch.float64)).to(dtype)
