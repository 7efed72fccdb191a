"""The main job on a fresh machine: ask, prune, compare, draw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmprune.core import config
from vlmprune.core.policy import Policy
from vlmprune.evaluation.native import Answer, Request, answer_requests, make_request
from vlmprune.evaluation.runner import evaluate, prompt_style
from vlmprune.evaluation.schema import ResultsFile, write_text_atomically
from vlmprune.evaluation.tables import keep_text, render_table
from vlmprune.evaluation.tasks.definition import Task, load_task

MODEL = "tiny-llava"
POLICIES = ("hiprune", "todre", "random")
BUDGETS = (0.22, 0.11)
IMAGES = 3
QUESTIONS_PER_IMAGE = 4
DEMO_SEED = 2025  # pictures that are shown; the evaluation draws others
_GAP, _LABEL = 8, 18  # pixels of the overview pictures


@dataclass(frozen=True)
class Quickstart:
    """What was made: the report as Markdown, the rows, and the files written."""

    report: str
    results: ResultsFile
    files: tuple[Path, ...]


def write_to_stdout(text: str) -> None:
    """Write a line of text to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def quickstart(
    output: str | Path,
    limit: int = 200,
    seed: int = 0,
    images: int = IMAGES,
    measure_time: bool = True,
    progress: bool = True,
    show: Callable[[str], None] = write_to_stdout,
) -> Quickstart:
    """Ask the embedded model about pictures, dense and pruned, evaluate policies, and draw what they keep.

    Writes `report.md`, `results.json`, `samples.jsonl` and one overview picture per image.

    Args:
        output: folder, made where missing.
        limit: questions of the evaluation. seed: which scenes it draws.
        images: pictures that are shown and drawn.
        measure_time: measure prefill times.
        progress: show a progress bar on standard error, if that is a terminal.
        show: takes each part of the report as text.

    Raises:
        InputError: a number out of range, or the folder cannot be written.
        CellsFailed: a policy raised.
    """
    from vlmprune.embedded import load_embedded

    output = Path(output)
    model, processor = load_embedded(MODEL)
    show(f"{MODEL} on {model.device}: answers about {images} pictures, then {limit} evaluated questions.\n")
    policies = [config.build(name, {"keep": keep}) for keep in BUDGETS for name in POLICIES]
    answers, files = _ask_and_draw(model, processor, policies, output, images)
    show(answers + "\n")
    results = evaluate(
        model,
        processor,
        model_name=MODEL,
        policies=policies,
        tasks=["scenes"],
        limit=limit,
        seed=seed,
        output=output,
        measure_time=measure_time,
        progress=progress and sys.stderr.isatty(),
    )
    table = render_table(results.rows)
    show(table + "\n")
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in files)
    report = f"# vlmprune quickstart\n\n{answers}\n\n{table}\n\n{pictures}\n"
    files.append(write_text_atomically(output / "report.md", report))
    show(f"Written to {output}: {', '.join(path.name for path in files)}, results.json, samples.jsonl")
    return Quickstart(report, results, tuple(files))


def _ask_and_draw(
    model: Any, processor: Any, policies: Sequence[Policy], output: Path, images: int
) -> tuple[str, list[Path]]:
    """Answers as a Markdown table, and the overview pictures written."""
    from vlmprune.api import applied
    from vlmprune.plot import plot_selection

    task, style = load_task("scenes"), prompt_style(MODEL)
    groups = _docs_by_image(task, images)
    docs = [doc for group in groups for doc in group]
    requests = [make_request(processor, task, doc, style) for doc in docs]
    columns = {"dense": _answers(model, processor, task, requests)}
    panels: list[list[tuple[str, Image.Image]]] = [[("image", group[0]["image"])] for group in groups]
    for policy in policies:
        title = f"{policy.name} {keep_text(policy.budget.describe())}"
        with applied(model, policy, processor=processor) as handle:
            columns[title] = _answers(model, processor, task, requests, handle)
            for group, panel in zip(groups, panels, strict=True):
                first = make_request(processor, task, group[0], style)
                answer_requests(model, processor, [first], task.generation, 1, handle)
                panel.append((title, plot_selection(group[0]["image"], handle.last, processor=processor)))
    files = []
    for number, panel in enumerate(panels, start=1):
        path = output / f"overlay-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        overview(panel).save(path)
        files.append(path)
    return _answer_table(task, docs, columns, {id(g[0]["image"]): n for n, g in enumerate(groups, 1)}), files


def _docs_by_image(task: Task, images: int) -> list[list[dict[str, Any]]]:
    """Documents of the first pictures, a few questions each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for doc in task.load_docs(DEMO_SEED, images * len(task.families)):
        groups.setdefault(doc["image_id"], []).append(doc)
    ranked = [sorted(g, key=lambda doc: doc["family"] not in task.headline) for g in groups.values()]
    return [group[:QUESTIONS_PER_IMAGE] for group in ranked[:images]]


def _answers(model: Any, processor: Any, task: Task, requests: Sequence[Request], handle: Any = None) -> list[Answer]:
    return answer_requests(model, processor, requests, task.generation, len(requests), handle)


def _answer_table(
    task: Task, docs: Sequence[dict[str, Any]], columns: dict[str, list[Answer]], picture: dict[int, int]
) -> str:
    """Questions and answers as Markdown; `picture` gives the number of an image by its `id`."""
    header = ["picture", "question", "truth", *columns]
    lines = [header, ["---"] * len(header)]
    for number, doc in enumerate(docs):
        answers = [_shown(task, doc, column[number].text) for column in columns.values()]
        lines.append([str(picture[id(doc["image"])]), doc["question"], doc["answer"], *answers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(task: Task, doc: dict[str, Any], text: str) -> str:
    """An answer, shortened, with a mark if it is wrong."""
    words = (text if len(text) <= 24 else f"{text[:20]} ...") or "(nothing)"
    return words if task.is_right(doc, text) else f"{words} ✗"


def overview(
    panels: Sequence[tuple[str, Image.Image]], columns: int = 1 + len(POLICIES), side: int = 280
) -> Image.Image:
    """One picture of several, each under its title; the first one opens every row.

    Args:
        panels: title and picture. columns: pictures per row. side: width and height of each in pixels.
    """
    rest = list(panels[1:])
    per_row = max(1, columns - 1)
    panels = [p for i in range(0, max(1, len(rest)), per_row) for p in (panels[0], *rest[i : i + per_row])]
    rows = -(-len(panels) // columns)
    width = _GAP + min(columns, len(panels)) * (side + _GAP)
    sheet = Image.new("RGB", (width, _GAP + rows * (side + _LABEL + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (title, picture) in enumerate(panels):
        x = _GAP + number % columns * (side + _GAP)
        y = _GAP + number // columns * (side + _LABEL + _GAP)
        draw.text((x, y), title, fill="black", font=font)
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x, y + _LABEL))
    return sheet
