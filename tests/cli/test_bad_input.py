"""Bad input ends with exit code 2 and one line on stderr that says what was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmprune.cli import main

QUESTION = ("--prompt", "what shape is red?")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("files")
    picture = Image.effect_noise((80, 60), 80).convert("RGB")
    picture.save(folder / "good.png")
    picture.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-400])
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.png").touch()
    Image.new("RGB", (3000, 2)).save(folder / "strip.png")
    (folder / "empty").mkdir()
    for name, config in (("text_model", {"model_type": "gpt2"}), ("unknown", {"model_type": "zork"})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def run_arguments(files: Path, *more: str, image: str = "good.png") -> list[str]:
    return ["run", "--image", str(files / image), *QUESTION, *more]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; returns its only line on stderr."""
    code = main(argv)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("vlmprune: "), printed.err
    return printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "hiprun"], "Unknown policy 'hiprun'. Did you mean 'hiprune'?"),
        (["--policy", "hiprune+rando", "--keep", "0.5,0.5"], "Did you mean 'random'?"),
        (["--policy", "hiprune+random", "--keep", "0.5"], "one keep per policy"),
        (["--policy", "missing.yaml"], "'missing.yaml' does not exist"),
        (["--keep", "0"], "at least 1 token"),
        (["--keep", "0.0"], "a share lies in (0, 1]"),
        (["--keep", "-0.2"], "a share lies in (0, 1]"),
        (["--keep", "-3"], "at least 1 token"),
        (["--keep", "1.5"], "a share lies in (0, 1]"),
        (["--keep", "nan"], "out of range"),
        (["--keep", "half"], "is not a number"),
        (["--keep", "macs:0.3"], "unknown prefix 'macs'"),
        (["--param", "alfa=0.3"], "Did you mean 'alpha'?"),
        (["--param", "alpha"], "not of the form key=value"),
        (["--param", "alpha=0.1", "--param", "alpha=0.2"], "given twice"),
        (["--param", "alpha=[1"], "cannot be read"),
        (["--param", "alpha=7"], "alpha=7"),
        (["--param", "alpha=much"], "alpha"),
        (["--overlay", "/no/such/folder/o.png"], "does not exist"),
        (["--overlay", "o.txt"], "suffix of an image format"),
        (["--model", "/no/such/folder"], "Model folder '/no/such/folder' does not exist"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "nowhere/"], "does not exist"),
        (["--model", "tiny-lava"], "Did you mean 'tiny-llava'?"),
        (["--model", ""], "model name is empty"),
        (["--device", "abacus"], "Unknown device 'abacus'"),
        (["--dtype", "float99"], "Unknown dtype 'float99'"),
        (["--repeats", "0"], "--repeats"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--zork"], "--zork"),
    ],
)
def test_run_options(options: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(run_arguments(files, *options), capsys)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "does not exist"),
        ("empty", "is not a file"),
        ("text.png", "cannot be read"),
        ("empty.png", "cannot be read"),
        ("cut.jpg", "cannot be read: image file is truncated"),
        ("strip.png", "is a strip of 3000 x 2 pixels"),
    ],
)
def test_images(image: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(run_arguments(files, image=image), capsys)
    assert message in line and image in line


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("empty", "holds no config.json"),
        ("broken", "not a valid JSON"),
        ("unknown", "zork"),
        ("text_model", "'gpt2' model, not one that takes images"),
    ],
)
def test_model_folders(folder: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(run_arguments(files, "--model", str(files / folder)), capsys)


def test_too_many_tokens(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(run_arguments(files, "--keep", "197"), capsys)
    assert "keep=197 tokens" in line and "at most 196" in line


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("what is it?", ["--raw-prompt"], "holds the image placeholder '<image>' 0 times"),
        ("<image> or <image>?", ["--raw-prompt"], "2 times"),
        ("is <image> red?", [], "leave it out"),
        ("  ", [], "question is empty"),
    ],
)
def test_prompts(
    prompt: str, options: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--image", str(files / "good.png"), "--prompt", prompt, *options]
    assert message in refused(argv, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["zork"], "No such command 'zork'"),
        (["--zork"], "--zork"),
        (["run"], "--image"),
        (["run", "--image", "x.png"], "--prompt"),
        (["info"], "Give a policy"),
        (["info", "todr"], "Did you mean 'todre'?"),
        (["info", "hiprune", "--model", "tiny-llava", "--keep", "500"], "at most 196"),
        (["list", "zork*"], "No policy matches 'zork*'"),
        (["check", "rando"], "Did you mean 'random'?"),
        (["check", "random", "--keep", "1.0"], "keeps every token"),
        (["eval", "--policy", "hiprun"], "Did you mean 'hiprune'?"),
        (["eval", "--policy", ","], "No policy was given"),
        (["eval", "--policy", "hiprune,todre", "--param", "alpha=0.1"], "single policy"),
        (["eval", "--tasks", "scene"], "Did you mean 'scenes'?"),
        (["eval", "--tasks", ""], "No task was given"),
        (["eval", "--limit", "0"], "limit=0"),
        (["eval", "--runner", "nativ"], "Did you mean 'native'?"),
        (["eval", "--keep", "300"], "at most 196"),
        (["tasks-dir", "scene"], "Did you mean 'scenes'?"),
        (["demo", "--port", "99999"], "--port"),
    ],
)
def test_other_commands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(argv, capsys)


def test_as_a_process_there_is_no_traceback(files: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "vlmprune.cli", *run_arguments(files, "--policy", "hiprun")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Unknown policy" in done.stderr
