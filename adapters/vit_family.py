"""What an adapter must say about a model that is only a vision tower: a classifier, or the image side of a CLIP."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.batched_tokens import BatchedTokens
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.model_family import ModelFamily
from vlmprune.adapters.tower_reduction import AttentionPort
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.vision_blocks import BlockParts
from vlmprune.adapters.vit_run import VitRun
from vlmprune.core import signals as s
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.sites import Site

VIT_SITES = frozenset({Site.VISION_BLOCK})
VIT_SIGNALS: frozenset[type[s.Signal]] = frozenset({s.KeyMean, s.HeadAttention, s.Keys})


class VitFamily(ModelFamily):
    """Names the parts of an image model and says how its features leave it. Instances belong to one model.

    Attributes:
        served: what this family serves, for messages.
        entries: methods of the tower, beside its forward, that run its blocks.
    """

    served: str
    entries: tuple[str, ...] = ()

    @property
    def tower(self) -> nn.Module:
        """The module that is called with images; one call is one run."""
        return self.model

    @abstractmethod
    def parts(self) -> Sequence[BlockParts]:
        """The tower's blocks, in order.

        Raises:
            UnsupportedError: blocks that cannot be reduced.
        """

    @abstractmethod
    def attention_port(self, parts: BlockParts) -> AttentionPort:
        """How a block's attention is read and biased."""

    @abstractmethod
    def prefix(self) -> int:
        """Tokens before the patches."""

    @abstractmethod
    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``images [V, C, H, W]``."""

    def tokens(self, states: Tensor) -> TowerTokens:
        """The tokens that enter the first block as ``states [V, T, D]``."""
        prefix = self.prefix()
        return BatchedTokens(states.shape[0], states.shape[1] - prefix, prefix)

    def check_call(self, entry: str, arguments: Mapping[str, Any], restore_length: bool) -> None:
        """Refuse a call that cannot be reduced; ``arguments`` are those of the method ``entry``, by name."""
        return None

    def taken(self, entry: str, arguments: Mapping[str, Any]) -> frozenset[int]:
        """Blocks whose outputs a call of the method ``entry`` returns."""
        return frozenset()

    @abstractmethod
    def install(self, run: VitRun, hooks: HookStack) -> None:
        """Hook what stands behind the blocks (norms, pooling), so that tokens count as often as ``run`` says."""

    def leave(self, entry: str, output: Any, run: VitRun) -> Any:
        """What the method ``entry`` returns, features in full length again."""
        return run.full(output) if isinstance(output, Tensor) and output.ndim == 3 else output


def named(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults included. Keywords that the method's signature lacks are taken too: a
    decorator may take them away."""
    signature = inspect.signature(method)
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    known = {name: value for name, value in kwargs.items() if anything or name in signature.parameters}
    bound = signature.bind(*args, **known)
    bound.apply_defaults()
    return {**bound.arguments, **{name: value for name, value in kwargs.items() if not anything and name not in known}}


def taken_blocks(indices: int | Sequence[int] | None, depth: int) -> frozenset[int]:
    """The blocks that ``forward_intermediates`` of timm and open_clip returns, and the last one.

    Args:
        indices: the last so many, or these, negative ones from the end; None is all of them.
        depth: number of blocks.
    """
    if indices is None:
        return frozenset(range(depth))
    chosen = range(depth - indices, depth) if isinstance(indices, int) else indices
    return frozenset({index % depth for index in chosen} | {depth - 1})


def derives(model: nn.Module, package: str, *names: str) -> bool:
    """True if a model's class is one of a package's classes of these names, or derives from one."""
    return any(c.__name__ in names and c.__module__.split(".")[0] == package for c in type(model).__mro__)


def image_tower(model: nn.Module) -> nn.Module:
    """The tower that a model has for images: open_clip's, timm's inside it, that of a timm model for features only, or
    the model itself."""
    if derives(model, "timm", "FeatureGetterNet"):
        return model.model
    if derives(model, "open_clip", "CLIP", "CustomTextCLIP", "CoCa"):
        model = model.visual
    return model.trunk if derives(model, "open_clip", "TimmModel") else model


def check_map(arguments: Mapping[str, Any], restore_length: bool) -> None:
    """Refuse features as a map where they stay short.

    Raises:
        InputError: ``output_fmt`` asks for it.
    """
    if arguments.get("output_fmt") == "NCHW" and not restore_length:
        raise InputError(
            "Intermediate features as a map (NCHW) need all patches, but restore_length=False leaves them short; "
            "ask for output_fmt='NLC', or apply with restore_length=True."
        )


def refuse_checkpointing() -> None:
    """Refuse gradient checkpointing where gradients are on.

    Raises:
        UnsupportedError: they are.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "Gradient checkpointing runs blocks again without the state of the forward; call "
            "model.set_grad_checkpointing(False), or run under torch.no_grad() or inside handle.disabled()."
        )
