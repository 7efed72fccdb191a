"""Visual token reduction for vision-language models: `vlmprune.apply(model, "hiprune", keep=0.33)`.

Public names are resolved on first use, so `import vlmprune` loads neither torch nor transformers. Policy
classes are public names too: `vlmprune.HiPrune(keep=0.33)`.
"""

from __future__ import annotations

import importlib
from os.path import abspath, dirname, isdir, isfile, join
from typing import TYPE_CHECKING, Any

from vlmprune._version import __version__

if TYPE_CHECKING:
    from vlmprune.api import Handle, applied, apply, available, handle_of
    from vlmprune.calibration import calibrate
    from vlmprune.core.budget import Budget
    from vlmprune.core.policy import Policy
    from vlmprune.core.registry import register
    from vlmprune.embedded import load_embedded
    from vlmprune.group_picture import plot_groups
    from vlmprune.measurement import measure
    from vlmprune.plot import plot_selection
    from vlmprune.policies.compose import Compose
    from vlmprune.policies.per_image_budget import PerImageBudget

# Name -> module that defines it.
_PUBLIC = {
    "Budget": "vlmprune.core.budget",
    "Compose": "vlmprune.policies.compose",
    "Handle": "vlmprune.api",
    "PerImageBudget": "vlmprune.policies.per_image_budget",
    "Policy": "vlmprune.core.policy",
    "applied": "vlmprune.api",
    "apply": "vlmprune.api",
    "available": "vlmprune.api",
    "calibrate": "vlmprune.calibration",
    "handle_of": "vlmprune.api",
    "load_embedded": "vlmprune.embedded",
    "measure": "vlmprune.measurement",
    "plot_groups": "vlmprune.group_picture",
    "plot_selection": "vlmprune.plot",
    "register": "vlmprune.core.registry",
}

__all__ = [
    "Budget",
    "Compose",
    "Handle",
    "PerImageBudget",
    "Policy",
    "__version__",
    "applied",
    "apply",
    "available",
    "calibrate",
    "handle_of",
    "load_embedded",
    "measure",
    "plot_groups",
    "plot_selection",
    "register",
]

# In a checkout the folders kernels/, adapters/, evaluation/ and demos/ lie beside this package. They are
# sub-packages of it (a top-level `kernels` would shadow Hugging Face's package of that name).
_root = dirname(dirname(abspath(__file__)))
if isfile(join(_root, "pyproject.toml")) and isdir(join(_root, "kernels")):
    __path__.append(_root)


def __getattr__(name: str) -> Any:
    """Resolve a public name or a policy class and keep it as an attribute of the package."""
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name[:1].isupper():
        value = importlib.import_module("vlmprune.policies").find_class(name)
    else:
        value = None
    if value is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
