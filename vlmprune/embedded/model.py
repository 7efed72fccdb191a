"""Architecture and starting weights of `tiny-llava`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .scenes import GRID, IMAGE_SIZE, PATCH_SIZE

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

WIDTH = 128
HEADS = 4
VISION_DEPTH = 6
TEXT_LAYERS = 6
TEXT_MLP = 384
VOCAB_SIZE = 512
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID = 0, 1, 2, 3, 4
EMBEDDING_STD = 0.5
FINAL_NORM = 0.12


def build_config() -> LlavaConfig:
    """Config of `tiny-llava`: CLIP tower of 6 blocks, 196 patches, two-layer projector, Llama of 6 layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=VISION_DEPTH,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="relu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=TEXT_MLP,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_act="relu",
        rms_norm_eps=1e-5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Make the untrained model with the starting weights of the training recipe, float32, in eval mode."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config())
        with torch.no_grad():
            _start_tower(vision_tower(model))
            _start_projector(model.model.multi_modal_projector)
            _start_decoder(model.model.language_model)
    model.tie_weights()
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD_ID, BOS_ID, EOS_ID
    return model.eval()


def vision_tower(model: LlavaForConditionalGeneration) -> Any:
    """The module with `embeddings`, `encoder` and the norms, in old and new transformers."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _start_tower(tower: Any) -> None:
    embeddings = tower.embeddings
    embeddings.class_embedding.normal_(std=0.5)
    patch_weight = embeddings.patch_embedding.weight
    patch_weight.normal_(std=0.7 / math.sqrt(patch_weight[0].numel()))
    embeddings.position_embedding.weight[0].zero_()
    # Two-dimensional sine waves let attention to a neighbour be linear in query and key from the first step.
    embeddings.position_embedding.weight[1:].copy_(0.7 * sine_positions(GRID, WIDTH))
    for layer in tower.encoder.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                into_stream = name.endswith(("out_proj", "fc2"))
                std = 0.8 / math.sqrt(module.in_features)
                module.weight.normal_(std=std / math.sqrt(2 * VISION_DEPTH) if into_stream else std)
                module.bias.zero_()


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine/cosine table `[grid * grid, width]`: a quarter each for sin x, cos x, sin y, cos y."""
    quarter = width // 4
    frequency = torch.exp(torch.linspace(math.log(0.15), math.log(2.2), quarter))
    angle = torch.arange(grid, dtype=torch.float32)[:, None] * frequency  # [G, Q]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [G, 2Q]
    across = wave[None, :, :].expand(grid, grid, -1)
    down = wave[:, None, :].expand(grid, grid, -1)
    return torch.cat([across, down], dim=-1).reshape(grid * grid, width)


def _start_projector(projector: Any) -> None:
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(std=1.0 / math.sqrt(linear.in_features))
        linear.bias.zero_()


def _start_decoder(decoder: Any) -> None:
    decoder.embed_tokens.weight.normal_(std=EMBEDDING_STD)
    # Tied embeddings this large give large logits; a small final norm brings them back to scale.
    decoder.norm.weight.fill_(FINAL_NORM)
    for index, layer in enumerate(decoder.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02 if name.endswith(("o_proj", "down_proj")) else 0.08)
        if index < 3:
            # Equal queries and keys: a word starts by attending to tokens that resemble it.
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
