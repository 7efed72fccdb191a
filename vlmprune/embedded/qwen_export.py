"""Write `tiny-qwen` as a checkpoint folder that transformers 4.57 and every 5.x release read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .export import to_json, write_folder
from .model import BOS_ID, EOS_ID, PAD_ID
from .qwen_model import MAX_PIXELS, MERGE, MIN_PIXELS, MROPE_SECTION, PATCH, THETA
from .qwen_processor import IMAGE_TOKEN, QWEN_CHAT_TEMPLATE, VIDEO_TOKEN, VISION_END, VISION_START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration

PROCESSOR = "Qwen2_5_VLProcessor"


def export_qwen(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, target: Path) -> None:
    """Replace the checkpoint files of `tiny-qwen` in `target`, each atomically; other files there stay.

    Args:
        model: weights in any dtype; stored as bfloat16, loaded as float32 unless told otherwise.
        tokenizer: from `build_qwen_tokenizer`.
        target: folder, created where missing.
    """
    write_folder(model, tokenizer, target, _plain_files(), _finish)


def _finish(source: Path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    # 4.57 reads rope_theta and rope_scaling, 5.x rope_parameters.
    rope = {"rope_type": "default", "mrope_section": list(MROPE_SECTION)}
    text["rope_theta"], text["rope_scaling"] = THETA, {"type": "default", **rope}
    text["rope_parameters"] = {**rope, "rope_theta": THETA}
    text["bos_token_id"], text["eos_token_id"] = BOS_ID, EOS_ID
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = True
    for part in (config, text, config["vision_config"]):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    path.write_text(to_json(config))


def _plain_files() -> dict[str, str]:
    """Small files whose layout changed between releases; this layout is read by all."""
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": PROCESSOR,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN,
        "extra_special_tokens": {
            "image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN,
            "vision_bos_token": VISION_START, "vision_eos_token": VISION_END,
        },
        "clean_up_tokenization_spaces": False, "model_max_length": 1024, "padding_side": "left",
        # Without this, 4.57 adds token_type_ids, which generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    pictures = {
        "processor_class": PROCESSOR, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
        "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "max_new_tokens": 4}
    return {
        "tokenizer_config.json": to_json(tokenizer),
        "processor_config.json": to_json({"processor_class": PROCESSOR}),
        "preprocessor_config.json": to_json({"image_processor_type": "Qwen2VLImageProcessor", **pictures}),
        "video_preprocessor_config.json": to_json({"video_processor_type": "Qwen2VLVideoProcessor", **pictures}),
        "generation_config.json": to_json(generation),
        "chat_template.jinja": QWEN_CHAT_TEMPLATE,
    }
