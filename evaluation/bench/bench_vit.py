"""Time ToMe on image classifiers of timm with random weights, beside the dense model and a textbook ToMe.

    vlmprune bench vit --model vit_base_patch16_224 --r 13 --output evaluation/bench/results/vit.csv

The three take turns on the same images, so that changes of the machine hit all of them. ``dense`` is timm's model with
fused attention, ``ours`` the same model under ``vlmprune.apply(model, "tome", r=r)``, ``textbook`` the ToMe of
:mod:`vlmprune.evaluation.bench.textbook_tome`. No network is needed.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune._version import __version__
from vlmprune.core.errors import InputError
from vlmprune.evaluation.bench.bench_kcenter import device_name, quantiles
from vlmprune.evaluation.bench.rows import append_row
from vlmprune.evaluation.bench.textbook_tome import TextbookToMe

DEFAULT_R: Mapping[str, int] = MappingProxyType(
    {"vit_base_patch16_224": 13, "vit_large_patch16_384": 23, "vit_base_patch16_384": 23}
)
"""Models that run by default, with the tokens merged per block."""
PROVIDERS = ("dense", "ours", "textbook")
COLUMNS = (
    "model", "image_size", "r", "batch", "dtype", "tokens", "tokens_left", "flops_dense", "flops_merged", "flop_ratio",
    *(f"{name}_{what}" for name in PROVIDERS for what in ("ms", "q20_ms", "q80_ms", "images_s")),
    "speedup_ours", "share_ours", "speedup_textbook", "share_textbook", "difference", "repeats", "device", "threads",
    "load", "torch", "timm", "vlmprune", "date",
)  # fmt: skip
"""Of a row: FLOPs per image; times of one batch; ``speedup`` is the median over rounds of the dense time divided by the
other one of the same round, ``share`` that divided by the FLOP ratio; ``difference`` is the largest one between logits
of ``ours`` and ``textbook``; ``load`` is the load average of the machine in the last minute: above the number of
cores, CPU times say little."""

Model = Callable[[Tensor], Tensor]


def run(
    models: Sequence[str],
    r: int | None = None,
    *,
    batch: int = 8,
    repeats: int = 10,
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    output: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure models one after the other.

    Args:
        models: names of timm's plain vision transformers.
        r: tokens merged per block; None takes :data:`DEFAULT_R`.
        batch: images per call.
        repeats: timed rounds, after one that is not counted.
        threads: of PyTorch on the CPU; None leaves them.
        dtype: of weights and images.
        device: where to run.
        output: CSV file to append each row to.

    Yields:
        One row (:data:`COLUMNS`) per model.

    Raises:
        InputError: timm is missing, a model that cannot be compared, no r for it, or an ``output`` of other columns.
    """
    builds = [(name, build(name), r_of(name, r)) for name in models]
    if output is not None:
        check_output(output)
    with _threads(threads):
        for name, model, merged in builds:
            row = measure(name, model, merged, batch, repeats, dtype, torch.device(device))
            if output is not None:
                append_row(output, row, COLUMNS)
            yield row


def r_of(name: str, r: int | None) -> int:
    """Tokens to merge per block of a model."""
    if r is None and name not in DEFAULT_R:
        raise InputError(f"Say how many tokens {name} merges per block: --r 13.")
    chosen = DEFAULT_R[name] if r is None else r
    if chosen < 1:
        raise InputError(f"r={chosen} merges nothing; give at least 1 token per block.")
    return chosen


def build(name: str) -> Any:
    """A model of timm with random weights.

    Raises:
        InputError: see :func:`run`.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(f"This needs timm, which cannot be imported ({error}); pip install vlmprune[vit]") from None
    if name not in timm.list_models():
        close = timm.list_models(f"*{name}*")[:3]
        raise InputError(f"timm has no model {name!r}" + (f"; it has {', '.join(close)}, ..." if close else "."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval()
    if not is_plain(model):
        example = next(iter(DEFAULT_R))
        raise InputError(f"{name} is no plain vision transformer that reads its class token, such as {example}.")
    return model


def is_plain(model: Any) -> bool:
    """True for a vision transformer without special blocks, whose head reads its only prefix token."""
    if type(model).__name__ != "VisionTransformer" or model.num_prefix_tokens != 1 or model.global_pool != "token":
        return False
    return all(type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention" for block in model.blocks)


@torch.inference_mode()
def measure(
    name: str, model: Any, r: int, batch: int, repeats: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """One row: see :func:`run`."""
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator).to(device, dtype)
    model = model.to(device, dtype)
    dense_flops, lengths = counted_flops(model, images[:1]), token_counts(model, r)
    merged_flops = flops(model, lengths)
    # The modules are copied, the weights are shared.
    reduced = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with vlmprune.applied(reduced, "tome", r=r):
        callers: dict[str, Model] = {"dense": model, "ours": reduced, "textbook": TextbookToMe(model, r)}
        logits = {caller: call(images).float() for caller, call in callers.items()}
        times = time_turns(callers, images, repeats)
    ratio = dense_flops / merged_flops
    row: dict[str, Any] = {
        "model": name,
        "image_size": width,
        "r": r,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": lengths[0],
        "tokens_left": lengths[-1],
        "flops_dense": dense_flops,
        "flops_merged": merged_flops,
        "flop_ratio": round(ratio, 4),
    }
    for caller in callers:
        median, low, high = (round(value, 2) for value in quantiles(times[caller]))
        row |= {f"{caller}_ms": median, f"{caller}_q20_ms": low, f"{caller}_q80_ms": high}
        row[f"{caller}_images_s"] = round(1e3 * batch / median, 2)
    for caller in ("ours", "textbook"):
        speedup = quantiles([a / b for a, b in zip(times["dense"], times[caller], strict=True)])[0]
        row |= {f"speedup_{caller}": round(speedup, 3), f"share_{caller}": round(speedup / ratio, 3)}
    row["difference"] = float(f"{float((logits['ours'] - logits['textbook']).abs().max()):.2g}")
    return row | {"repeats": repeats} | circumstances(device)


def time_turns(callers: Mapping[str, Model], images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every caller in ``repeats`` rounds; each round begins with another one."""
    names = list(callers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronise(images.device)
            start = time.perf_counter()
            callers[name](images)
            _synchronise(images.device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def token_counts(model: Any, r: int) -> list[int]:
    """Tokens that enter each block, and those that leave the last one, for ``r`` merges per block."""
    counts = [model.patch_embed.num_patches + 1]
    for _ in model.blocks:
        counts.append(counts[-1] - min(r, (counts[-1] - 1) // 2))
    return counts


def flops(model: Any, counts: Sequence[int]) -> int:
    """FLOPs (2 per multiply-add) of one image by formula; the matching is left out.

    Args:
        model: the model.
        counts: tokens that enter each block, and those that leave the last one; a block merges before its MLP.
    """
    width, patch = model.embed_dim, model.patch_embed.proj.weight[0].numel()
    total = 2 * model.patch_embed.num_patches * width * patch + 2 * width * model.num_classes
    for block, n, left in zip(model.blocks, counts, counts[1:], strict=False):
        total += 8 * n * width**2 + 4 * n * n * width + 4 * left * width * block.mlp.fc1.out_features
    return total


def counted_flops(model: Model, images: Tensor) -> int:
    """FLOPs that PyTorch counts in a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def circumstances(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date."""
    import timm

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vlmprune": __version__,
        "date": datetime.date.today().isoformat(),
    }


def check_output(path: Path) -> None:
    """Raise if rows cannot be appended to a file."""
    if not path.parent.is_dir():
        raise InputError(f"Folder {str(path.parent)!r} does not exist.")
    if path.is_file() and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
        raise InputError(f"{str(path)!r} holds other columns; give a new file.")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
