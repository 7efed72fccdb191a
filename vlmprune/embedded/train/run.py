"""The part of a training loop that does not depend on what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from .common import (
    Clock,
    FlatParameters,
    StageSettings,
    append_row,
    learning_rate,
    load_checkpoint,
    logger,
    save_checkpoint,
)

SMOOTHING = 0.97


class Run:
    """One stage on one rank: resumes, steps, evaluates the averaged weights, writes checkpoints and the curve.

    Use: make it, load the data, call `begin`, then while `progress < 1`: compute a loss, `backward`, and `finish_step`.
    """

    def __init__(
        self, stage: str, out: Path, settings: StageSettings, modules: list[nn.Module], rank: int, world: int
    ) -> None:
        self.stage, self.out, self.settings, self.rank, self.world = stage, out, settings, rank, world
        self.flat = FlatParameters(modules, settings.ema)
        self.optimizer = self.flat.optimizer(settings.lr)
        self.clock = Clock(settings.minutes * 60, cpu_time=settings.cpu_time)
        self.step, self.progress = 0, 0.0
        self.recent: dict[str, float] = {}
        state = load_checkpoint(self._path)
        if state is not None:
            self.step, self.clock.elapsed, self.flat.updates = state["step"], state["elapsed"], state["step"]
            self.flat.values.copy_(state["values"])
            self.flat.average.copy_(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def _path(self) -> Path:
        return self.out / f"{self.stage}.pt"

    @property
    def images(self) -> int:
        """Images seen by all ranks."""
        return self.step * self.settings.batch * self.world

    def begin(self) -> None:
        """Start the clock; what was spent on loading does not count."""
        self.clock.skip()
        self.progress = self.clock.tick()
        self._saved = self._evaluated = self.clock.elapsed

    def rng(self, stage_seed: int, shared: bool = False) -> np.random.Generator:
        """Generator of this step: a pure function of seed, stage, step and, unless `shared`, rank."""
        key = [self.settings.seed, stage_seed, self.step]
        return np.random.default_rng(key if shared else [*key, self.rank])

    def finish_step(self, recent: dict[str, float], evaluate: Callable[[], dict[str, float]]) -> None:
        """Update the weights from the gradients; on rank 0 evaluate and save when it is time.

        Args:
            recent: numbers of this step, shown as running averages.
            evaluate: held-out metrics of the weights in place; called with the averaged ones.
        """
        self.progress = self.flat.reduce(self.clock.tick(), self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, self.progress)
        self.optimizer.step()
        self.flat.update_average()
        self.step += 1
        old = self.recent
        self.recent = {k: SMOOTHING * old.get(k, v) + (1 - SMOOTHING) * v for k, v in recent.items()}
        last = self.progress >= 1.0
        if self.rank == 0 and (last or self.clock.elapsed - self._evaluated > self.settings.eval_every):
            self._evaluated = self.clock.elapsed
            self._evaluate(evaluate)
        if self.rank == 0 and (last or self.clock.elapsed - self._saved > self.settings.save_every):
            self._saved = self.clock.elapsed
            self._save()

    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> None:
        self.flat.swap_average()
        shown = {**self.recent, **evaluate()}
        self.flat.swap_average()
        self.clock.skip()
        text = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
        logger.info(
            "%s step %d images %d seconds %.0f %s", self.stage, self.step, self.images, self.clock.elapsed, text
        )
        row = {"stage": self.stage, "step": self.step, "images": self.images, "seconds": round(self.clock.elapsed)}
        append_row(self.out / "curve.csv", {**row, **shown})

    def _save(self) -> None:
        state = {"step": self.step, "elapsed": self.clock.elapsed, "images": self.images}
        weights = {"values": self.flat.values, "average": self.flat.average}
        save_checkpoint(self._path, {**state, **weights, "optimizer": self.optimizer.state_dict()})
