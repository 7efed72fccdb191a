"""Which implementation of a primitive runs: ``reference``, ``torch`` or ``triton``.

By default Triton runs on CUDA tensors where it can be imported, PyTorch everywhere else. A call forces
one with ``backend=...``; a block of code with :func:`use_backend`. ``reference`` is the slow float64
version that tests compare with.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Backend = Literal["reference", "torch", "triton"]

_log = logging.getLogger("vlmprune")
_forced: ContextVar[Backend | None] = ContextVar("vlmprune_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


@contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for this thread and async task only.

    Primitives without such an implementation choose as if nothing were forced; an argument
    ``backend=...`` of a call goes first. The previous choice comes back at the end of the block.

    Args:
        name: ``"reference"``, ``"torch"``, ``"triton"``, or None for the automatic choice.

    Raises:
        BackendError: Triton is asked for and cannot be imported.
        ValueError: unknown name.
    """
    if name is not None:
        _check_name(name)
        if name == "triton":
            _require_triton()
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_backend(
    primitive: str, backend: Backend | None, device: torch.device, offered: tuple[Backend, ...]
) -> Backend:
    """The backend for one call.

    Args:
        primitive: name of the primitive, for messages.
        backend: the ``backend`` argument of the call, None if not given.
        device: device of the input tensors.
        offered: implementations that the primitive has.

    Raises:
        BackendError: the call names a backend that the primitive lacks, or Triton cannot run on ``device``.
        ValueError: unknown name.
    """
    if backend is not None:
        _check_name(backend)
        if backend not in offered:
            raise BackendError(f"{primitive} has no {backend!r} implementation; it has {', '.join(offered)}.")
    name = _forced.get() if backend is None else backend
    if name is not None and name not in offered:
        _log.debug("%s has no %s implementation; choosing by device", primitive, name)
        name = None
    if name is None:
        name = "triton" if device.type == "cuda" and "triton" in offered and triton_installed() else "torch"
    elif name == "triton":
        _require_triton()
        if device.type != "cuda" and not _triton_interprets():
            raise BackendError(
                f"{primitive}: Triton cannot run on {device.type!r} tensors. Move them to a GPU, use"
                " backend='torch', or start Python with TRITON_INTERPRET=1 (slow, for tests)."
            )
    return name


def triton_installed() -> bool:
    """True if Triton can be imported (it comes with PyTorch on Linux)."""
    return importlib.util.find_spec("triton") is not None


def _check_name(name: str) -> None:
    if name not in get_args(Backend):
        raise ValueError(f"Unknown backend {name!r}; choose one of {', '.join(get_args(Backend))}.")


def _require_triton() -> None:
    if not triton_installed():
        raise BackendError("Triton cannot be imported. Install the package `triton` or use backend='torch'.")


def _triton_interprets() -> bool:
    """True in Triton's interpreter mode, in which kernels run on the CPU."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.jit(_probe), InterpretedFunction)


def _probe() -> None:
    """Decorated by :func:`_triton_interprets`, never run."""
