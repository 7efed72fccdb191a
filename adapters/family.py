"""What an adapter family must say about its model; everything else is shared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.layout import PromptLayout
from vlmprune.adapters.model_family import ModelFamily
from vlmprune.core.errors import UnsupportedError

Encoded = Mapping[str, Any]
"""Per kind (``image``, ``video``) the :class:`vlmprune.adapters.encoding.Encoding` that a call brings along."""


class Family(ModelFamily):
    """Names a model's parts and reads its calls. Instances belong to one model."""

    deepstack_levels: int = 0
    """Decoder layers after which the text model adds further visual features."""

    prepares_masks: bool = False
    """True if the model itself builds 4-D masks before it calls the text model."""

    @property
    @abstractmethod
    def text_model(self) -> nn.Module:
        """The decoder stack, called with ``inputs_embeds``."""

    @property
    def base(self) -> nn.Module | None:
        """The module that merges image features into the prompt; None for a bare decoder."""
        return None

    def decoder_layers(self) -> Sequence[nn.Module]:
        """Decoder layers, in order."""
        return self.text_model.layers

    def text_attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.decoder_layers()[layer].self_attn

    def layer_type(self, layer: int) -> str:
        """What mask and rotary tables a decoder layer takes; layers of one type share them."""
        types = getattr(self.text_model.config, "layer_types", None)
        return types[layer] if types else ""

    def rotary(self, name: str, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        """Rotary tables of a decoder layer: the value of its keyword ``name`` (``position_embeddings...``)."""
        return self.text_model.rotary_emb(hidden, positions)

    @abstractmethod
    def layout(self, kwargs: Mapping[str, Any], encoded: Encoded | None = None) -> PromptLayout | None:
        """The images of a call (keywords of ``base`` or of the bare text model), or None where it has none.

        Args:
            kwargs: the call.
            encoded: encodings that were made before the call and that it brings.

        Raises:
            InputError: placeholders and images do not fit together.
        """

    def brings_images(self, kwargs: Mapping[str, Any]) -> bool:
        """True if the call encodes images or brings encoded ones."""
        return False

    def check_call(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse keywords that change which features the call uses; by default there are none."""
        return None


def text_info(config: Any) -> dict[str, Any]:
    """Decoder sizes for :class:`ModelInfo` from a text config."""
    heads = config.num_attention_heads
    return {
        "text_depth": config.num_hidden_layers,
        "text_hidden": config.hidden_size,
        "text_heads": heads,
        "text_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "text_head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "text_ffn": getattr(config, "intermediate_size", None),
    }


def tower_info(config: Any) -> dict[str, Any]:
    """Sizes of a tower's blocks for :class:`ModelInfo` from a vision config."""
    return {
        "vision_hidden": config.hidden_size,
        "vision_heads": config.num_attention_heads,
        "vision_ffn": config.intermediate_size,
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside ``torch.compile``, DDP and PEFT wrappers.

    A model that is compiled already would ignore new hooks, so its compiled code is dropped.
    """
    import torch

    while True:
        if "_orig_mod" in model._modules:
            torch._dynamo.reset()
            model = model._modules["_orig_mod"]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def transformers_major() -> int:
    """The first number of the version of transformers that is used."""
    import transformers

    return int(transformers.__version__.split(".")[0])


def find_module(root: nn.Module, paths: Sequence[str], what: str) -> nn.Module:
    """The first of several attribute paths that exists.

    Raises:
        UnsupportedError: none does; names class and version.
    """
    import transformers

    for path in paths:
        node: Any = root
        for name in path.split("."):
            node = getattr(node, name, None)
            if node is None:
                break
        if node is not None:
            return node
    raise UnsupportedError(
        f"No {what} found in {type(root).__name__} of transformers {transformers.__version__} "
        f"(tried {', '.join(paths)}); this version is not supported."
    )
