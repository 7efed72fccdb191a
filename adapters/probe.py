"""Attention of the coming decoder layer, before its tokens are cut.

The layer's own code runs on the tokens as they are, up to the point where it would attend: there its tap has queries
and keys, and the run ends. So norms, projections, query and key norms, rotary tables and masks are the model's own;
neither the attention nor anything behind it is computed, and nothing is written into the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.text_signals import LayerRecorder, Probed


class LayerProbe:
    """Runs one decoder layer up to its attention.

    Args:
        layer: the layer.
        recorder: its tap's recorder.
    """

    def __init__(self, layer: nn.Module, recorder: LayerRecorder) -> None:
        self._layer = layer
        self._recorder = recorder

    def run(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Record the layer's probe signals.

        Args:
            hidden: ``[B, n, D]`` what enters the layer.
            kwargs: the layer's keyword arguments for these tokens.
        """
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._recorder.probing = True
        try:
            with torch.no_grad():
                # Not __call__: hooks on the layer belong to the real run, which comes next.
                self._layer.forward(hidden, **{**given, "past_key_values": None})
        except Probed:
            pass
        finally:
            self._recorder.probing = False
