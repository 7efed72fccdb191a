"""What the configs of all families have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmprune.embedded.random_models.tokens import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


@dataclass(frozen=True)
class Sizes:
    """Sizes of a random-weight model; tower and decoder have the same width and number of heads.

    The dtype stands in the text config, where `from_pretrained` writes it: PaliGemma of transformers 4.57 makes its
    masks in that dtype.
    """

    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    vision_depth: int = 4
    text_layers: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def text(self) -> dict[str, Any]:
        """Arguments of a text config."""
        return {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 1024,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "dtype": self.dtype,
        }

    @property
    def vision(self) -> dict[str, Any]:
        """Arguments of the config of a CLIP-like tower, without image and patch size."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.vision_depth,
            "num_attention_heads": self.heads,
        }
