"""``vlmprune run``: one image, one question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    ParamOption,
    PolicyOption,
    build_policy,
    load,
    parse_parameters,
)
from vlmprune.cli.output import print_json, print_table, print_text
from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.core.report import Report
    from vlmprune.demos.compare import Comparison


def run(
    image: Annotated[Path, typer.Option("--image", help="Image file.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The question; image and chat format are added.")],
    model: ModelOption = "tiny-llava",
    policy: PolicyOption = "hiprune",
    keep: KeepOption = None,
    param: ParamOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the dense model.")] = False,
    overlay: Annotated[Path | None, typer.Option("--overlay", help="Write a picture of the kept tokens here.")] = None,
    raw_prompt: Annotated[
        bool,
        typer.Option("--raw-prompt", help="Pass the prompt as it is; it must hold the image placeholder."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are printed.")] = 3,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ask one question about one image, pruned and on request dense."""
    from vlmprune.loading import open_image

    # What can be checked without the model comes first.
    chosen = build_policy(policy, keep, parse_parameters(param))
    picture = open_image(image)
    if overlay is not None:
        _check_target(overlay)
    vlm, processor = load(model, dtype, device)

    from vlmprune.core.config import to_dict
    from vlmprune.demos import compare as comparing

    text = (comparing.raw_prompt if raw_prompt else comparing.chat_prompt)(processor, prompt)
    result = comparing.compare(
        vlm,
        processor,
        picture,
        text,
        chosen,
        dense=compare,
        overlay=overlay is not None,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
    )
    if overlay is not None:
        _save(result.overlay, overlay)
    if as_json:
        setting = {"model": model, "image": str(image), "prompt": text, "policy": to_dict(chosen)}
        print_json({**setting, **_result_facts(result, vlm), "overlay": None if overlay is None else str(overlay)})
    else:
        _print_result(result, overlay)


def _check_target(path: Path) -> None:
    from PIL import Image

    if not path.parent.is_dir():
        raise InputError(f"Folder {str(path.parent)!r} for the overlay does not exist.")
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"Overlay {str(path)!r} needs the suffix of an image format, such as .png.")


def _save(picture: Image.Image | None, path: Path) -> None:
    assert picture is not None
    try:
        picture.save(path)
    except OSError as error:
        raise InputError(f"Overlay {str(path)!r} cannot be written: {error}") from None


def _result_facts(result: Comparison, model: Any) -> dict[str, Any]:
    return {
        "pruned": asdict(result.pruned),
        "dense": None if result.dense is None else asdict(result.dense),
        "repeats": result.repeats,
        "kept": result.report.kept(),
        "report": result.report.summary(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _print_result(result: Comparison, overlay: Path | None) -> None:
    sides = [("dense", result.dense), ("pruned", result.pruned)]
    rows = [
        (
            name,
            side.answer,
            side.visual_tokens,
            f"{side.mean_visual_tokens:.1f}",
            f"{side.prefill_ms:.1f}",
            f"{side.answer_ms:.1f}",
            None if side.kv_bytes is None else f"{side.kv_bytes:,}",
        )
        for name, side in sides
        if side is not None
    ]
    columns = ("", "answer", "visual tokens", "mean over layers", "prefill ms", "answer ms", "KV bytes")
    print_table(columns, rows, right=columns[2:])
    print_text(f"Times are medians of {result.repeats} rounds after a warm-up.")
    for warning in result.report.warnings:
        print_text(f"Note: {warning}")
    if overlay is not None:
        print_text(f"Kept tokens drawn in {overlay}")
    drawing = token_map(result.report)
    if drawing:
        print_text(drawing)


def token_map(report: Report, sample: int = 0, image_index: int = 0) -> str:
    """Kept (``#``) and dropped (``.``) tokens of an image as text; empty for images with several views."""
    views = [record.views for record in report.images if record.sample == sample][image_index]
    if len(views) != 1:
        return ""
    kept = set(report.kept(sample, image_index))
    marks = ["#" if token in kept else "." for token in views[0].tokens().tolist()]
    width = views[0].width
    return "\n".join(" ".join(marks[row * width : (row + 1) * width]) for row in range(views[0].height))
