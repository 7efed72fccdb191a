"""Time greedy k-center selection and append the measurements to a CSV file.

    python -m vlmprune.evaluation.bench.bench_kcenter --n 576 2880 --d 1024 --k 64 --batch 1 8

Each row of the CSV is one provider at one size: quantiles of the time of one call, on the device that was
there, with versions and date. Providers: ``torch-gram``, ``torch-features``, ``triton`` (CUDA only).
CUDA calls are timed with events, CPU calls with the wall clock. Column ``load`` is the load average of the
machine in the last minute: above the number of cores, CPU times say little.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from vlmprune.evaluation.bench.rows import append_row
from vlmprune.kernels.backend import Backend, triton_installed
from vlmprune.kernels.kcenter import greedy_select
from vlmprune.kernels.kcenter.types import Route

RESULTS = Path(__file__).parent / "results" / "kcenter.csv"
COLUMNS = (
    "kernel", "provider", "N", "d", "k", "batch", "dtype", "median_ms", "q20_ms", "q80_ms", "repeats",
    "device", "threads", "load", "torch", "triton", "date",
)  # fmt: skip
PROVIDERS: Mapping[str, tuple[Backend, Route]] = MappingProxyType(
    {
        "torch-gram": ("torch", "gram"),
        "torch-features": ("torch", "features"),
        "triton": ("triton", "auto"),
    }
)

_log = logging.getLogger("vlmprune")


def time_call(call: Callable[[], object], device: torch.device, repeats: int, warmup: int) -> list[float]:
    """Milliseconds of ``repeats`` calls after ``warmup`` calls."""
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def measure(
    provider: str, n: int, d: int, k: int, batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, object]:
    """One row of the CSV file."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, d, generator=generator).to(device=device, dtype=dtype)
    backend, route = PROVIDERS[provider]
    times = time_call(lambda: greedy_select(x, k, backend=backend, route=route), device, repeats, warmup=3)
    median, low, high = quantiles(times)
    return {
        "kernel": "kcenter",
        "provider": provider,
        "N": n,
        "d": d,
        "k": k,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "median_ms": f"{median:.4g}",
        "q20_ms": f"{low:.4g}",
        "q80_ms": f"{high:.4g}",
        "repeats": repeats,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def triton_version() -> str:
    """Installed version, empty without Triton."""
    if not triton_installed():
        return ""
    import triton

    return triton.__version__


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[576], help="tokens per sample")
    parser.add_argument("--d", type=int, nargs="+", default=[1024], help="channels")
    parser.add_argument("--k", type=int, nargs="+", default=[64], help="picks per sample")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="samples")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--provider", nargs="+", default=None, choices=sorted(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device)
    usable = [name for name in PROVIDERS if name != "triton" or (device.type == "cuda" and triton_installed())]
    sizes = itertools.product(options.dtype, options.n, options.d, options.k, options.batch)
    for dtype, n, d, k, batch in sizes:
        for provider in options.provider or usable:
            row = measure(provider, n, d, k, batch, getattr(torch, dtype), device, options.repeats)
            append_row(options.out, row, COLUMNS)
            _log.info("%s", " ".join(f"{name}={row[name]}" for name in COLUMNS[1:10]))


if __name__ == "__main__":
    main()
