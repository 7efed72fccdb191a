"""Writes the generated parts of README.md and docs/: tables from the registry and from measured rows, and the picture.

python docs/generate.py            # rewrite what changed
python docs/generate.py --check    # exit 1 if a table is out of date
python docs/generate.py --picture  # draw docs/overlay.png again
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from vlmprune.cli.catalogue import policy_facts  # noqa: E402
from vlmprune.core.registry import registry  # noqa: E402
from vlmprune.embedded import embedded_models, model_path  # noqa: E402
from vlmprune.evaluation import vit_curve as curve  # noqa: E402
from vlmprune.evaluation.bench.speed_tables import read_rows, tower_table, vit_table  # noqa: E402
from vlmprune.evaluation.compare import RESULTS, read_all  # noqa: E402
from vlmprune.evaluation.schema import RESULTS_NAME, ResultRow, read_results  # noqa: E402
from vlmprune.evaluation.tables import render_grid, render_table  # noqa: E402
from vlmprune.evaluation.vit_rows import CurveRow, read_curve, render_curve  # noqa: E402

MODEL = "tiny-llava"
PICTURE = ROOT / "docs" / "overlay.png"
PICTURE_POLICIES = (("hiprune", 0.11), ("todre", 0.11), ("random", 0.11))
PICTURE_SEED = 11
SPEEDS = ROOT / "evaluation" / "bench" / "results"


def policies_table() -> str:
    """All registered policies, one line each."""
    lines = [
        "| Policy | Sites | What it is | Paper | Official code |",
        "|---|---|---|---|---|",
    ]
    for name in registry.available():
        facts = policy_facts(name)
        paper = f"[{facts['arxiv']}](https://arxiv.org/abs/{facts['arxiv']})" if facts["arxiv"] else "–"
        sites = ", ".join(f"`{site}`" for site in facts["sites"])
        lines.append(f"| `{name}` | {sites} | {facts['title']} | {paper} | {facts['code_licence']} |")
    return "\n".join(lines)


def results_table() -> str:
    """Policies x budgets of every embedded model that was compared, with where that was measured."""
    parts = []
    for model, rows in compared().items():
        for task in dict.fromkeys(row.task for row in rows):
            some = [row for row in rows if row.task == task]
            questions = max(row.n for row in some)
            parts.append(f"**{model}, {task}** ({questions} questions)\n\n{render_grid(some)}\n\n{_where(some)}")
    return "\n\n".join(parts)


def comparison() -> str:
    """Every row of the comparisons."""
    return "\n\n".join(f"{render_table(rows)}\n\n{_where(rows)}" for rows in compared().values())


def classifier_curve() -> str:
    """Accuracy and throughput inside the embedded classifier."""
    rows = read_curve(ROOT / curve.FOLDER, curve.MODEL)
    if not rows:
        return "Not measured yet."
    stamp = rows[0].stamp
    return (
        f"**{rows[0].model}, {rows[0].task}** ({rows[0].n} pictures, {rows[0].stamp.batch_size} at a time)\n\n"
        f"{render_curve(rows)}\n\n"
        f"Measured {stamp.started[:10]} on {stamp.device}, {stamp.dtype}, {stamp.attention} attention, threads: "
        f"{stamp.threads}, torch {stamp.versions['torch']}, timm {stamp.versions['timm']}.{_timed(rows)}"
    )


def tower_speed() -> str:
    """Times of vision towers with a merge inside."""
    return tower_table(read_rows(SPEEDS / "tower.csv"))


def vit_speed() -> str:
    """Images per second of ToMe inside timm classifiers."""
    return vit_table(read_rows(SPEEDS / "vit.csv"))


def _timed(rows: list[CurveRow]) -> str:
    stamps = [row.stamp_times for row in rows if row.stamp_times is not None]
    if not stamps:
        return " Not timed yet."
    days = ", ".join(sorted({stamp.started[:10] for stamp in stamps}))
    return f" Timed {days} on {', '.join(sorted({stamp.device for stamp in stamps}))}."


def card_results() -> str:
    """Every row that was measured for the model cards."""
    parts = []
    for model in embedded_models():
        if not (model_path(model) / RESULTS_NAME).is_file():
            continue
        rows = list(read_results(model_path(model)).rows)
        parts.append(f"{render_table(rows)}\n\n{_where(rows)}")
    return "\n\n".join(parts)


def compared() -> dict[str, list[ResultRow]]:
    """Embedded model -> rows of its comparison, where it was compared."""
    found = {name: read_all(ROOT / RESULTS, name) for name in embedded_models()}
    return {name: [row for file in files for row in file.rows] for name, files in found.items() if files}


def _where(rows: list[ResultRow]) -> str:
    stamp = rows[0].stamp
    return (
        f"Measured {stamp.started[:10]} on {stamp.device}, {stamp.dtype}, {stamp.attention} attention, "
        f"torch {stamp.versions['torch']}, transformers {stamp.versions['transformers']}."
    )


def support_policies() -> str:
    """Which policy runs on which family."""
    return _support_matrix().policy_table()


def support_families() -> str:
    """The families and what is tested on each."""
    return _support_matrix().family_table()


def support_vits() -> str:
    """Which policy runs on which image model; needs timm and open_clip."""
    return _test_module("vit_matrix").vit_table()


def _support_matrix() -> Any:
    return _test_module("support_matrix")


def _test_module(name: str) -> Any:
    """A module of the tests, which lie outside the package."""
    if str(ROOT / "tests" / "support") not in sys.path:
        sys.path.append(str(ROOT / "tests" / "support"))
    return importlib.import_module(name)


BLOCKS: dict[str, Callable[[], str]] = {
    "support-policies": support_policies,
    "support-families": support_families,
    "support-vits": support_vits,
    "policies": policies_table,
    "results": results_table,
    "comparison": comparison,
    "vit-curve": classifier_curve,
    "tower-speed": tower_speed,
    "vit-speed": vit_speed,
    "card-results": card_results,
}
OPTIONAL = ("timm", "open_clip")
FILES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "support.md")


def regenerated(text: str) -> str:
    """``text`` with everything between ``<!-- NAME:start -->`` and ``<!-- NAME:end -->`` made anew, as far as the
    packages that it needs are installed."""

    def fill(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            return match[0]

    pattern = re.compile(r"(<!-- ([\w-]+):start -->).*?(<!-- \2:end -->)", re.DOTALL)
    return pattern.sub(fill, text)


def draw_picture() -> Image.Image:
    """Kept tokens of several policies on one held-out scene, with the dense and the pruned answer."""
    import vlmprune
    from vlmprune.embedded.tasks import scene_questions
    from vlmprune.evaluation.prompts import answer_batch

    model, processor = vlmprune.load_embedded(MODEL)
    question = scene_questions(seed=PICTURE_SEED, n=1)[0]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.question}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    generation = {"max_new_tokens": 4, "do_sample": False}

    def ask() -> str:
        return answer_batch(model, processor, [prompt], [[question.image]], generation)[0][0].strip()

    panels = [(f"all tokens: {ask()}", question.image.convert("RGB"))]
    for name, keep in PICTURE_POLICIES:
        with vlmprune.applied(model, name, keep=keep) as handle:
            answer = ask()
            picture = vlmprune.plot_selection(question.image, handle.last, processor=processor)
            panels.append(
                (f"{name}, {handle.last.kept_tokens[0]} of {handle.last.visual_tokens[0]}: {answer}", picture)
            )
    return _side_by_side(panels, question.question)


def _side_by_side(panels: list[tuple[str, Image.Image]], title: str, size: int = 224, line: int = 20) -> Image.Image:
    sheet = Image.new("RGB", (len(panels) * (size + 8) - 8, size + 2 * line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((0, 2), title, fill="black", font=font)
    for i, (text, picture) in enumerate(panels):
        left = i * (size + 8)
        sheet.paste(picture.resize((size, size), Image.Resampling.LANCZOS), (left, line))
        draw.text((left, line + size + 2), text, fill="black", font=font)
    return sheet


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    stale = [
        path for path in FILES if regenerated(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    if options.check:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date; run python docs/generate.py\n")
        return int(bool(stale))
    for path in stale:
        path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
    if options.picture:
        draw_picture().save(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
