from __future__ import annotations

import json
from pathlib import Path

import pytest
from result_rows import a_row

from vlmprune.core.errors import InputError
from vlmprune.embedded import model_path
from vlmprune.evaluation.model_card import main, render_card, write_card
from vlmprune.evaluation.schema import ResultsFile, write_results

CURVE = "stage,step,images,seconds,metric,value\n" + "".join(
    f"tower,{step},{32 * step},{step / 10},{metric},{step / 1000:.4f}\n"
    for step in range(0, 1000, 10)
    for metric in ("loss", "shape")
)


def results() -> ResultsFile:
    families = {"all": (0.85, 0.31), "headline": (0.9, 0.3), "shape": (0.97, 0.2), "relation": (0.52, 0.5)}
    rows = []
    for family, (dense, blind) in families.items():
        bounds = {"family": family, "n": 400, "ci_high": dense + 0.03, "ci_low": dense - 0.03}
        rows.append(a_row(policy="dense", keep=1.0, accuracy=dense, **bounds))
        bounds |= {"ci_high": blind + 0.05, "ci_low": blind - 0.05}
        rows.append(a_row(policy="text_only", keep=None, accuracy=blind, **bounds))
    rows.append(a_row())
    return ResultsFile(rows=tuple(rows), headline={"scenes": ("shape",)})


def test_the_card_states_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(
        json.dumps(
            {"seed": 3, "stages": [{"name": "tower", "minutes": 40}], "training_aids": {"patch_labels": "kind, colour"}}
        )
    )
    (tmp_path / "curve.csv").write_text(CURVE)
    path = write_card(tmp_path, results())
    text = path.read_text()
    assert path.name == "MODEL_CARD.md"
    assert "| shape | 400 | 97.0 (94.0 to 100.0) | 20.0 |" in text
    assert "| all | 400 | 85.0 (82.0 to 88.0) | 31.0 |" in text
    assert "Left out of the headline: relation." in text
    assert "Not clearly above the text-only score (the intervals touch): relation (scenes)." in text
    assert "| hiprune | 22 % |" in text and "made up" in text
    assert "- patch labels: kind, colour" in text and "attention supervision" not in text
    assert "- seed: 3" in text and "  - name: tower" in text.replace("    ", "  ")
    curve = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 990 |"))]
    assert curve == ["| 0 | 0 | 0.0 | 0.0000 | 0.0000 |", "| 990 | 31680 | 1.6 | 0.9900 | 0.9900 |"]


def test_without_a_training_record_the_aids_are_named_all_the_same(tmp_path: Path) -> None:
    text = render_card(tmp_path, results())
    assert "attention supervision" in text and "dense labels" in text
    assert "No training record" in text


def test_what_the_card_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dense rows"):
        render_card(tmp_path, ResultsFile(rows=(a_row(),)))
    for text, message in (("{", "damaged"), ("[]", "no JSON object")):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(InputError, match=message):
            render_card(tmp_path, results())


def test_the_command_rebuilds_the_card_from_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmprune.evaluation.model_card.model_path", lambda name: tmp_path)
    write_results(tmp_path, results())
    main(["--keep-results"])
    assert (tmp_path / "MODEL_CARD.md").read_text() == render_card(tmp_path, results())


def test_accuracy_by_resolution_comes_from_the_counts_of_the_check(tmp_path: Path) -> None:
    check = {
        "seed": 2,
        "scenes": {
            "160 x 160": {
                "relation": {"n": 40, "right": 22, "right_text_only": 20},
                "all": {"n": 80, "right": 60, "right_text_only": 24},
            }
        },
        "easy_vqa_test": {"all": {"n": 50, "right": 50, "right_text_only": 30}},
    }
    (tmp_path / "check.json").write_text(json.dumps(check))
    text = render_card(tmp_path, None)
    assert "**scenes, 160 x 160 pixels**" in text and "Question seed 2." in text
    assert "| all | 80 | 75.0 (64.5 to 83.2) | 30.0 |" in text  # Wilson, by hand
    assert text.index("| all | 80 |") < text.index("| relation | 40 |")
    assert "intervals touch): relation (160 x 160)." in text and "## Policies" not in text
    assert "## Policies" in render_card(tmp_path, results())
    (tmp_path / "check.json").write_text(json.dumps({"scenes": {"dense": {"all": 0.9}}}))
    assert "by resolution" not in render_card(tmp_path, results())
    with pytest.raises(InputError, match="neither results nor"):
        render_card(tmp_path, None)


def test_a_classifier_has_its_accuracy_from_the_counts_of_its_check(tmp_path: Path) -> None:
    counts = {"all": {"n": 80, "right": 60}, "harder pictures": {"n": 50, "right": 50}}
    check = {"seed": 2, "chance": 0.1, "digits": counts, "patches": {"98 random patches": {"n": 40, "right": 20}}}
    (tmp_path / "check.json").write_text(json.dumps(check))
    sizes = {"depth": 9, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.0}
    config = {"architecture": "vit_x", "num_classes": 10, "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 224, 224]}}))
    text = render_card(tmp_path, None)
    assert "| all | 80 | 75.0 (64.5 to 83.2) |" in text and "Chance: 10.0." in text  # Wilson, by hand
    assert "| 98 random patches | 40 | 50.0 (35.2 to 64.8) |" in text
    assert "9 blocks of width 96, 3 heads of 32, MLPs of 192" in text and "196 tokens and a class token" in text
    del check["patches"]
    (tmp_path / "check.json").write_text(json.dumps(check))
    with pytest.raises(InputError, match="damaged"):
        render_card(tmp_path, None)


def test_the_card_of_the_shipped_classifier_is_up_to_date() -> None:
    folder = model_path("tiny-vit")
    assert (folder / "MODEL_CARD.md").read_text() == render_card(folder, None)


def test_the_measurement(tmp_path: Path) -> None:
    """A small run has everything that the card needs: policies, the text-only score, the whole test split."""
    from vlmprune.evaluation.model_card import measure_card

    small = {"scene_questions": 8, "easy_questions": 4, "random_seeds": 1, "full_easy_vqa": False}
    quick = {"policies": ("uniform",), "budgets": (0.1,), "measure_time": False, "progress": False}
    measured = measure_card(**small, **quick)
    found = {(row.task, row.policy) for row in measured.rows}
    wanted = {"dense", "text_only", "uniform", "random"}
    assert found == {(task, policy) for task in ("scenes", "easy_vqa") for policy in wanted}
    assert measured.select(task="scenes", policy="uniform", family="all")[0].mean_kept_tokens == 19
    assert "text only" in render_card(tmp_path, measured)
