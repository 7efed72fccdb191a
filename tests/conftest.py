"""Settings and fixtures for all tests. The environment is set before torch or transformers is imported."""

from __future__ import annotations

import os

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",  # the models are tiny, and make test runs two workers
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)

from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import golden_io  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help="replay the golden tests on the same-named .npz files of DIR instead of tests/golden",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = golden_folder(config)
    if not any((folder / f"{file}.npz").is_file() for file in golden_io.KINDS):
        raise pytest.UsageError(f"--golden: {folder} holds none of {sorted(golden_io.KINDS)} as .npz")


def pytest_report_header(config: pytest.Config) -> list[str]:
    folder = golden_folder(config)
    pending = ", ".join(f"{file}:{kind}" for file, kind in sorted(golden_io.PENDING_KINDS)) or "none"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    lines = [versions, f"golden vectors: {folder}; kinds without a test yet: {pending}"]
    others = sorted(path.stem for path in folder.glob("*.npz") if path.stem not in golden_io.KINDS)
    if others:
        lines.append(f"golden files without a test yet: {', '.join(others)}")
    return lines


def golden_folder(config: pytest.Config) -> Path:
    """The folder whose golden vectors this run uses."""
    given = config.getoption("--golden")
    return golden_io.GOLDEN_DIR if given is None else Path(given).resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    markers = list(metafunc.definition.iter_markers("golden"))
    if not markers:
        return
    if "case" not in metafunc.fixturenames:
        pytest.fail(f"{metafunc.definition.nodeid} is marked golden but takes no argument `case`")
    folder, params = golden_folder(metafunc.config), []
    for marker in markers:
        file, *kinds = marker.args
        for item in golden_io.select(folder, file, tuple(kinds)):
            if isinstance(item, str):
                params.append(pytest.param(None, id=f"{file}-missing", marks=pytest.mark.skip(reason=item)))
            else:
                params.append(pytest.param(item, id=str(item)))
    metafunc.parametrize("case", params)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root folder of the checkout."""
    return Path(__file__).resolve().parents[1]
