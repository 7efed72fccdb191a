"""Blocks of vision towers: the parts at which their tokens can be reduced, by class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from vlmprune.adapters.family import find_module
from vlmprune.core.errors import UnsupportedError


@dataclass(frozen=True)
class BlockKind:
    """Attribute paths of a block's parts.

    Attributes:
        attention: its attention module.
        norm2: the norm before its MLP.
        tail: what is added to the residual stream last.
        gain: a parameter of the block by which the tail's output is multiplied on the way, None where there is none.
    """

    attention: str
    norm2: str
    tail: str
    gain: str | None = None


CLIP_LIKE = BlockKind("self_attn", "layer_norm2", "mlp")

KINDS: Mapping[str, BlockKind] = MappingProxyType(
    {
        "CLIPEncoderLayer": CLIP_LIKE,
        "SiglipEncoderLayer": CLIP_LIKE,
        "Idefics3EncoderLayer": CLIP_LIKE,
        "SmolVLMEncoderLayer": CLIP_LIKE,
        "InternVLVisionLayer": BlockKind("attention", "layernorm_after", "dropout", gain="lambda_2"),
        "Qwen2VLVisionBlock": BlockKind("attn", "norm2", "mlp"),
        "Qwen2_5_VLVisionBlock": BlockKind("attn", "norm2", "mlp"),
        "Qwen3VLVisionBlock": BlockKind("attn", "norm2", "mlp"),
    }
)


@dataclass(frozen=True)
class BlockParts:
    """One block with the parts that are hooked; ``gain`` as in :class:`BlockKind`."""

    block: nn.Module
    attention: nn.Module
    norm2: nn.Module
    tail: nn.Module
    gain: str | None = None

    def weighted(self, output: Tensor) -> Tensor:
        """The tail's output as it is added to the residual stream."""
        return output if self.gain is None else output * getattr(self.block, self.gain)


def block_parts(blocks: Sequence[nn.Module], kinds: Mapping[str, BlockKind] = KINDS) -> tuple[BlockParts, ...]:
    """The parts of a tower's blocks, by the ``kinds`` that are served.

    Raises:
        UnsupportedError: a class of block that is not known.
    """
    return tuple(_parts(block, kinds) for block in blocks)


def _parts(block: nn.Module, kinds: Mapping[str, BlockKind]) -> BlockParts:
    name = type(block).__name__
    kind = kinds.get(name)
    if kind is None:
        raise UnsupportedError(
            f"Tokens inside a tower of {name} blocks cannot be reduced; known blocks: {', '.join(sorted(kinds))}. "
            "Choose a policy that acts after the encoder: vlmprune.available()."
        )
    attention, norm2, tail = (
        find_module(block, (path,), f"{what} of a vision block")
        for path, what in ((kind.attention, "attention"), (kind.norm2, "second norm"), (kind.tail, "tail"))
    )
    return BlockParts(block, attention, norm2, tail, kind.gain)
