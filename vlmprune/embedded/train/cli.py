"""Command line of the training.

python -m vlmprune.embedded.train tower --out runs/tiny --minutes 30 --ranks 2
python -m vlmprune.embedded.train align --out runs/tiny
python -m vlmprune.embedded.train decoder --out runs/tiny --minutes 30 --ranks 2
python -m vlmprune.embedded.train export --out runs/tiny --target vlmprune/embedded/assets/tiny-llava
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.multiprocessing as mp

from .common import FlatParameters, StageSettings, load_checkpoint, start_rank

DEFAULTS = {"tower": (32, 1.5e-3), "decoder": (16, 2.5e-3)}  # images per rank and step, peak learning rate


def _run(rank: int, stage: str, world: int, out: Path, settings: StageSettings) -> None:
    start_rank(rank, world, out)
    if stage == "tower":
        from .tower import train_tower

        train_tower(rank, world, out, settings)
    else:
        from ..processor import build_processor
        from .align import load_aligned
        from .decoder import train_decoder

        model = load_aligned(out, settings.seed)
        train_decoder(rank, world, out, settings, model, build_processor().tokenizer)


def export(out: Path, target: Path, seed: int) -> None:
    """Write the averaged weights of stage 2 as a `from_pretrained` folder."""
    from ..export import export_model
    from ..processor import build_processor
    from .align import load_aligned
    from .facts import write_facts

    model = load_aligned(out, seed)
    state = load_checkpoint(out / "decoder.pt")
    if state is not None:
        flat = FlatParameters([model.model.multi_modal_projector, model.model.language_model], 0.0)
        flat.values.copy_(state["average"])
    export_model(model, build_processor(), target)
    write_facts(out, target, seed, model.num_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train tiny-llava. Stages run in the order tower, align, decoder, export; "
        "tower and decoder resume from their checkpoint in --out."
    )
    parser.add_argument("stage", choices=("tower", "align", "decoder", "export"))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and curve.csv")
    parser.add_argument("--minutes", type=float, default=30.0, help="time budget of the stage")
    parser.add_argument("--ranks", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--batch", type=int, help="images per rank and step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, help="export: folder of the finished model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        if args.target is None:
            parser.error("export needs --target")
        export(args.out, args.target, args.seed)
        return
    if args.stage == "align":
        from ..processor import build_processor
        from .align import align

        start_rank(0, 1, args.out)
        align(args.out, build_processor().tokenizer, seed=args.seed)
        return
    (args.out / "rendezvous").unlink(missing_ok=True)
    batch, lr = DEFAULTS[args.stage]
    settings = StageSettings(
        minutes=args.minutes, batch=args.batch or batch, lr=args.lr or lr, seed=args.seed, warmup=100
    )
    mp.start_processes(_run, (args.stage, args.ranks, args.out, settings), nprocs=args.ranks, start_method="spawn")
