"""Command line of the training.

python -m vlmprune.embedded.train tower --out runs/tiny --minutes 30 --ranks 2
python -m vlmprune.embedded.train align --out runs/tiny
python -m vlmprune.embedded.train decoder --out runs/tiny --minutes 30 --ranks 2
python -m vlmprune.embedded.train export --out runs/tiny --target vlmprune/embedded/assets/tiny-llava

python -m vlmprune.embedded.train qwen-tower --out runs/qwen --minutes 40 --ranks 1
python -m vlmprune.embedded.train qwen-start --out runs/qwen
python -m vlmprune.embedded.train qwen-decoder --out runs/qwen --minutes 20 --ranks 1
python -m vlmprune.embedded.train qwen-export --out runs/qwen --target vlmprune/embedded/assets/tiny-qwen

python -m vlmprune.embedded.train vit --out runs/vit --minutes 40 --ranks 1 --cpu-time
python -m vlmprune.embedded.train vit-export --out runs/vit --target vlmprune/embedded/assets/tiny-vit
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch.multiprocessing as mp

from .common import FlatParameters, StageSettings, load_checkpoint, start_rank

# Images per rank and step, peak learning rate, pictures that are kept ready.
DEFAULTS = {
    "tower": (32, 1.5e-3, 2500),
    "decoder": (16, 2.5e-3, 2500),
    "qwen-tower": (24, 2e-3, 4000),
    "qwen-decoder": (16, 1e-3, 2000),
    "vit": (32, 1e-3, 0),
}
EVALUATED = {"vit": 600}  # held-out pictures, where not 128
BETWEEN = ("align", "qwen-start")


def _run(rank: int, stage: str, world: int, out: Path, settings: StageSettings) -> None:
    start_rank(rank, world, out)
    if stage == "tower":
        from .tower import train_tower

        train_tower(rank, world, out, settings)
    elif stage == "qwen-tower":
        from .qwen_tower import train_qwen_tower

        train_qwen_tower(rank, world, out, settings)
    elif stage == "vit":
        from .vit import train_vit

        train_vit(rank, world, out, settings)
    elif stage == "qwen-decoder":
        from .qwen_decoder import train_qwen_decoder
        from .qwen_start import load_start, load_tokenizer

        train_qwen_decoder(rank, world, out, settings, load_start(out, settings.seed), load_tokenizer())
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


def export_qwen_run(out: Path, target: Path, seed: int) -> None:
    """Write the averaged weights of stage `qwen-decoder` as a `from_pretrained` folder."""
    from .. import model_path
    from ..qwen_export import export_qwen
    from ..qwen_processor import build_qwen_tokenizer
    from .facts import write_facts
    from .qwen_facts import QWEN
    from .qwen_start import load_start

    model = load_start(out, seed)
    state = load_checkpoint(out / "qwen_decoder.pt")
    if state is not None:
        flat = FlatParameters([model.model.visual.merger, model.model.language_model], 0.0)
        flat.values.copy_(state["average"])
    export_qwen(model, build_qwen_tokenizer(model_path("tiny-llava") / "tokenizer.json"), target)
    write_facts(out, target, seed, model.num_parameters(), QWEN)


def export_vit_run(out: Path, target: Path, seed: int) -> None:
    """Write the averaged weights of stage `vit` as a folder that timm reads."""
    from ..vit_files import export_vit
    from ..vit_model import start_vit
    from .facts import write_facts
    from .vit_facts import VIT

    model = start_vit()
    state = load_checkpoint(out / "vit.pt")
    if state is not None:
        flat = FlatParameters([model], 0.0)
        flat.values.copy_(state["average"][: len(flat.values)])  # behind them stands the head of the patch labels
    export_vit(model, target)
    write_facts(out, target, seed, sum(p.numel() for p in model.parameters()), VIT)


EXPORTS = {"export": export, "qwen-export": export_qwen_run, "vit-export": export_vit_run}


def _between(step: str, out: Path, seed: int) -> None:
    """The short steps between the stages."""
    if step == "align":
        from ..processor import build_processor
        from .align import align

        align(out, build_processor().tokenizer, seed=seed)
    else:
        from .qwen_start import load_tokenizer, start_decoder

        start_decoder(out, load_tokenizer(), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train tiny-llava in the stages tower, align, decoder, export, or tiny-qwen from it in the stages "
        "qwen-tower, qwen-start, qwen-decoder, qwen-export, or tiny-vit from it in the stages vit, vit-export; tower, "
        "decoder and vit resume from their checkpoint in --out."
    )
    parser.add_argument("stage", choices=(*BETWEEN, *EXPORTS, *DEFAULTS))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and curve.csv")
    parser.add_argument("--minutes", type=float, default=30.0, help="time budget of the stage")
    parser.add_argument("--ranks", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--batch", type=int, help="images per rank and step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count minutes on the CPU, where others share the cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, help="export: folder of the finished model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage in EXPORTS:
        if args.target is None:
            parser.error(f"{args.stage} needs --target")
        EXPORTS[args.stage](args.out, args.target, args.seed)
        return
    if args.stage in BETWEEN:
        start_rank(0, 1, args.out)
        _between(args.stage, args.out, args.seed)
        return
    (args.out / "rendezvous").unlink(missing_ok=True)
    batch, lr, cache = DEFAULTS[args.stage]
    settings = StageSettings(
        minutes=args.minutes, batch=args.batch or batch, lr=args.lr or lr, seed=args.seed, warmup=100, cache=cache
    )
    evaluated = EVALUATED.get(args.stage, settings.eval_scenes)
    settings = replace(settings, eval_scenes=evaluated, cpu_time=args.cpu_time)
    mp.start_processes(_run, (args.stage, args.ranks, args.out, settings), nprocs=args.ranks, start_method="spawn")
