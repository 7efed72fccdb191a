"""The embedded model, loaded once."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """Model and processor of tiny-llava. Tests leave it without an applied policy."""
    from vlmprune.embedded import load_embedded

    return load_embedded("tiny-llava")
