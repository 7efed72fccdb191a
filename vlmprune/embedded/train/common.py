"""What both training stages share: flat parameters, data-parallel ranks, schedule, checkpoints, the curve."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger("vlmprune.embedded.train")


@dataclass(frozen=True)
class StageSettings:
    """How long and with which step size a stage trains.

    Attributes:
        minutes: time budget; the schedule follows elapsed time, so a slow machine does fewer steps.
        batch: images per rank and step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        floor: final learning rate as a share of the peak.
        ema: decay of the running average of weights that is evaluated and kept.
        seed: seed of weights and data.
        save_every: seconds between checkpoints.
        eval_every: seconds between held-out evaluations.
        eval_scenes: number of held-out scenes.
        cache: pictures per rank that stage `decoder` keeps encoded.
        cpu_time: time is the process's own on the CPU, not the wall clock's: right where others share the cores.
    """

    minutes: float
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 200
    floor: float = 0.02
    ema: float = 0.999
    seed: int = 0
    save_every: float = 60.0
    eval_every: float = 90.0
    eval_scenes: int = 128
    cache: int = 2500
    cpu_time: bool = False


class FlatParameters:
    """All trained parameters as views of one vector, so that ranks exchange one gradient vector."""

    def __init__(self, modules: list[nn.Module], ema: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self.parameters]
        self.values = torch.cat([p.detach().flatten() for p in self.parameters])
        # One extra number carries rank 0's progress to the others along with the gradient.
        self.exchange = torch.zeros(sum(sizes) + 1)
        self.average = self.values.clone()
        self.decay, self.updates = ema, 0
        offset = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            view = slice(offset, offset + size)
            parameter.data = self.values[view].view_as(parameter)
            parameter.grad = self.exchange[view].view_as(parameter)
            offset += size

    def zero_grad(self) -> None:
        self.exchange.zero_()

    def reduce(self, progress: float, world: int) -> float:
        """Average gradients over the ranks, clip their norm to 1 and return rank 0's progress."""
        rank = dist.get_rank() if world > 1 else 0
        self.exchange[-1] = progress * world if rank == 0 else 0.0
        if world > 1:
            dist.all_reduce(self.exchange)
            self.exchange /= world
        progress = float(self.exchange[-1])
        norm = float(self.exchange[:-1].norm())
        if norm > 1.0:
            self.exchange[:-1] /= norm
        return progress

    def update_average(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.average.lerp_(self.values, 1 - decay)

    def swap_average(self) -> None:
        """Exchange weights and their running average; call twice to evaluate the average."""
        kept = self.values.clone()
        self.values.copy_(self.average)
        self.average.copy_(kept)

    def optimizer(self, lr: float) -> torch.optim.AdamW:
        """AdamW with weight decay on matrices only."""
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def learning_rate(settings: StageSettings, step: int, progress: float) -> float:
    """Linear warm-up by steps, then cosine over the share of the time budget that has passed."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    share = settings.floor + (1 - settings.floor) * cosine
    return settings.lr * share * min(1.0, (step + 1) / settings.warmup)


class Clock:
    """Training time that survives a resume; evaluation time does not count."""

    def __init__(self, budget_seconds: float, elapsed: float = 0.0, cpu_time: bool = False) -> None:
        self._now = time.process_time if cpu_time else time.monotonic
        self.budget, self.elapsed, self._mark = budget_seconds, elapsed, self._now()

    def tick(self) -> float:
        """Add the time since the last call and return progress in 0..1."""
        now = self._now()
        self.elapsed += now - self._mark
        self._mark = now
        return min(self.elapsed / self.budget, 1.0)

    def skip(self) -> None:
        """Forget the time since the last `tick`."""
        self._mark = self._now()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint of `save_checkpoint`, or None where there is none."""
    return torch.load(path, weights_only=True) if path.exists() else None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a long-format CSV with columns stage, step, images, seconds, metric, value."""
    new = not path.exists()
    fixed = {key: row.pop(key) for key in ("stage", "step", "images", "seconds")}
    with path.open("a", newline="") as handle:
        writer = csv.writer(handle)
        if new:
            writer.writerow([*fixed, "metric", "value"])
        for metric, value in row.items():
            writer.writerow([*fixed.values(), metric, f"{value:.4f}"])


def start_rank(rank: int, world: int, out: Path) -> None:
    """Set up one single-threaded data-parallel process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if world > 1:
        # A session of its own: the kernel's autogroup scheduling else gives all ranks one process's share.
        os.setsid()
        rendezvous = out / "rendezvous"
        dist.init_process_group("gloo", init_method=f"file://{rendezvous.resolve()}", rank=rank, world_size=world)
