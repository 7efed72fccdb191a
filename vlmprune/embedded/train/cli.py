"""Command line of the training: `python -m vlmprune.embedded.train tower --out runs/tiny --minutes 40 --ranks 2`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.multiprocessing as mp

from .common import StageSettings, start_rank


def _run(rank: int, stage: str, world: int, out: Path, settings: StageSettings) -> None:
    start_rank(rank, world, out)
    if stage == "tower":
        from .tower import train_tower

        train_tower(rank, world, out, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny-llava. Every stage resumes from its checkpoint in --out.")
    parser.add_argument("stage", choices=("tower",))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    settings = StageSettings(minutes=args.minutes, batch=args.batch, lr=args.lr, seed=args.seed)
    mp.start_processes(_run, (args.stage, args.ranks, args.out, settings), nprocs=args.ranks, start_method="spawn")
