"""`vlmprune calibrate`: a small search and small measurements on the embedded model, their files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlmprune
import vlmprune.calibration
from vlmprune.cli import main
from vlmprune.embedded import model_path
from vlmprune.embedded.pictures import digit_pictures, scene_pictures

SMALL = ("--samples", "2", "--calls", "3", "--param", "alpha=0.0")


def printed(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(argv) == code
    output = capsys.readouterr()
    return output.out, output.err


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((120, 90), 20 + 30 * i).convert("RGB").save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    command = ["calibrate", "vflowopt", "--keep", "0.3", "--images", str(pictures), "--output", str(path), *SMALL]
    out, err = printed(command, capsys)
    assert err == "" and "r1" in out and f"artefact='{path}'" in out and "of 2 after 3 calls" in out
    found = json.loads(path.read_text())
    assert (found["policy"], found["settings"]["keep"], len(found["history"])) == ("vflowopt", 0.3, 3)
    # Once more, the file is only read; with another seed it is refused.
    shown = json.loads(printed([*command, "--json"], capsys)[0])
    assert shown["best"] == found["best"] and "history" not in shown
    _, err = printed([*command, "--seed", "1"], capsys, code=2)
    assert err.startswith("vlmprune: ") and "calibration of another seed" in err
    printed([*command, "--seed", "1", "--fresh"], capsys)
    assert json.loads(path.read_text())["seed"] == 1
    # The file works on the command line.
    run = [
        "run",
        "--image",
        str(pictures / "0.png"),
        "--prompt",
        "what is it?",
        "--policy",
        "vflowopt",
        "--keep",
        "0.3",
    ]
    assert "visual tokens" in printed([*run, "--param", f"artefact={path}", "--repeats", "1"], capsys)[0]


def test_questions_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    printed(["calibrate", "vflowopt", "--task", "scenes", "--output", str(path), *SMALL], capsys)
    model, _ = vlmprune.load_embedded("tiny-llava")
    with vlmprune.applied(model, "vflowopt", keep=0.25, artefact=path) as handle:
        assert handle.policy.artefact == str(path)


def test_a_run_that_fails_keeps_what_was_found(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = tmp_path / "found.json", []
    original = vlmprune.calibration.agreement

    def fail_later(dense: list[torch.Tensor], pruned: list[torch.Tensor]) -> float:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("out of memory")
        return original(dense, pruned)

    monkeypatch.setattr(vlmprune.calibration, "agreement", fail_later)
    command = ["calibrate", "vflowopt", "--images", str(pictures), "--output", str(path), *SMALL]
    _, err = printed(command, capsys, code=1)
    assert "out of memory" in err and str(path) in err
    assert len(json.loads(path.read_text())["history"]) == 1
    printed(command, capsys)
    assert len(json.loads(path.read_text())["history"]) == 3


def test_thresholds_of_a_folder(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pictures: one is kept for the check, the others make a batch."""
    path = tmp_path / "found.json"
    command = ["calibrate", "dymu", "--keep", "0.33", "--images", str(pictures), "--output", str(path), "--batch", "2"]
    out, err = printed(command, capsys)
    assert "1 batches, 2 pictures" in out and "On 1 other pictures" in out and f"artefact='{path}'" in out
    assert "Only 1 batches were measured of 10 or more" in err and "standard error" not in err
    found = json.loads(path.read_text())
    assert (found["policy"], found["settings"]["keep"], found["batches"]) == ("dymu", 0.33, 1)
    assert [value["layer"] for value in found["values"]] == [0, 1, 2, 3, 4] and found["held_out"]["wanted"] == 64
    # Once more, the file is only read; with another seed it is refused.
    shown = json.loads(printed([*command, "--json"], capsys)[0])
    assert shown == found
    _, err = printed([*command, "--seed", "3"], capsys, code=2)
    assert err.startswith("vlmprune: ") and "calibration of another data" in err
    run = ["run", "--image", str(pictures / "0.png"), "--prompt", "what is it?", "--policy", "dymu", "--keep", "0.33"]
    given = ["--param", f"artefact={path}", "--param", "unmerge=false", "--repeats", "1"]
    assert "visual tokens" in printed([*run, *given], capsys)[0]


def test_thresholds_of_the_training_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    command = ["calibrate", "dymu", "--keep", "0.5", "--output", str(path), "--batch", "4"]
    out, _ = printed([*command, "--samples", "14", "--tolerance", "0.5"], capsys)
    assert "3 batches, 12 pictures" in out and "On 12 other pictures" in out  # what is left over makes no batch
    found = json.loads(path.read_text())
    entered, wanted = found["held_out"]["entered"], found["held_out"]["wanted"]
    assert (entered, wanted) == (12 * 196, 12 * 98) and abs(found["held_out"]["left"] / wanted - 1) < 0.25


@pytest.mark.parametrize("pictures_of", [scene_pictures, digit_pictures])
def test_the_pictures_of_the_check_are_others(pictures_of: Callable[..., Iterator[Image.Image]]) -> None:
    training, held_out = (islice(pictures_of(split), 3) for split in ("train", "test"))
    first, again = [picture.tobytes() for picture in training], [p.tobytes() for p in islice(pictures_of(), 3)]
    assert first == again and len({*first, *(p.tobytes() for p in held_out)}) == 6


def test_thresholds_of_a_classifier(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    path = tmp_path / "digits.json"
    command = ["calibrate", "dymu", "--keep", "0.5", "--batch", "4", "--samples", "16", "--tolerance", "0.5"]
    out, _ = printed([*command, "--model", "tiny-vit", "--output", str(path)], capsys)
    assert "On 16 other pictures" in out and len(json.loads(path.read_text())["values"]) == 12
    model, transform = vlmprune.load_embedded("tiny-vit")
    with vlmprune.applied(model, "dymu", keep=0.5, artefact=path) as handle, torch.no_grad():
        model(transform(list(islice(digit_pictures("test"), 2))))
    assert handle.last.tower_passed[-1] < 196


def test_a_timm_model_by_name(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded classifier under its name and as a checkpoint of timm, with timm's own transform."""
    pytest.importorskip("timm")
    found = []
    for number, model in enumerate(("tiny-vit", f"timm:local-dir:{model_path('tiny-vit')}")):
        output = tmp_path / f"{number}.json"
        command = ["calibrate", "dymu", "--keep", "0.5", "--batch", "2", "--images", str(pictures), "--model", model]
        printed([*command, "--output", str(output)], capsys)
        found.append([value["mean"] for value in json.loads(output.read_text())["values"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4) and len(set(found[0])) > 6
    missing = ["calibrate", "dymu", "--images", str(pictures), "--output", str(tmp_path / "none.json")]
    _, err = printed([*missing, "--model", "timm:vit_base_patch16_22"], capsys, code=2)
    assert "timm cannot load 'vit_base_patch16_22'" in err and "Did you mean 'timm:vit_base_patch16_224'?" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vflowop"], "Did you mean 'vflowopt'?"),
        (["hiprune"], "'hiprune' has nothing to calibrate"),
        (["vflowopt", "--keep", "1.0"], "a share, not for keep=1.0"),
        (["vflowopt", "--keep", "30"], "a share, not for keep=30"),
        (["vflowopt", "--images", "missing"], "Image folder 'missing' does not exist"),
        (["vflowopt", "--task", "scene"], "Did you mean 'scenes'?"),
        (["vflowopt", "--output", "missing/found.json"], "Folder 'missing' for the artefact"),
        (["vflowopt", "--calls", "0"], "calls"),
        (["vflowopt", "--param", "r3=0.5"], "r3 follows from keep"),
        (["dymu", "--keep", "1.0"], "keep=1.0 keeps them"),
        (["dymu", "--keep", "0.01"], "keep=0.01 is out of reach"),
        (["dymu", "--images", "missing"], "Image folder 'missing' does not exist"),
        (["dymu", "--model", "missing/model"], "Give pictures for 'missing/model'"),
        (["dymu", "--param", "thresholds=0.5"], "'dymu' measures nothing"),
        (["dymu", "--tolerance", "0"], "tolerance=0.0"),
        (["dymu", "--batch", "1"], "batch"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = [] if "--output" in options else ["--output", str(tmp_path / "found.json")]
    out, err = printed(["calibrate", *options, *output, "--samples", "1"], capsys, code=2)
    assert out == "" and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "vflowopt", "--images", str(tmp_path), "--output", str(tmp_path / "found.json")]
    assert "holds no picture" in printed(command, capsys, code=2)[1]
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    command = ["calibrate", "dymu", "--images", str(tmp_path), "--output", str(tmp_path / "found.json")]
    assert "holds one picture" in printed(command, capsys, code=2)[1]
