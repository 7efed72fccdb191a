"""Hooks that ``torch.compile`` leaves alone: it compiles the model around them, not what they do.

Importing this module loads the compiler, so it is imported only where that is loaded already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Uncompiled:
    """A hook that runs as it stands inside a compiled model; its copy holds a copy of the hook."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook(*args, **kwargs)
