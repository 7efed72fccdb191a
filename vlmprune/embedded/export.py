"""Write a checkpoint folder that transformers 4.57 and every 5.x release read with their stock classes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from .model import BOS_ID, EOS_ID, PAD_ID
from .processor import CHAT_TEMPLATE
from .scenes import IMAGE_SIZE, PATCH_SIZE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

SHARED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def export_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, target: Path) -> None:
    """Replace the checkpoint files of `tiny-llava` in `target`, each atomically; other files there stay.

    Args:
        model: weights in any dtype; stored as bfloat16, loaded as float32 unless told otherwise.
        processor: from `build_processor`.
        target: folder, created where missing.
    """
    write_folder(model, processor.tokenizer.backend_tokenizer, target, _plain_files(), _finish)


def write_folder(
    model: PreTrainedModel, tokenizer: Tokenizer, target: Path, plain: dict[str, str], finish: Callable[[Path], None]
) -> None:
    """Save weights, config and tokenizer, let `finish` edit them in a temporary folder, then move all to `target`.

    Args:
        model: weights in any dtype; stored as bfloat16.
        tokenizer: backend tokenizer.
        target: folder, created where missing; files with other names there stay.
        plain: content of the small files by name.
        finish: called with the temporary folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source = Path(folder)
        model.to(torch.bfloat16).save_pretrained(source)
        tokenizer.save(str(source / "tokenizer.json"))
        finish(source)
        for name, content in plain.items():
            (source / name).write_text(content)
        for name in (*SHARED_FILES, *plain):
            (source / name).chmod(0o644)
            os.replace(source / name, target / name)


def _finish(source: Path) -> None:
    _rename_tower(source / "model.safetensors")
    _patch_config(source / "config.json")


def _rename_tower(path: Path) -> None:
    """Store tower weights under the name of 4.57, which 5.x maps to its own."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(path)
    named = {k if k.startswith(new) or not k.startswith(old) else new + k[len(old) :]: v for k, v in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


def _patch_config(path: Path) -> None:
    config = json.loads(path.read_text())
    # 4.57 reads rope_theta, 5.x rope_parameters.
    config["text_config"]["rope_theta"] = 10000.0
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config["text_config"]["bos_token_id"], config["text_config"]["eos_token_id"] = BOS_ID, EOS_ID
    config["tie_word_embeddings"] = True
    config["dtype"] = "float32"
    path.write_text(to_json(config))


def _plain_files() -> dict[str, str]:
    """Small files whose layout changed between releases; this layout is read by all."""
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"},
        "clean_up_tokenization_spaces": False, "model_max_length": 1024, "padding_side": "left",
        # Without this, 4.57 adds token_type_ids, which LLaVA's generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    images = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "max_new_tokens": 4}
    return {
        "tokenizer_config.json": to_json(tokenizer),
        "processor_config.json": to_json(processor),
        "preprocessor_config.json": to_json(images),
        "generation_config.json": to_json(generation),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def to_json(data: dict[str, Any]) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(data, indent=2) + "\n"
