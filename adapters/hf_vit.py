"""Image models of transformers by themselves: CLIP, SigLIP, SigLIP 2, ViT, DeiT, DINOv2 and DINOv3."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.batched_tokens import BatchedTokens
from vlmprune.adapters.family import find_module, transformers_major
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.tap_port import TapPort
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.vision_blocks import CLIP_LIKE, BlockKind, BlockParts, block_parts
from vlmprune.adapters.vit_family import VIT_SIGNALS, VIT_SITES, VitFamily, derives
from vlmprune.adapters.vit_run import VitRun, size_bias, weighted_mean
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.kernels.gather import first_members

MODELS = (
    *("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
    *("SiglipModel", "SiglipVisionModel", "Siglip2Model", "Siglip2VisionModel"),
    *("ViTModel", "ViTForImageClassification"),
    *("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    *("Dinov2Model", "Dinov2ForImageClassification"),
    *("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "DINOv3ViTModel",
)
NOTES_STATES = ("SiglipVisionModel", "Siglip2VisionModel")
"""Of transformers 4: they note the hidden states of the tower that they wrap."""
TOWERS = ("vision_model", "vit", "deit", "dinov2", "dinov2_with_registers")
BLOCKS = ("encoder.layers", "encoder.layer", "layers", "layer", "model.layer")
LAST_LINEAR = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")
FREE_SIZE = (
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "Siglip2VisionModel",
    "Siglip2VisionTransformer",
)
"""Towers that take images of any size."""

NESTED = BlockKind("attention.attention", "layernorm_after", "output.dropout")
FLAT = BlockKind("attention", "layernorm_after", "dropout")  # the dropout stands behind attention too
DINO_NESTED = BlockKind("attention.attention", "norm2", "drop_path")
DINO_FLAT = BlockKind("attention", "norm2", "drop_path")
KINDS: Mapping[str, tuple[BlockKind, ...]] = MappingProxyType(
    {
        "CLIPEncoderLayer": (CLIP_LIKE,),
        "SiglipEncoderLayer": (CLIP_LIKE,),
        "Siglip2EncoderLayer": (CLIP_LIKE,),
        "ViTLayer": (NESTED, FLAT),
        "DeiTLayer": (NESTED, FLAT),
        "Dinov2Layer": (DINO_NESTED, DINO_FLAT),
        "Dinov2WithRegistersLayer": (DINO_NESTED, DINO_FLAT),
        "DINOv3ViTLayer": (DINO_FLAT,),
    }
)


class HfVitFamily(VitFamily):
    """See the module. In dual encoders only the image side is touched."""

    served = "transformers' CLIP, SigLIP, SigLIP 2, ViT, DeiT, DINOv2 and DINOv3 image models"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._mask: Tensor | None = None  # [V, P] of the call under way: patches that are no padding
        self._classifying = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return derives(model, "transformers", *MODELS)

    @property
    def tower(self) -> nn.Module:
        if derives(self.model, "transformers", *NOTES_STATES):
            return self.model
        children = (getattr(self.model, name, None) for name in TOWERS)
        return next((child for child in children if isinstance(child, nn.Module)), self.model)

    @property
    def body(self) -> nn.Module:
        """The module that holds embeddings, blocks and head."""
        return getattr(self.tower, "vision_model", self.tower)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's blocks."""
        return find_module(self.body, BLOCKS, "blocks of an image model")  # type: ignore[return-value]

    def info(self) -> ModelInfo:
        config, block = self.body.config, self.blocks[0]
        grid = None
        if not derives(self.body, "transformers", *FREE_SIZE):
            (height, width), (rows, columns) = _pair(config.image_size), _pair(config.patch_size)
            grid = (height // rows, width // columns)
        return ModelInfo(
            family="transformers",
            model_class=type(self.model).__name__,
            sites=VIT_SITES,
            signals=VIT_SIGNALS,
            vision_depth=len(self.blocks),
            feature_block=len(self.blocks) - 1,
            has_cls=self._has_cls(),
            prefix_tokens=self.prefix(),
            grid=grid,
            tokens_per_image=None if grid is None else grid[0] * grid[1],
            vision_hidden=config.hidden_size,
            vision_heads=config.num_attention_heads,
            vision_ffn=find_module(block, LAST_LINEAR, "MLP of a vision block").in_features,
            vision_gated=bool(getattr(config, "use_gated_mlp", False) or getattr(config, "use_swiglu_ffn", False)),
        )

    def parts(self) -> Sequence[BlockParts]:
        found: dict[str, BlockKind] = {}
        for block in self.blocks:
            known = [kind for kind in KINDS.get(type(block).__name__, ()) if _fits(block, kind)]
            if known:
                found[type(block).__name__] = known[0]
        return block_parts(self.blocks, found)

    def attention_port(self, parts: BlockParts) -> AttentionPort:
        adds = transformers_major() >= 5 or KINDS[type(parts.block).__name__] == (CLIP_LIKE,)
        return ImagePort(parts.attention, adds)

    def _has_cls(self) -> bool:
        embeddings = self.body.embeddings
        return hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")

    def prefix(self) -> int:
        distilled = hasattr(self.body.embeddings, "distillation_token")
        return int(self._has_cls()) + int(distilled) + getattr(self.body.config, "num_register_tokens", 0)

    def grid(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4:  # SigLIP 2 takes patches, padded, of grids that differ from image to image
            return 0, 0
        rows, columns = _pair(self.body.config.patch_size)
        return images.shape[-2] // rows, images.shape[-1] // columns

    def tokens(self, states: Tensor) -> TowerTokens:
        prefix = self.prefix()
        shape = states.shape[0], states.shape[1] - prefix, prefix
        if derives(self.body, "transformers", "DINOv3ViTModel"):
            return TurnedTokens(*shape)
        mask = self._mask
        if mask is None or bool(mask.all()):
            return BatchedTokens(*shape)
        return BatchedTokens(*shape, real=mask.bool().to(states.device))

    def check_call(self, entry: str, arguments: Mapping[str, Any], restore_length: bool) -> None:
        given = {**arguments, **arguments.get("kwargs", {})}
        if derives(self.body, "transformers", "Siglip2VisionModel", "Siglip2VisionTransformer"):
            self._mask = given.get("pixel_attention_mask", given.get("attention_mask"))
        elif given.get("attention_mask") is not None:
            raise UnsupportedError(
                "attention_mask is over all patches and cannot follow the tokens that are left; leave it out, or run "
                "inside handle.disabled()."
            )
        if given.get("head_mask") is not None:
            raise UnsupportedError("head_mask cannot be served beside a policy; run inside handle.disabled().")
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in self.blocks)
        if checkpointed and self.tower.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "Gradient checkpointing runs blocks again without the state of the forward; call "
                "model.gradient_checkpointing_disable(), or run under torch.no_grad() or inside handle.disabled()."
            )

    def install(self, run: VitRun, hooks: HookStack) -> None:
        head = getattr(self.body, "head", None)
        if head is not None:
            if "attention_mask" in inspect.signature(head.forward).parameters:
                hooks.before(head, partial(self._head, run))
            hooks.before(head.attention, partial(self._pool_attention, run))
        if "ForImageClassification" in type(self.model).__name__:
            hooks.before(self.model, self._classify, prepend=True)
            hooks.after(self.model, self._classified, always=True, prepend=True)

    def leave(self, entry: str, output: Any, run: VitRun) -> Any:
        """The tower's output: last state and hidden states in full length; a classifier gets the last one always."""
        if not run.changed:
            return output
        last = self._filled(run, output[0]) if self._classifying else run.full(output[0])
        if isinstance(output, tuple):  # return_dict=False; hidden states are one more than the blocks, attentions not
            noted = len(self.blocks) + 1
            rest = (
                run.noted(part, run.restore_length) if isinstance(part, tuple) and len(part) == noted else part
                for part in output[1:]
            )
            return (last, *rest)
        output["last_hidden_state"] = last
        if output.get("hidden_states") is not None:
            output["hidden_states"] = run.noted(output["hidden_states"], run.restore_length)
        return output

    def _classify(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._classifying = True

    def _classified(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._classifying = False

    def _filled(self, run: VitRun, states: Tensor) -> Tensor:
        """The last state in full length; in place of dropped patches the mean of the others, so that they change no
        mean over all."""
        group = run.map.group
        if group is None:
            return states
        prefix, weights = self.prefix(), self._weights(run, states)
        weights = states.new_ones(states.shape[:2]) if weights is None else weights
        mean = weighted_mean(states[:, prefix:], weights[:, prefix:])
        return torch.where((group < 0)[..., None], mean[:, None], run.map.restore(states))

    def _weights(self, run: VitRun, states: Tensor) -> Tensor | None:
        """How many patches each token stands for, 0 for padding; None where all count alike."""
        weights = run.weights(states)
        hidden = None if run.tokens is None else run.tokens.hidden_keys()
        if hidden is None:
            return weights
        return hidden.valid.float() if weights is None else weights * hidden.valid

    def _head(self, run: VitRun, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The head's mask is over all patches; their weights stand in for it."""
        return ((args[0],), {**kwargs, "attention_mask": None}) if run.changed else None

    def _pool_attention(self, run: VitRun, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The head's keys, all tokens of the tower, count as often as they stand for patches."""
        weights = self._weights(run, args[1]) if run.changed else None
        if weights is None:
            return None
        return args, {**kwargs, "key_padding_mask": size_bias(weights, args[1].dtype)}


class ImagePort(TapPort):
    """As its parent, but masks stay the model's own until something is reduced."""

    def bias(self, reducer: TowerReducer) -> Tensor | None:
        return super().bias(reducer) if reducer.tokens is not None and reducer.tokens.changed else None


class TurnedTokens(BatchedTokens):
    """Tokens whose cosines and sines ``[P, d]`` follow them: one that stands for several has the place of the first."""

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        tables = kwargs.get("position_embeddings")
        if tables is None or self.map.group is None:
            return kwargs
        first = first_members(self.map.group, self.map.width)[:, self.prefix :]  # [V, N]
        rows = (first - self.prefix).clamp_min(0)
        return {**kwargs, "position_embeddings": tuple(table[rows][:, None] for table in tables)}


def _fits(block: nn.Module, kind: BlockKind) -> bool:
    """True if a block has a kind's attention, and it is the one that attends."""
    node: Any = block
    for name in kind.attention.split("."):
        node = getattr(node, name, None)
    return hasattr(node, "config")


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
