"""Accuracy and throughput of token reduction inside the embedded classifier `tiny-vit`, a file per row.

python -m vlmprune.evaluation.vit_curve                              # all rows of PLAN; goes on where a run stopped
python -m vlmprune.evaluation.vit_curve --policy tome --param r=13   # one row

Every row is measured on the same held-out pictures, beside random patches of which as many are left in every block,
and timed in turns with the dense model.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmprune.api import applied
from vlmprune.core.errors import InputError
from vlmprune.core.registry import registry, suggest
from vlmprune.embedded import digit_picture, load_embedded
from vlmprune.evaluation.compare import CALIBRATIONS, RESULTS
from vlmprune.evaluation.schema import DENSE, Stamp
from vlmprune.evaluation.stamp import make_stamp
from vlmprune.evaluation.statistics import paired_bootstrap, wilson
from vlmprune.evaluation.vit_measure import Attach, Cost, RandomPatches, answers, measure_cost, measure_speed
from vlmprune.evaluation.vit_rows import RANDOM_PATCHES, CurveRow, cell_title, read_row, row_path, write_row

logger = logging.getLogger("vlmprune.evaluation.vit_curve")
FOLDER = RESULTS / "vit"
MODEL, TASK = "tiny-vit", "digits"
Plan = Sequence[tuple[str, Mapping[str, Any]]]
PLAN: Plan = (
    *((RANDOM_PATCHES, {"keep": keep}) for keep in (0.75, 0.5, 0.25, 0.1)),
    *(("tome", {"r": r}) for r in (4, 8, 12, 16)),
    *(("zero_tprune", {"keep": keep}) for keep in (0.75, 0.5, 0.25)),
    *(
        ("dymu", {"keep": keep, "artefact": (RESULTS / CALIBRATIONS / f"{MODEL}-dymu-{keep}.json").as_posix()})
        for keep in (0.75, 0.5, 0.25)
    ),
)
"""Rows beside the dense one, those of policies that are not registered left out. DyMU's thresholds were found by
`vlmprune calibrate dymu --model tiny-vit --keep KEEP --tolerance 0.0001 --output FILE`."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        pictures: held-out pictures. seed: which ones.
        cost_pictures: of these, pictures for tokens and FLOPs.
        batch: pictures per forward. rounds: timed rounds of one batch; 0 measures no time.
        random_seeds: of the random patches beside each policy; 0 leaves them out.
    """

    pictures: int = 2000
    seed: int = 1
    cost_pictures: int = 64
    batch: int = 32
    rounds: int = 9
    random_seeds: int = 3


class Bench:
    """The classifier, a second instance that is never touched, and held-out pictures."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model, transform = load_embedded(MODEL)
        self.dense, _ = load_embedded(MODEL)
        self.depth, self.prefix = len(self.model.blocks), self.model.num_prefix_tokens
        pictures = [digit_picture(number, "test", settings.seed) for number in range(settings.pictures)]
        self.batches = [
            transform([Image.fromarray(picture.image) for picture in pictures[start : start + settings.batch]])
            for start in range(0, len(pictures), settings.batch)
        ]
        self.labels = [picture.label for picture in pictures]
        self.names = [f"digit-{settings.seed}-{number}" for number in range(len(pictures))]
        self.clusters = [f"digit {picture.source}" for picture in pictures]

    def stamp(self) -> Stamp:
        """The circumstances, now."""
        seed = self.settings.seed
        seeds = {"data": seed, "bootstrap": seed, "random": list(range(self.settings.random_seeds))}
        return make_stamp(self.model, "native", self.settings.batch, seeds)

    def right(self, attach: Attach) -> str:
        """One character per picture: `1` where the class is right."""
        found = answers(self.model, self.batches, self.names, attach)
        return "".join("01"[guess == label] for guess, label in zip(found, self.labels, strict=True))

    def cost(self, attach: Attach) -> Cost:
        """Tokens and FLOPs of the first pictures."""
        count = self.settings.cost_pictures
        pictures = torch.cat(self.batches[: -(-count // self.settings.batch)])[:count]
        return measure_cost(self.model, pictures, self.names, attach)

    def times(self, attach: Attach) -> dict[str, Any]:
        """The row's fields about time."""
        rounds = self.settings.rounds
        names = ("images_per_s", "images_per_s_dense", "speedup", "speedup_low", "speedup_high")
        if not rounds:
            return {**dict.fromkeys(names), "rounds": 0, "stamp_times": None}
        stamp = self.stamp()
        full: list[Tensor] = [batch for batch in self.batches if len(batch) == len(self.batches[0])]
        speed = measure_speed(self.model, self.dense, full, self.names, attach, rounds)
        found = (speed.own, speed.dense, speed.ratio, speed.low, speed.high)
        return {**dict(zip(names, found, strict=True)), "rounds": rounds, "stamp_times": stamp}

    def difference(self, name: str, right: str, others: Sequence[str]) -> dict[str, float | None]:
        """The row's fields about accuracy less the mean of others; pictures of one handwritten digit are a cluster."""
        names = (f"diff_{name}", f"diff_{name}_low", f"diff_{name}_high")
        if not others:
            return dict.fromkeys(names)
        mean = [sum(map(int, marks)) / len(others) for marks in zip(*others, strict=True)]
        found = paired_bootstrap([float(mark) for mark in right], mean, self.clusters, self.settings.seed)
        return dict(zip(names, found, strict=True))


def measure_curve(plan: Plan = PLAN, folder: Path = FOLDER, settings: Settings = Settings()) -> list[Path]:
    """Measure what is not there yet, the dense model first.

    Args:
        plan: pairs of policy and parameters.
        folder: of the files. A row of other pictures or weights is measured again; one that was timed in another
            number of rounds, or not at all, is timed again.
        settings: how much is measured.

    Returns:
        The files, old and new.

    Raises:
        InputError: a number out of range, or unknown policy or parameter. Whatever a policy raises while it runs;
        rows finished before stay.
    """
    _check(plan, settings)
    bench = Bench(settings)
    paths, dense = [], None
    for policy, params in ((DENSE, {}), *plan):
        paths.append(path := row_path(folder, MODEL, policy, params))
        row = _stored(path, bench)
        if row is None:
            logger.info("%s", cell_title(policy, params))
            write_row(path, row := _row(bench, policy, params, dense))
        elif settings.rounds not in (0, row.rounds):
            logger.info("%s, times", cell_title(policy, params))
            write_row(path, row := row.model_copy(update=bench.times(_attach(bench, policy, params))))
        dense = dense or row
    return paths


def registered(plan: Plan = PLAN) -> Plan:
    """The rows of a plan that can be measured here: the baseline's, and those of registered policies."""
    known = {RANDOM_PATCHES, *registry.available()}
    return [(policy, params) for policy, params in plan if policy in known]


def _check(plan: Plan, settings: Settings) -> None:
    low = {"pictures": 1, "cost_pictures": 1, "batch": 1, "rounds": 0, "random_seeds": 0, "seed": 0}
    for name, least in low.items():
        if getattr(settings, name) < least:
            raise InputError(f"{name} is {getattr(settings, name)}; it has to be at least {least}.")
    known = [RANDOM_PATCHES, *registry.available()]
    for policy, params in plan:
        if policy not in known:
            raise InputError(f"Unknown policy {policy!r}.{suggest(policy, known)}")
        if policy == RANDOM_PATCHES and (set(params) != {"keep"} or not 0 < params["keep"] <= 1):
            raise InputError(f"{RANDOM_PATCHES} takes keep, a share above 0 and up to 1; got {dict(params)}.")


def _stored(path: Path, bench: Bench) -> CurveRow | None:
    """The row in a file, None where there is none or it tells of other pictures or weights."""
    if not path.is_file():
        return None
    row, now = read_row(path), bench.stamp()
    same = (row.n, row.stamp.seeds, row.stamp.weight_hash) == (len(bench.labels), now.seeds, now.weight_hash)
    return row if same else None


def _row(bench: Bench, policy: str, params: Mapping[str, Any], dense: CurveRow | None) -> CurveRow:
    """Measure one row; `dense` is None for the dense row itself."""
    attach, stamp = _attach(bench, policy, params), bench.stamp()
    cost, right = bench.cost(attach), bench.right(attach)
    randoms: list[str] = []
    if policy not in (DENSE, RANDOM_PATCHES):
        counts = [max(1, round(tokens) - bench.prefix) for tokens in cost.attended]
        for seed in range(bench.settings.random_seeds):
            randoms.append(bench.right(partial(RandomPatches, counts=counts, seed=seed)))
    low, high = wilson(right.count("1"), len(right))
    return CurveRow(
        model=MODEL,
        task=TASK,
        policy=policy,
        params=dict(params),
        seed=0 if policy == RANDOM_PATCHES else params.get("seed"),
        n=len(right),
        right=right,
        accuracy=right.count("1") / len(right),
        ci_low=low,
        ci_high=high,
        **bench.difference("dense", right, [] if dense is None else [dense.right]),
        **bench.difference("random", right, randoms),
        accuracy_random=tuple(marks.count("1") / len(marks) for marks in randoms),
        tokens_attended=cost.attended,
        tokens_passed=cost.passed,
        tokens_exit=cost.exit,
        flops=cost.flops,
        flops_dense=cost.flops if dense is None else dense.flops,
        stamp=stamp,
        **bench.times(attach),
    )


def _attach(bench: Bench, policy: str, params: Mapping[str, Any]) -> Attach:
    """What puts a row's policy on the model."""
    if policy == DENSE:
        return _untouched
    if policy == RANDOM_PATCHES:
        patches = bench.model.patch_embed.num_patches
        return partial(RandomPatches, counts=[max(1, int(params["keep"] * patches))] * bench.depth, seed=0)
    return partial(_applied, policy, dict(params))


def _untouched(model: Any) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _applied(policy: str, params: dict[str, Any], model: Any) -> AbstractContextManager[Any]:
    return applied(model, policy, **params)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    default = Settings()
    parser = argparse.ArgumentParser(description="Accuracy and throughput of token reduction inside tiny-vit.")
    parser.add_argument("--policy", help="one row instead of the plan")
    parser.add_argument("--param", action="append", default=[], help="key=value of the row's policy")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    for name in ("pictures", "seed", "cost_pictures", "batch", "rounds", "random_seeds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    policy, pairs, folder = given.pop("policy"), given.pop("param"), given.pop("folder")
    plan = registered() if policy is None else [(policy, _parameters(pairs))]
    paths = measure_curve(plan, folder, Settings(**given))
    sys.stdout.write("".join(f"{path}\n" for path in paths))


def _parameters(pairs: Sequence[str]) -> dict[str, Any]:
    import yaml

    split = [pair.partition("=") for pair in pairs]
    if any(not separator for _, separator, _ in split):
        raise InputError(f"--param takes key=value; got {', '.join(pairs)}.")
    return {key: yaml.safe_load(value) for key, _, value in split}


if __name__ == "__main__":
    main()
