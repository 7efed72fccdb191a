"""The commands do their job: listing, describing, running, evaluating, checking."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmprune.cli import main
from vlmprune.cli.catalogue import parameter_docs, parameter_facts
from vlmprune.core.bases import ScorePolicy
from vlmprune.core.context import Context
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import registry


def printed(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(argv) == code
    output = capsys.readouterr()
    if code == 0:
        assert output.err == ""
    return output.out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((300, 224), 90).convert("RGB").save(path)
    return path


def test_help_and_version_import_nothing_heavy(repo_root: Path) -> None:
    code = (
        "import sys; from vlmprune.cli import main\n"
        "assert main([]) == main(['run', '--help']) == main(['--version']) == 0\n"
        "assert not {'torch', 'numpy', 'transformers', 'gradio', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from vlmprune import __version__

    assert done.stdout.splitlines()[-1] == __version__
    for command in ("list", "info", "run", "eval", "calibrate", "bench", "check", "demo", "quickstart", "tasks-dir"):
        assert f"\n  {command} " in done.stdout


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {row["name"]: row for row in json.loads(printed(["list", "--json"], capsys))}
    assert list(facts) == registry.available()
    assert facts["hiprune"]["sites"] == ["post_encoder"]
    assert facts["hiprune"]["arxiv"] == "2508.00553"
    assert facts["todre"]["sites"] == ["post_encoder", "decoder_layer"]
    assert facts["downsample"]["sites"] == ["image"]
    assert all(row["title"] and row["sites"] for row in facts.values())
    table = printed(["list", "*prune"], capsys)
    assert "hiprune" in table and "2508.00553" in table and "todre" not in table


def test_every_parameter_of_every_policy_is_described() -> None:
    missing = [
        f"{name}.{field.name}"
        for name in registry.available(wrappers=True)
        for field in fields(registry.get(name))
        if not parameter_docs(registry.get(name)).get(field.name)
    ]
    assert not missing


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(printed(["info", "hiprune", "--json"], capsys))["policy"]
    rows = {row["name"]: row for row in shown["parameters"]}
    assert set(rows) == {field.name for field in fields(registry.get("hiprune"))}
    assert rows["alpha"]["default"] == 0.1 and "anchors" in rows["alpha"]["doc"]
    text = printed(["info", "hiprune"], capsys)
    assert "alpha" in text and "0.1" in text and "2508.00553" in text


def test_argument_docs_end_with_their_section() -> None:
    class Documented:
        """Head.

        Args:
            one, two: first line
                and second.
            three: alone.

        Notes that are not about three.

        Raises:
            four: not a parameter.
        """

    assert parameter_docs(Documented) == {
        "one": "first line and second.",
        "two": "first line and second.",
        "three": "alone.",
    }


def test_info_of_a_model_names_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["info", "todre", "--model", "tiny-llava", "--keep", "0.5", "--json"]
    shown = json.loads(printed(argv, capsys))
    assert shown["model"]["text_depth"] == 6 and shown["model"]["tokens_per_image"] == 196
    layers = [request["layer"] for request in shown["requests"] if request["site"] == "decoder_layer"]
    assert layers and all(1 <= layer < 6 for layer in layers)
    assert "tokens_per_image" in printed(["info", "--model", "tiny-llava"], capsys)
    assert all(row["default"] != "required" for row in parameter_facts(registry.get("todre")))


def test_run_compares_and_draws(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "overlay.png"
    argv = [
        "run",
        "--image",
        str(picture),
        "--prompt",
        "what shape is red?",
        "--policy",
        "hiprune",
        "--keep",
        "0.22",
    ]
    argv += ["--compare", "--max-new-tokens", "3", "--repeats", "1", "--overlay", str(overlay)]
    shown = json.loads(printed([*argv, "--json"], capsys))
    dense, pruned = shown["dense"], shown["pruned"]
    assert (dense["visual_tokens"], pruned["visual_tokens"]) == (196, 43)  # floor or round of 43.12
    assert len(shown["kept"]) == 43
    # Six layers of 128 floats for each of key and value.
    assert dense["kv_bytes"] - pruned["kv_bytes"] == (196 - 43) * 2 * 6 * 128 * 4
    assert pruned["kv_bytes"] == shown["report"]["kv_bytes"]
    assert min(dense["prefill_ms"], pruned["prefill_ms"], dense["answer_ms"], pruned["answer_ms"]) > 0
    assert shown["policy"]["policy"] == "hiprune" and shown["overlay"] == str(overlay)
    with Image.open(overlay) as drawn:
        assert drawn.width == drawn.height >= 224


def test_run_prints_answers_and_a_map(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "run",
        "--image",
        str(picture),
        "--prompt",
        "what shape is red?",
        "--policy",
        "grid",
        "--keep",
        "49",
    ]
    text = printed([*argv, "--compare", "--max-new-tokens", "2", "--repeats", "1"], capsys)
    assert "dense" in text and "pruned" in text and "KV bytes" in text
    rows = [line.split() for line in text.splitlines() if set(line) <= {"#", ".", " "} and line.strip()]
    assert [len(row) for row in rows] == [14] * 14
    assert sum(row.count("#") for row in rows) == 49


def test_run_with_a_raw_prompt_a_folder_and_a_composition(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlmprune.embedded import model_path

    argv = [
        "run",
        "--image",
        str(picture),
        "--prompt",
        "USER: <image>\nwhat is it? ASSISTANT:",
        "--raw-prompt",
    ]
    argv += ["--model", str(model_path()), "--policy", "uniform+grid", "--keep", "0.5,16"]
    shown = json.loads(printed([*argv, "--max-new-tokens", "1", "--repeats", "1", "--json"], capsys))
    assert shown["prompt"].startswith("USER: <image>")
    assert shown["dense"] is None and shown["overlay"] is None
    assert [site["tokens_out"] for site in shown["report"]["sites"]] == [[98], [16]]


def test_keep_is_read_as_written(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "run",
        "--image",
        str(picture),
        "--prompt",
        "what?",
        "--policy",
        "uniform",
        "--max-new-tokens",
        "1",
    ]
    for keep, tokens in (("1", 1), ("1.0", 196), ("0.5", 98), ("10", 10)):
        shown = json.loads(printed([*argv, "--repeats", "1", "--json", "--keep", keep], capsys))
        assert shown["pruned"]["visual_tokens"] == tokens


def test_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    argv = ["eval", "--policy", "hiprune,uniform", "--keep", "0.22", "--keep", "20", "--tasks", "scenes"]
    argv += ["--limit", "6", "--seed", "7", "--no-time", "--output", str(folder)]
    table = printed(argv, capsys)
    assert "| hiprune | 22 % |" in table and "| uniform | 20 tokens |" in table
    rows = json.loads((folder / "results.json").read_text())["rows"]
    cells = {(row["policy"], row["keep"]) for row in rows}
    assert cells == {(p, k) for p in ("hiprune", "uniform", "random") for k in (0.22, 20)} | {("dense", 1.0)}
    assert (folder / "samples.jsonl").read_text().count("\n") == 7 * 6
    argv = ["eval", "--policy", "random", "--limit", "2", "--no-time", "--json"]
    results = json.loads(printed(argv, capsys))
    assert results["kind"] == "vlmprune-results" and results["failed"] == []


def test_tasks_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(printed(["tasks-dir", "scenes", "--limit", "2"], capsys).strip())
    assert folder.is_relative_to(tmp_path)
    assert (folder / "scenes.yaml").is_file() and (folder / "scenes.parquet").is_file()


def test_quickstart_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmprune.evaluation import quickstart

    asked: list[Any] = []
    monkeypatch.setattr(quickstart, "quickstart", asked.append)
    assert main(["quickstart", "--output", str(tmp_path)]) == 0
    assert asked == [tmp_path]


@dataclass(frozen=True)
class Raising(ScorePolicy):
    """Fails while it runs."""

    meta = PolicyMeta(title="raises, for tests")
    name = "raising"

    def scores(self, context: Context) -> torch.Tensor:
        raise RuntimeError("no scores today")


def test_eval_of_a_policy_that_raises_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.complete()
    monkeypatch.setitem(registry._classes, "raising", Raising)
    argv = ["eval", "--policy", "raising", "--limit", "2", "--no-time", "--output", str(tmp_path)]
    assert main(argv) == 1
    output = capsys.readouterr()
    assert "no scores today" in output.err.splitlines()[-1]
    assert "| dense |" in output.out
    assert json.loads((tmp_path / "results.json").read_text())["failed"][0]["policy"] == "raising"
