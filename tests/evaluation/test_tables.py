from __future__ import annotations

from result_rows import a_row, a_stamp

from vlmprune.evaluation.tables import keep_text, render_grid, render_table, share_of

DENSE = {
    "policy": "dense",
    "keep": 1.0,
    "accuracy": 0.9,
    "retention": 1.0,
    "diff_random": None,
    "diff_ci_low": None,
    "diff_ci_high": None,
    "mean_kept_tokens": 196.0,
    "mean_kept_layers": 196.0,
    "prefill_ms": 23.45,
    "kv_bytes": 1279000,
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_table_by_hand() -> None:
    headline = {"family": "headline", "n": 20, "accuracy": 0.8, "prefill_ms": None, "kv_bytes": None}
    rows = [a_row(**DENSE), a_row(), a_row(**headline), a_row(policy="random", seed=1, keep=43)]
    title, _, head, rule, *lines = render_table(rows).splitlines()
    assert title == "**toy, scenes** (40 questions on 8 images)"
    assert cells(head)[:4] == ["policy", "keep", "headline (95 % interval)", "all"]
    assert rule.count("---") == len(cells(head)) == 10
    dense, hiprune, random = map(cells, lines)
    assert dense == ["dense", "–", "–", "90.0", "–", "–", "196", "196", "23.4", "1279.0"]
    assert hiprune[:4] == ["hiprune", "22 %", "80.0 (60.0 to 86.0)", "75.0"]
    assert hiprune[4:] == ["90.0", "+10.0 (+2.0 to +18.0)", "43", "43", "12.3 (23.4)", "338.9"]
    assert random[:2] == ["random (seed 1)", "43 tokens"]


def test_chosen_families_and_no_title() -> None:
    rows = [a_row(), a_row(family="digit", accuracy=0.5)]
    head, _, line = render_table(rows, ["digit", "colour"], title_tasks=False).splitlines()
    assert cells(head)[2:4] == ["digit (95 % interval)", "colour"]
    assert cells(line)[2:4] == ["50.0 (60.0 to 86.0)", "–"]


def test_unmeasured_values_are_dashes() -> None:
    row = a_row(prefill_ms=None, kv_bytes=None, retention=None, mean_kept_tokens=None, diff_ci_low=None)
    line = cells(render_table([row], title_tasks=False).splitlines()[2])
    assert [line[i] for i in (3, 4, 5, 7, 8)] == ["–", "+10.0", "–", "–", "–"]
    assert "0.0" not in line


def test_runs_and_tasks_stay_apart() -> None:
    rows = [a_row(), a_row(stamp=a_stamp(started="2001-01-01T00:00:00+00:00")), a_row(task="easy_vqa")]
    first, second = render_table(rows).split("**toy, easy_vqa**")
    assert first.count("| hiprune |") == 2 and second.count("| hiprune |") == 1


def test_a_grid_by_hand() -> None:
    rows = [a_row(**DENSE), a_row(**DENSE), a_row(), a_row(keep=0.11, mean_kept_layers=21.5)]
    rows += [a_row(policy="vflowopt", params={"artefact": "x.json"}, mean_kept_layers=44.0)]
    rows += [a_row(policy="random", seed=seed, accuracy=0.5 + seed / 10) for seed in range(3)]
    rows += [a_row(policy="random", seed=0, keep=80), a_row(family="digit", keep=0.5)]
    lines = [cells(line) for line in render_grid(rows).splitlines()]
    assert lines[0] == ["policy", "100 %", "22 %", "11 %"]
    assert lines[2:] == [
        ["dense", "90.0 (196)", "–", "–"],
        ["hiprune", "–", "75.0 (43)", "75.0 (21.5)"],
        ["random", "–", "60.0, 50.0 to 70.0 (43)", "–"],
        ["vflowopt (calibrated)", "–", "75.0 (44)", "–"],
    ]


def test_budgets() -> None:
    shown = [keep_text(keep) for keep in (0.22, 0.055, 1, "flops:0.4", [0.5, 12], None)]
    assert shown == ["22 %", "5.5 %", "1 tokens", "flops:0.4", "50 %, 12 tokens", "–"]


def test_a_composition_stands_in_the_column_of_its_product() -> None:
    rows = [
        a_row(**DENSE),
        a_row(policy="hiprune", keep=0.22, accuracy=0.7),
        a_row(policy="tome+hiprune", keep=[0.5, 0.44], params={"tome": {}, "hiprune": {}}, accuracy=0.5),
        a_row(policy="tome+todre", keep=[0.5, 0.44], params={"tome": {"first_blocks": 1}, "todre": {}}),
        a_row(policy="a+b", keep=[0.5, 49], params={"a": {}, "b": {"alpha": 1}}),
    ]
    head, _, *lines = render_grid(rows).splitlines()
    assert cells(head) == ["policy", "100 %", "22 %"]
    names = ["dense", "hiprune", "tome+hiprune", "tome+todre (first_blocks=1)"]
    assert [cells(line)[0] for line in lines] == names
    assert cells(lines[2])[2].startswith("50.0")
    assert share_of([0.5, 0.44]) == 0.22 and share_of([0.5, 49]) is None and share_of("flops:0.5") is None
