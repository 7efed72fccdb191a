"""The circumstances of a measurement."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmprune._version import __version__
from vlmprune.evaluation.schema import Stamp

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
HARNESS_PACKAGES = ("lmms-eval", "datasets", "pyarrow")
TIMM_PACKAGES = ("timm",)
FULL_HASH_BYTES = 2 * 1024**3
_SAMPLE = 4096  # values per tensor that stand for a very large model


def make_stamp(model: Any, runner: str, batch_size: int, seeds: Mapping[str, Any]) -> Stamp:
    """Describe model, machine and code.

    Args:
        model: the model, of transformers or timm, in the state in which it is measured.
        runner: `"native"` or `"lmms-eval"`. batch_size: rows per generate call. seeds: see `Stamp`.
    """
    packages = PACKAGES + (HARNESS_PACKAGES if runner == "lmms-eval" else ())
    packages += () if hasattr(model, "config") else TIMM_PACKAGES
    weights = next(model.parameters())
    return Stamp(
        versions={"python": platform.python_version()} | {name: _version(name) for name in packages},
        device=device_name(getattr(model, "device", weights.device)),
        dtype=str(getattr(model, "dtype", weights.dtype)).removeprefix("torch."),
        attention=attention_implementation(model),
        threads=torch.get_num_threads(),
        runner=runner,
        batch_size=batch_size,
        git_revision=git_revision(),
        package_version=__version__,
        weight_hash=weight_hash(model),
        seeds=dict(seeds),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def weight_hash(model: torch.nn.Module) -> str:
    """Digest of names, shapes, dtypes and values of all parameters and persistent buffers, independent of the
    device.

    Of models above 2 GiB only some values of every tensor enter it; the digest then starts with `sampled-`.
    """
    state = model.state_dict()
    sampled = sum(value.nbytes for value in state.values()) > FULL_HASH_BYTES
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.reshape(-1)
        if sampled:
            flat = flat[:: max(1, flat.numel() // _SAMPLE)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return ("sampled-" if sampled else "") + digest.hexdigest()


def attention_implementation(model: Any) -> str | None:
    """Attention implementation of the decoder, or of a timm model's blocks, e.g. `"sdpa"`."""
    if not hasattr(model, "config"):
        return "sdpa" if all(block.attn.fused_attn for block in model.blocks) else "eager"
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "_attn_implementation", None)


def device_name(device: torch.device) -> str:
    """Name of the GPU, or `cpu (<processor>)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_processor()})" if device.type == "cpu" else str(device)


@functools.cache
def git_revision() -> str | None:
    """Revision of the checkout, `+changes` behind it if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return revision + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or not our checkout to read
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
