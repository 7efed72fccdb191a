"""Bare decoders (Llama, Qwen2, Mistral and their kind), driven by ``inputs_embeds`` and explicit spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vlmprune.adapters import layout as layouts
from vlmprune.adapters.family import Encoded, Family, text_info
from vlmprune.core import signals as s
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site

TEXT_SIGNALS = frozenset(
    {
        s.Projected,
        s.TextEmbeddings,
        s.AttentionRows,
        s.ColumnMass,
        s.GroupMass,
        s.FinalNorm,
        s.Hidden,
        s.ModuleTransition,
        s.ProbeAttention,
    }
)
DECODERS = ("Llama", "Qwen2", "Mistral")


class TextFamily(Family):
    """A decoder without a tower. ``spans`` say where visual embeddings stand."""

    def __init__(self, model: nn.Module, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> None:
        super().__init__(model)
        self.spans = spans

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return type(model).__name__ in {f"{n}{suffix}" for n in DECODERS for suffix in ("Model", "ForCausalLM")}

    @property
    def text_model(self) -> nn.Module:
        return self.model.model if type(self.model).__name__.endswith("ForCausalLM") else self.model

    def info(self) -> ModelInfo:
        if self.spans is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} takes no images. For a bare decoder driven by inputs_embeds give "
                "spans=[[(start, length), ...] per row]; for a vision-language model pass the whole model."
            )
        lengths = {length for row in self.spans for _, length in row}
        return ModelInfo(
            family="text",
            model_class=type(self.model).__name__,
            sites=frozenset({Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE}),
            signals=TEXT_SIGNALS,
            tokens_per_image=lengths.pop() if len(lengths) == 1 else None,
            **text_info(self.text_model.config),
        )

    def layout(self, kwargs: Mapping[str, Any], encoded: Encoded | None = None) -> layouts.PromptLayout | None:
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        shape = (embeds if embeds is not None else ids).shape[:2]
        if self.spans is None or not any(self.spans):
            return None
        if shape[1] < max(start + count for row in self.spans for start, count in row):
            raise InputError(f"The prompt has {shape[1]} tokens, fewer than the spans {self.spans} reach.")
        return layouts.from_spans(self.spans, shape[0], shape[1], kwargs.get("attention_mask"))
