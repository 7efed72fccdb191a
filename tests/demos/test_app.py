"""The demo's back end, over HTTP, without a browser."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmprune.cli import main
from vlmprune.core.errors import InputError
from vlmprune.core.registry import registry
from vlmprune.demos import app

QUESTION = "what shape is red?"


@pytest.fixture(scope="module")
def client(page: str) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(page, verbose=False)


def file(path: Path) -> Any:
    from gradio_client import handle_file

    return handle_file(str(path))


def test_compare(client: Any, picture: Path) -> None:
    overlay, dense, pruned, table = client.predict(file(picture), QUESTION, "uniform", 0.25, api_name="/compare")
    with Image.open(overlay) as drawn:
        assert drawn.size == (448, 448)  # two pixels for each of the model's view, whose tokens are 16 wide
    assert isinstance(dense, str) and isinstance(pruned, str)
    assert table["headers"] == list(app.COLUMNS)
    rows = {row[0]: row[1:] for row in table["data"]}
    assert rows["dense"][0] == 196 and rows["pruned"][0] == 49
    assert rows["dense"][4] - rows["pruned"][4] == pytest.approx((196 - 49) * 2 * 6 * 128 * 4 / 1000, abs=0.11)
    assert all(milliseconds > 0 for row in rows.values() for milliseconds in row[2:4])


def test_every_policy_is_offered(client: Any) -> None:
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/compare"]["parameters"]
    policy = next(p for p in parameters if p["parameter_name"] == "policy")
    assert policy["type"]["enum"] == registry.available()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "give an image"),
        ({"image": b"nothing"}, "The image cannot be read"),
        ({"question": ""}, "question is empty"),
        ({"question": "a" * 501}, "501 characters"),
        ({"question": "is <image> red?"}, "leave it out"),
        ({"policy": "zork"}, "zork"),
        ({"keep": 0}, "0.01"),
        ({"keep": 1.5}, "1.0"),
    ],
)
def test_bad_input_is_an_error_with_its_reason(
    client: Any, picture: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    from gradio_client.exceptions import AppError

    asked = {"image": file(picture), "question": QUESTION, "policy": "uniform", "keep": 0.25, **change}
    if isinstance(asked["image"], bytes):
        (tmp_path / "bad.png").write_bytes(asked["image"])
        asked["image"] = file(tmp_path / "bad.png")
    with pytest.raises(AppError) as caught:
        client.predict(*asked.values(), api_name="/compare")
    assert message in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("keep", [float("nan"), float("inf"), 0.0, -1, 1.01, True, "0.5", None])
def test_keep_is_checked_by_the_backend_too(keep: Any, picture: Path) -> None:
    with pytest.raises(InputError, match="out of range"):
        app.Backend(None, None).answer(str(picture), QUESTION, "uniform", keep)


def test_large_files_and_pictures_are_refused(tmp_path: Path) -> None:
    backend = app.Backend(None, None)
    (tmp_path / "large.png").write_bytes(b"0" * (app.MAX_BYTES + 1))
    with pytest.raises(InputError, match="larger than 10 MB"):
        backend.answer(str(tmp_path / "large.png"), QUESTION, "uniform", 0.5)
    Image.new("1", (6000, 5000)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match="6000 x 5000 pixels"):
        backend.answer(str(tmp_path / "wide.png"), QUESTION, "uniform", 0.5)


def test_requests_wait_for_each_other(
    tiny_llava: tuple[Any, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock the second `apply` would be refused, as the model is pruned already."""
    monkeypatch.setattr(app, "REPEATS", 1)
    backend, rows, errors = app.Backend(*tiny_llava), [], []

    def ask(keep: float) -> None:
        try:
            rows.append(backend.answer(str(picture), QUESTION, "uniform", keep)[3][1][1])
        except Exception as error:  # shown by the assertion
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(keep,)) for keep in (0.25, 0.5, 0.75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(rows) == [49, 98, 147]


def test_a_busy_port_is_bad_input(page: str, tiny_llava: tuple[Any, Any]) -> None:
    import gradio

    with gradio.Blocks() as other:
        pass
    with pytest.raises(InputError, match="Cannot listen on 127.0.0.1"):
        app.launch(other, port=int(page.rstrip("/").rpartition(":")[2]))


def test_warm_up_leaves_the_model_as_it_was(tiny_llava: tuple[Any, Any]) -> None:
    app.warm_up(*tiny_llava)
    app.warm_up(*tiny_llava)


def test_the_command_serves_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gradio = pytest.importorskip("gradio")
    seen: list[bytes] = []

    def visit(blocks: Any) -> None:
        with urllib.request.urlopen(blocks.local_url) as response:
            seen.append(response.read())
        blocks.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    assert main(["demo", "--port", "0"]) == 0
    assert "Serving tiny-llava on http://127.0.0.1:" in capsys.readouterr().out
    assert b"vlmprune: tiny-llava" in seen[0]


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "vlmprune: The demo needs gradio: pip install 'vlmprune[demo]'\n"


NO_NETWORK = """
import socket, sys
real, asked = socket.getaddrinfo, []
def spy(host, *arguments, **options):
    asked.append(host)
    if host not in ("127.0.0.1", "localhost", "::1", None):
        raise OSError(f"look-up of {host}")
    return real(host, *arguments, **options)
socket.getaddrinfo = spy
from types import SimpleNamespace
from vlmprune.demos.app import build_app, launch
app = build_app(SimpleNamespace(), SimpleNamespace(), "nothing")
url = launch(app, port=0)
import urllib.request
assert b"vlmprune: nothing" in urllib.request.urlopen(url).read()
import time; time.sleep(2)
app.close(verbose=False)
outside = {h for h in asked if h not in ("127.0.0.1", "localhost", "::1", None)}
assert not outside, outside
"""


@pytest.mark.slow
def test_nothing_is_looked_up_outside(repo_root: Path) -> None:
    pytest.importorskip("gradio")
    environment = {k: v for k, v in os.environ.items() if k not in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK], cwd=repo_root, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
