"""Time a vision tower with and without reduction inside it, and append the measurements to a CSV file.

    python -m vlmprune.evaluation.bench.bench_tower --model tiny-llava tiny-qwen llava-1.5-tower qwen2.5-vl-tower

Encodes images through the model's own ``get_image_features``, dense and reduced in turns. The last two models have
random weights in the sizes of released towers (and a decoder of one narrow layer). Column ``flops_share`` is counted
while the first policy alone encodes the images, its own products and the whole encoder included; what later policies
compute is in the times only. Column ``load`` is the load average of the machine in the last minute.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from vlmprune.core import config
from vlmprune.core.errors import VlmpruneError
from vlmprune.embedded import embedded_models, load_embedded
from vlmprune.evaluation.bench.bench_kcenter import device_name, quantiles
from vlmprune.evaluation.bench.rows import append_row

RESULTS = Path(__file__).parent / "results" / "tower.csv"
COLUMNS = (
    "model", "policy", "keep", "first_blocks", "images", "tokens", "tokens_left", "flops_share", "dense_ms",
    "reduced_ms", "reduced_q20_ms", "reduced_q80_ms", "speed_up", "repeats", "dtype", "device", "threads", "load",
    "torch", "transformers", "date",
)  # fmt: skip
POLICIES = ("tome", "hiprune")
REST = 0.44
"""Share that later policies keep of what the tower leaves."""

_log = logging.getLogger("vlmprune")


def random_llava_tower() -> nn.Module:
    """LLaVA-1.5's tower, CLIP ViT-L/14-336, before a decoder of one layer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_NARROW)))


def random_qwen_tower() -> nn.Module:
    """Qwen2.5-VL's tower with 16 of its 32 blocks, before a decoder of one layer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 16, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 64,
        "fullatt_block_indexes": [7, 15],
    }  # fmt: skip
    text = {**_NARROW, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text))


_NARROW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 200000,
}  # fmt: skip
RANDOM_MODELS = {"llava-1.5-tower": random_llava_tower, "qwen2.5-vl-tower": random_qwen_tower}


def build(name: str, images: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A model, what its encoder takes for ``images`` images, and what else a call needs."""
    if name in embedded_models():
        model, processor = load_embedded(name)
        pictures = [torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8).numpy() for _ in range(images)]
        content = [{"type": "image"}] * images + [{"type": "text", "text": "what is there?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=pictures, text=[prompt], return_tensors="pt")
        encoder = {key: inputs.pop(key) for key in ("pixel_values", "image_grid_thw") if key in inputs}
        return model, encoder, dict(inputs)
    model = RANDOM_MODELS[name]().eval()
    config = model.config
    if name.startswith("llava"):
        encoder = {"pixel_values": torch.randn(images, 3, 336, 336)}
        tokens = 576 * images
    else:
        encoder = {
            "pixel_values": torch.randn(72 * 72 * images, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 72, 72]] * images),
        }
        tokens = 36 * 36 * images
    ids = torch.full((1, tokens), config.image_token_id)
    rest = {"input_ids": ids}
    if name.startswith("qwen"):
        rest["position_ids"] = torch.arange(tokens).expand(3, 1, -1)
    return model, encoder, rest


@torch.inference_mode()
def measure(
    name: str, policies: Sequence[str], keep: float, images: int, repeats: int, first_blocks: int | None = None
) -> dict[str, object]:
    """One row of the CSV file; ``first_blocks`` is ToMe's."""
    torch.manual_seed(0)
    model, encoder, rest = build(name, images)
    base = model.model
    within = {} if first_blocks is None else {"first_blocks": first_blocks}
    first = config.build(policies[0], {"keep": keep, **within})
    chosen = [first, *(config.build(name, {"keep": REST}) for name in policies[1:])]
    times: dict[bool, list[float]] = {True: [], False: []}
    with vlmprune.applied(model, chosen) as handle:
        model(**encoder, **rest)  # warms up, and says what is left
        report = handle.last
        assert report is not None
        for _ in range(repeats):
            times[True].append(_time(base, encoder))
            with handle.disabled():
                times[False].append(_time(base, encoder))
        tokens = sum(image.n_tokens for image in report.images)
        left = sum(report.sites[0].tokens_out) if report.sites else tokens
        with handle.disabled():
            dense = _flops(base, encoder)
    with vlmprune.applied(model, first):
        share = _flops(base, encoder) / dense
    median, low, high = quantiles(times[True])
    dense_ms = quantiles(times[False])[0]
    import transformers

    return {
        "model": name,
        "policy": "+".join(policies),
        "keep": keep,
        "first_blocks": "" if first_blocks is None else first_blocks,
        "images": images,
        "tokens": tokens,
        "tokens_left": left,
        "flops_share": f"{share:.4f}",
        "dense_ms": f"{dense_ms:.5g}",
        "reduced_ms": f"{median:.5g}",
        "reduced_q20_ms": f"{low:.5g}",
        "reduced_q80_ms": f"{high:.5g}",
        "speed_up": f"{dense_ms / median:.3f}",
        "repeats": repeats,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _flops(base: nn.Module, encoder: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        base.get_image_features(**encoder)
    return counter.get_total_flops()


def _time(base: nn.Module, encoder: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    base.get_image_features(**encoder)
    return (time.perf_counter() - start) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["tiny-llava", "tiny-qwen"])
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), help="composed in this order")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="share that leaves the tower")
    parser.add_argument("--first-blocks", type=int, default=None, help="blocks in which tome merges")
    parser.add_argument("--images", type=int, nargs="+", default=[4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.model:
        for keep in options.keep:
            for images in options.images:
                try:
                    row = measure(name, options.policy, keep, images, options.repeats, options.first_blocks)
                except VlmpruneError as error:
                    parser.error(str(error))
                append_row(options.out, row, COLUMNS)
                _log.info("%s", " ".join(f"{column}={row[column]}" for column in COLUMNS[:12]))


if __name__ == "__main__":
    main()
