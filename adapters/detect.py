"""Which family serves a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmprune.adapters.family import Family, unwrap
from vlmprune.adapters.llava import LlavaFamily
from vlmprune.adapters.text import TextFamily
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo

FAMILIES: tuple[type[Family], ...] = (LlavaFamily,)


def find_family(model: nn.Module, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> Family:
    """The family of a model.

    Args:
        model: a transformers model, possibly compiled or wrapped by PEFT.
        spans: where visual embeddings stand, for a bare decoder only.

    Raises:
        UnsupportedError: no family serves this class, or ``spans`` and model do not fit.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"Expected a torch model, got {type(model).__name__}.")
    inner = unwrap(model)
    if TextFamily.matches(inner):
        return TextFamily(inner, spans)
    for family in FAMILIES:
        if family.matches(inner):
            if spans is not None:
                raise UnsupportedError(f"spans is for bare decoders; {type(inner).__name__} finds its images itself.")
            return family(inner)
    served = ", ".join(family.__name__.removesuffix("Family") for family in (*FAMILIES, TextFamily))
    raise UnsupportedError(
        f"{type(inner).__name__} is not a model that vlmprune can prune; supported families: {served} "
        "(LlavaForConditionalGeneration, or a bare Llama, Qwen2 or Mistral decoder with spans)."
    )


def model_info(model: nn.Module, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> ModelInfo:
    """Facts about a model: see :func:`find_family` for arguments and errors."""
    return find_family(model, spans).info()
