"""Choice of the backend."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlmprune.kernels import backend
from vlmprune.kernels.backend import BackendError, choose_backend, use_backend
from vlmprune.kernels.kcenter import greedy_select

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only the name: nothing is allocated on it
ALL = ("reference", "torch", "triton")


@pytest.fixture
def triton_present(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    yield


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    assert choose_backend("op", None, CPU, ALL) == "torch"
    assert choose_backend("op", None, CUDA, ALL) == "triton"
    assert choose_backend("op", None, CUDA, ("reference", "torch")) == "torch"
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    assert choose_backend("op", None, CUDA, ALL) == "torch"


def test_forcing_nests_and_restores(triton_present: None) -> None:
    with use_backend("triton"):
        assert choose_backend("op", None, CUDA, ALL) == "triton"
        assert choose_backend("op", "torch", CUDA, ALL) == "torch"  # the argument goes first
        assert choose_backend("op", None, CUDA, ("reference", "torch")) == "torch"  # has no such version
        with use_backend("torch"):
            assert choose_backend("op", None, CUDA, ALL) == "torch"
            with use_backend(None):
                assert choose_backend("op", None, CUDA, ALL) == "triton"
        assert choose_backend("op", None, CUDA, ALL) == "triton"
    with pytest.raises(KeyError), use_backend("reference"):
        assert choose_backend("op", None, CPU, ALL) == "reference"
        raise KeyError
    assert choose_backend("op", None, CPU, ALL) == "torch"


def test_forcing_stays_in_its_thread() -> None:
    seen: dict[str, str] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            seen["other"] = choose_backend("op", None, CPU, ALL)
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen["here"] = choose_backend("op", None, CPU, ALL)
    done.set()
    thread.join()
    assert seen == {"other": "reference", "here": "torch"}


def test_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Unknown backend 'cuda'.*reference, torch, triton"):
        choose_backend("op", "cuda", CPU, ALL)
    with pytest.raises(ValueError, match="Unknown backend"), use_backend("numpy"):
        pass
    with pytest.raises(BackendError, match="column mass has no 'triton' implementation; it has .*torch"):
        choose_backend("column mass", "triton", CUDA, ("reference", "torch"))
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    with pytest.raises(BackendError, match="Triton cannot be imported"), use_backend("triton"):
        pass
    with pytest.raises(BackendError, match="Triton cannot be imported"):
        choose_backend("op", "triton", CUDA, ALL)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_on_cpu_is_an_error() -> None:
    x = torch.eye(3)[None]
    with pytest.raises(BackendError, match="k-center: Triton cannot run on 'cpu'"):
        greedy_select(x, 2, backend="triton")
    with use_backend("triton"), pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        greedy_select(x, 2)


def test_importing_kernels_does_not_import_triton_kernels(repo_root: Path) -> None:
    code = (
        "import sys, torch; loaded = {m for m in sys.modules if m.split('.')[0] == 'triton'};"
        "import vlmprune.kernels.kcenter, vlmprune.kernels.column_mass, vlmprune.kernels.gather;"
        "import vlmprune.kernels.kcenter.triton_backend;"
        "assert not any('triton_kernels' in m for m in sys.modules);"
        "assert {m for m in sys.modules if m.split('.')[0] == 'triton'} == loaded"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, timeout=120)
