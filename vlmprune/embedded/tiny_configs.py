"""Random-weight LLaVA models built from configs in code, for hook, shape and equivalence tests.

They answer nothing sensible. They exist so that an adapter can be tested on every supported pair of vision
tower and text decoder in milliseconds and without a download.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IMAGE_TOKEN_ID = 5
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


def random_llava(
    vision: str = "clip",
    text: str = "llama",
    *,
    vision_depth: int = 4,
    text_layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    image_size: int = 32,
    patch_size: int = 8,
    vocab_size: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    init_std: float = 0.2,
) -> LlavaForConditionalGeneration:
    """Build a small LLaVA with random weights, in eval mode.

    Args:
        vision: tower, `"clip"` (has a CLS token, feature layer -2, CLS dropped) or `"siglip"` (no CLS token,
            `vision_feature_select_strategy="full"`).
        text: decoder, `"llama"`, `"qwen2"` or `"mistral"`.
        vision_depth: number of tower blocks, at least 2.
        text_layers: number of decoder layers.
        hidden: width of tower and decoder; the MLPs are twice as wide.
        heads: attention heads of tower and decoder.
        kv_heads: key/value heads of the decoder; None means as many as `heads`.
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels; it makes `(image_size / patch_size) ** 2` visual tokens.
        vocab_size: size of the vocabulary; ids 0, 1, 2 and 5 are pad, bos, eos and image placeholder.
        seed: seed of the weights; the caller's global generator is left as it was.
        dtype: dtype of the weights.
        attn_implementation: passed to transformers for tower and decoder.
        init_std: standard deviation of the random matrices; large enough that attention is far from uniform.

    Returns:
        A stock `LlavaForConditionalGeneration`.

    Raises:
        InputError: unknown tower or decoder name, or an image size that the patch size does not divide.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if image_size % patch_size:
        raise InputError(f"image_size {image_size} is not a multiple of patch_size {patch_size}; choose one that is")
    config = LlavaConfig(
        vision_config=_vision_config(vision, vision_depth, hidden, heads, image_size, patch_size),
        text_config=_text_config(text, text_layers, hidden, heads, kv_heads or heads, vocab_size),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2 if vision == "clip" else -1,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _randomise(model, init_std)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD_ID, BOS_ID, EOS_ID
    return model.to(dtype).eval()


def random_inputs(
    model: LlavaForConditionalGeneration,
    *,
    batch: int = 1,
    before: int = 3,
    after: int = 4,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Make inputs with one image per row for a model of `random_llava`.

    Args:
        model: a model built by `random_llava`.
        batch: number of rows B.
        before: text tokens before the image (the first one is bos), at least 1.
        after: text tokens after the image.
        seed: seed of pixels and text ids.

    Returns:
        `input_ids` and `attention_mask` `[B, before + N + after]`; `pixel_values` `[B, 3, S, S]` in the
        model's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size, n_image = config.vision_config.image_size, config.image_seq_length
    low, high = IMAGE_TOKEN_ID + 1, config.text_config.vocab_size
    text = torch.randint(low, high, (batch, before + after), generator=generator)
    text[:, 0] = BOS_ID
    image = torch.full((batch, n_image), config.image_token_index)
    ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(next(model.parameters()).dtype),
    }


def _vision_config(name: str, depth: int, hidden: int, heads: int, image_size: int, patch_size: int) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if name == "clip":
        return CLIPVisionConfig(**sizes, projection_dim=hidden)
    if name == "siglip":
        # The pooling head is not used by LLaVA; without it every parameter takes part in the forward pass.
        return SiglipVisionConfig(**sizes, vision_use_head=False)
    raise InputError(f"unknown vision tower {name!r}; choose 'clip' or 'siglip'")


def _text_config(name: str, layers: int, hidden: int, heads: int, kv_heads: int, vocab_size: int) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    if name not in classes:
        raise InputError(f"unknown text decoder {name!r}; choose one of {', '.join(classes)}")
    extra = {"sliding_window": None} if name == "mistral" else {}
    return classes[name](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        **extra,
    )


def _randomise(model: torch.nn.Module, std: float) -> None:
    """Draw every parameter, norms and biases too, so that a test notices a skipped one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            if is_norm:
                parameter.copy_(1.0 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_((std if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
