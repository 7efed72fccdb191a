"""One embedded model and one served page for all tests of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny_llava() -> tuple[Any, Any]:
    from vlmprune.embedded import load_embedded

    return load_embedded("tiny-llava")


@pytest.fixture(scope="session")
def page(tiny_llava: tuple[Any, Any]) -> Iterator[str]:
    """Address of the page."""
    pytest.importorskip("gradio")
    from vlmprune.demos.app import build_app, launch

    app = build_app(*tiny_llava, "tiny-llava")
    yield launch(app, port=0)
    app.close(verbose=False)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square, so that cropping matters."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.effect_noise((320, 240), 90).convert("RGB").save(path)
    return path
