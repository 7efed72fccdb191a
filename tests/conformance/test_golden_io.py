"""The reader of golden vectors is strict, and no kind of case goes untested."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import golden_io
import numpy as np
import pytest
from golden_io import GOLDEN_DIR, KINDS, PENDING_KINDS, Case, GoldenError, cases, select

FILES = sorted(KINDS)


def write(folder: Path, file: str, **arrays: np.ndarray) -> Path:
    path = folder / f"{file}.npz"
    np.savez(path, **{key.replace("__", "/"): value for key, value in arrays.items()})
    return path


@pytest.mark.parametrize("file", FILES)
def test_every_key_of_a_file_reaches_a_case(file: str) -> None:
    path = GOLDEN_DIR / f"{file}.npz"
    found = cases(path)
    with np.load(path, allow_pickle=False) as data:
        stored = {key: data[key] for key in data.files}
    seen = {}
    for case in found:
        for section, field in golden_io.SECTIONS.items():
            seen |= {f"{case.id}/{section}/{name}": value for name, value in getattr(case, field).items()}
    assert seen.keys() == stored.keys()
    assert all(np.array_equal(seen[key], stored[key], equal_nan=False) for key in stored)
    assert {case.kind for case in found} == set(KINDS[file].all)


def test_the_folder_holds_the_known_files_only() -> None:
    assert sorted(path.stem for path in GOLDEN_DIR.iterdir()) == FILES


def test_kinds() -> None:
    kinds = {case.id: case.kind for case in cases(GOLDEN_DIR / "baselines.npz")}
    assert kinds["case0"] == "reference" and kinds["case6"] == "downsample" and kinds["case7"] == "vtc"
    assert {case.kind for case in cases(GOLDEN_DIR / "kernels.npz") if case.id.startswith("dpp")} == {"dpp"}


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("hiprune", {"case0__param__site_other": 1}, "unknown kind 'other'"),
        ("hiprune", {"case0__param__site_qwen": 1, "case0__param__site_llava": 1}, "more than one kind"),
        ("hiprune", {"case0__in__x": 1}, "unknown kind 'case'"),
        ("kernels", {"merge0__in__x": 1}, "unknown kind 'merge'"),
        ("baselines", {"other0__in__x": 1}, "unknown kind 'other'"),
        ("todre", {"select0__extra__x": 1}, "is not <case>"),
        ("todre", {"select0": 1}, "is not <case>"),
        ("todre", {}, "holds no case"),
        ("tome_unheard", {"case0__in__x": 1}, "no kinds known"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, file: str, keys: dict[str, int], message: str) -> None:
    path = write(tmp_path, file, **{key: np.array(value) for key, value in keys.items()})
    with pytest.raises(GoldenError, match=message):
        cases(path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "todre", select0__in__x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        cases(path)


def test_values_of_a_case() -> None:
    case = Case(
        "todre",
        "e2e0",
        "e2e",
        inputs={"weights/a.b": np.ones(2), "weights_c": np.zeros(1)},
        params={"tau": np.array(0.1, np.float32), "k": np.array(7), "list": np.array([1, 2])},
    )
    assert case.ratio("tau") == 0.1 and float(case.params["tau"]) != 0.1
    assert case.integer("k") == 7
    assert list(case.group("weights")) == ["a.b"]
    for name in ("tau", "list"):
        with pytest.raises(GoldenError):
            case.integer(name)


def test_another_folder_may_lack_files_and_kinds(tmp_path: Path) -> None:
    write(tmp_path, "kernels", kcenter0__in__x=np.zeros(1))
    assert [str(item) for item in select(tmp_path, "kernels", ("kcenter",))] == ["kernels-kcenter0-kcenter"]
    (reason,) = select(tmp_path, "kernels", ("colmass",))
    assert isinstance(reason, str) and "colmass" in reason
    (reason,) = select(tmp_path, "todre", ("select",))
    assert isinstance(reason, str) and "todre.npz" in reason


@pytest.mark.parametrize(("file", "kinds"), [("hiprune", ()), ("hiprune", ("lava",)), ("nothing", ("llava",))])
def test_a_misspelt_marker_is_an_error(file: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(GoldenError):
        list(select(GOLDEN_DIR, file, kinds))


def test_the_own_folder_must_be_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_io, "GOLDEN_DIR", tmp_path)
    with pytest.raises(GoldenError, match="missing"):
        list(select(tmp_path, "todre", ("select",)))
    write(tmp_path, "todre", select0__in__x=np.zeros(1))
    with pytest.raises(GoldenError, match="no case of kind 'ratio'"):
        list(select(tmp_path, "todre", ("ratio",)))


def test_a_folder_without_any_known_file_is_refused(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "tests/conformance", "--golden", str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "holds none of" in done.stderr


def claims(folder: Path) -> set[tuple[str, str]]:
    """(file, kind) of every golden marker on a test function that takes `case`."""
    found = set()
    for path in folder.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or "case" not in {arg.arg for arg in node.args.args}:
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.golden":
                    file, *kinds = (ast.literal_eval(arg) for arg in call.args)
                    found |= {(file, kind) for kind in kinds}
    return found


def test_every_kind_is_tested_or_pending(repo_root: Path) -> None:
    every = {(file, kind) for file, rule in KINDS.items() for kind in rule.all}
    claimed = claims(repo_root / "tests")
    assert every - claimed == PENDING_KINDS
    assert claimed <= every
