"""Which family serves a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmprune.adapters.family import Family, unwrap
from vlmprune.adapters.gemma_vl import Gemma3Family, PaliGemmaFamily
from vlmprune.adapters.hf_vit import HfVitFamily
from vlmprune.adapters.idefics3 import Idefics3Family, SmolVLMFamily
from vlmprune.adapters.internvl import InternVLFamily
from vlmprune.adapters.llava import LlavaFamily
from vlmprune.adapters.llava_anyres import LlavaNextFamily, LlavaOnevisionFamily
from vlmprune.adapters.open_clip_vit import OpenClipFamily
from vlmprune.adapters.qwen_vl import Qwen2_5_VLFamily, Qwen2VLFamily, Qwen3VLFamily
from vlmprune.adapters.text import TextFamily
from vlmprune.adapters.timm_vit import TimmFamily
from vlmprune.adapters.vision_family import VisionFamily
from vlmprune.adapters.vit_family import VitFamily
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo

FAMILIES: tuple[type[VisionFamily], ...] = (
    LlavaFamily,
    LlavaNextFamily,
    LlavaOnevisionFamily,
    Qwen2VLFamily,
    Qwen2_5_VLFamily,
    Qwen3VLFamily,
    InternVLFamily,
    Idefics3Family,
    SmolVLMFamily,
    PaliGemmaFamily,
    Gemma3Family,
)

VIT_FAMILIES: tuple[type[VitFamily], ...] = (TimmFamily, OpenClipFamily, HfVitFamily)


def find_family(model: nn.Module, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> Family | VitFamily:
    """The family of a model.

    Args:
        model: a transformers, timm or open_clip model, possibly compiled or wrapped by PEFT.
        spans: where visual embeddings stand, for a bare decoder only.

    Raises:
        UnsupportedError: no family serves this class, or ``spans`` and model do not fit.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"Expected a torch model, got {type(model).__name__}.")
    inner = unwrap(model)
    if TextFamily.matches(inner):
        return TextFamily(inner, spans)
    for family in (*FAMILIES, *VIT_FAMILIES):
        if family.matches(inner):
            if spans is not None:
                raise UnsupportedError(f"spans is for bare decoders; {type(inner).__name__} finds its images itself.")
            return family(inner)
    served = ", ".join([*(family.classes[0] for family in FAMILIES), *(family.served for family in VIT_FAMILIES)])
    raise UnsupportedError(
        f"{type(inner).__name__} is not a model that vlmprune can prune; supported families: {served}, "
        "or a bare Llama, Qwen2 or Mistral decoder with spans."
    )


def model_info(model: nn.Module, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> ModelInfo:
    """Facts about a model: see :func:`find_family` for arguments and errors."""
    return find_family(model, spans).info()
