"""A stack of hooks on one model that can be taken back completely."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class HookStack:
    """Registers forward hooks and other reversible changes, and undoes them in reverse order.

    Every callable must be a bound method or a ``functools.partial`` of one, never a closure: a ``deepcopy`` of the
    model then carries hooks that belong to the copy.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> None:
        """Call ``hook(module, args, kwargs)`` before the module; it may return new ``(args, kwargs)``."""
        self._handles.append(module.register_forward_pre_hook(uncompiled(hook), with_kwargs=True, prepend=prepend))

    def after(self, module: nn.Module, hook: Callable[..., Any], always: bool = False, prepend: bool = False) -> None:
        """Call ``hook(module, args, kwargs, output)`` after the module; ``always`` also after an exception."""
        handle = module.register_forward_hook(uncompiled(hook), with_kwargs=True, always_call=always, prepend=prepend)
        self._handles.append(handle)

    def wrap_method(self, module: nn.Module, name: str, stand_in: partial[Any]) -> None:
        """Call ``stand_in`` in place of a method of this instance; its signature stays that of the method."""
        stand_in.__wrapped__ = getattr(module, name)  # type: ignore[attr-defined]
        before = module.__dict__.get(name)
        module.__dict__[name] = stand_in
        self.on_remove(partial(_restore_attribute, module, name, before))

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Run ``undo`` at removal."""
        self._undo.append(undo)

    @property
    def ids(self) -> frozenset[int]:
        """Ids of the registered hooks, as the modules' hook tables use them."""
        return frozenset(handle.id for handle in self._handles)

    def remove(self) -> None:
        """Undo everything; calling it again does nothing."""
        while self._undo:
            self._undo.pop()()
        while self._handles:
            self._handles.pop().remove()


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, kept out of compiled graphs where the compiler is loaded."""
    if "torch._dynamo" not in sys.modules:
        return hook
    from vlmprune.adapters.uncompiled import Uncompiled

    return Uncompiled(hook)


def _restore_attribute(module: nn.Module, name: str, before: Any) -> None:
    """Give an instance back the attribute that it had, or had not."""
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
