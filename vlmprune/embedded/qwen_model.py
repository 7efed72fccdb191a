"""Architecture and starting weights of `tiny-qwen`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .model import BOS_ID, EOS_ID, FINAL_NORM, HEADS, IMAGE_ID, PAD_ID, TEXT_MLP, VOCAB_SIZE, WIDTH

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VISION_WIDTH = 96
VISION_HEADS = 3
VISION_MLP = 224
VISION_DEPTH = 6
FULL_BLOCKS = (2, 5)
PATCH = 8  # pixels
MERGE = 2  # patches per side of a visual token
CELL = PATCH * MERGE  # pixels per side of a visual token
WINDOW = 64  # pixels
TEXT_LAYERS = 7  # one layer that writes positions, then six that start from tiny-llava
MROPE_SECTION = (2, 3, 11)  # frequencies for time, height, width; with the low base both axes turn visibly
THETA = 10000.0
VISION_START_ID, VISION_END_ID, VIDEO_ID = 456, 457, 458
MIN_PIXELS, MAX_PIXELS = 160 * 160, 320 * 320


def build_config() -> Qwen2_5_VLConfig:
    """Config of `tiny-qwen`: six vision blocks (two over the whole image), merger 2 x 2, decoder of 7 layers."""
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": VISION_DEPTH,
        "hidden_size": VISION_WIDTH,
        "hidden_act": "relu",
        "intermediate_size": VISION_MLP,
        "num_heads": VISION_HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": list(FULL_BLOCKS),
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": TEXT_MLP,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_theta": THETA,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": list(MROPE_SECTION)},
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Make the untrained model with the starting weights of the training recipe, float32, in eval mode."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config())
        with torch.no_grad():
            _start_tower(model.model.visual)
            _start_decoder(model.model.language_model)
    model.tie_weights()
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD_ID, BOS_ID, EOS_ID
    return model.eval()


def _start_tower(tower: Any) -> None:
    weight = tower.patch_embed.proj.weight
    weight.normal_(std=1.0 / math.sqrt(weight[0].numel()))
    for block in tower.blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                into_stream = name.endswith(("attn.proj", "down_proj"))
                std = 0.9 / math.sqrt(module.in_features)
                module.weight.normal_(std=std / math.sqrt(VISION_DEPTH) if into_stream else std)
                module.bias.zero_()
    for module in tower.merger.mlp:
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=1.0 / math.sqrt(module.in_features))
            module.bias.zero_()


def _start_decoder(decoder: Any) -> None:
    decoder.norm.weight.fill_(FINAL_NORM)
    for layer in decoder.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02 if name.endswith(("o_proj", "down_proj")) else 0.08)
                if module.bias is not None:
                    module.bias.zero_()
