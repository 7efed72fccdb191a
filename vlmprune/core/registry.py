"""Names of policies: registration, look-up with suggestions, wildcards and third-party entry points."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy

P = TypeVar("P", bound=Policy)

BUILTIN_PACKAGE = "vlmprune.policies"
ENTRY_POINT_GROUP = "vlmprune.policies"

MUCH_LESS_ALIKE = 0.15
"""Names that resemble a misspelt one by so much less than the nearest are not suggested beside it."""

logger = logging.getLogger("vlmprune")


class Registry:
    """Maps names to policy classes.

    Args:
        package: name of a package whose modules register policies; they are imported at the first look-up.
            None for no package.
    """

    def __init__(self, package: str | None = BUILTIN_PACKAGE) -> None:
        self._package = package
        self._classes: dict[str, type[Policy]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[type[P]], type[P]]:
        """Class decorator that files a policy under ``name``.

        Raises:
            ValueError: another class has this name already.
        """

        def decorate(cls: type[P]) -> type[P]:
            known = self._classes.get(name)
            if known is not None and _path(known) != _path(cls):
                raise ValueError(f"Policy name {name!r} is taken by {_path(known)}.")
            cls.name = name
            self._classes[name] = cls
            return cls

        return decorate

    def complete(self) -> None:
        """Import the built-in policies and those of installed entry points, once.

        An entry point that cannot be loaded is logged and left out.
        """
        if self._complete:
            return
        self._complete = True
        try:
            self._import_package()
        except BaseException:
            self._complete = False  # the next look-up tries again and shows the same error
            raise
        for point in entry_points(group=ENTRY_POINT_GROUP):
            self._load(point)

    def _import_package(self) -> None:
        if self._package is None:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")

    def _load(self, point: EntryPoint) -> None:
        try:
            loaded = point.load()
            is_policy = isinstance(loaded, type) and issubclass(loaded, Policy)
            if is_policy and loaded not in self._classes.values():
                self.register(point.name)(loaded)
        except Exception as error:  # a broken plug-in must not take the other policies with it
            logger.warning("Entry point %r (%s) gives no policy: %s", point.name, point.value, error)

    def available(self, pattern: str = "*", wrappers: bool = False) -> list[str]:
        """Registered names that match ``pattern`` (shell wildcards), sorted; ``wrappers`` lists those too."""
        self.complete()
        names = [name for name, cls in self._classes.items() if wrappers or not cls.is_wrapper]
        return sorted(fnmatch.filter(names, pattern))

    def get(self, name: str) -> type[Policy]:
        """The class filed under ``name``.

        Raises:
            InputError: no such policy; the message names the nearest ones.
        """
        self.complete()
        try:
            return self._classes[name]
        except KeyError:
            raise InputError(f"Unknown policy {name!r}.{suggest(name, list(self._classes))}") from None

    def create(self, name: str, /, **parameters: Any) -> Policy:
        """An instance of policy ``name``.

        Raises:
            InputError: unknown name or parameter.
        """
        cls = self.get(name)
        self.check_parameters(name, parameters)
        return cls(**parameters)

    def check_parameters(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Refuse parameters that policy ``name`` does not have."""
        known = {field.name for field in fields(self.get(name)) if field.init}
        for parameter in parameters:
            if parameter not in known:
                hint = suggest(parameter, sorted(known))
                raise InputError(f"Policy {name!r} has no parameter {parameter!r}.{hint}")

    def by_class_name(self, class_name: str) -> type[Policy] | None:
        """The registered class with this Python name, if there is one."""
        self.complete()
        return next((cls for cls in self._classes.values() if cls.__name__ == class_name), None)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def suggest(name: str, known: list[str]) -> str:
    """`` Did you mean ...?`` with the nearest known names, or a list of all."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, name.lower(), found).ratio() for found in near]
    near = [found for found, ratio in zip(near, likeness, strict=True) if ratio > likeness[0] - MUCH_LESS_ALIKE]
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    return f" Known: {', '.join(sorted(known))}."


registry = Registry()
register = registry.register
