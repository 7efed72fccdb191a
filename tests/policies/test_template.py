"""The file that a new policy starts from works as it stands."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import contexts
import pytest
import torch

from vlmprune.core.errors import InputError
from vlmprune.core.registry import registry
from vlmprune.core.signals import Projected

SOURCE = Path("vlmprune/policies/_template.py")


@pytest.fixture
def template(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The template as a module, with its name taken out of the registry afterwards."""
    registry.complete()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    spec = importlib.util.spec_from_file_location("copied_template", repo_root / SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied_template", module)
    spec.loader.exec_module(module)
    return module


def test_the_template_is_not_registered() -> None:
    assert "largest_norm" not in registry.available()


def test_a_copy_of_the_template_works(template: ModuleType) -> None:
    assert "largest_norm" in registry.available()
    policy = registry.create("largest_norm", keep=3)
    features = torch.tensor([[1.0], [-5.0], [2.0], [5.0], [0.0], [3.0]])
    context = contexts.post_encoder([contexts.image(2, 3)], 3, {Projected(): [features]})
    assert contexts.kept_tokens(policy.select(context)) == [[1, 3, 5]]
    with pytest.raises(InputError, match="power"):
        registry.create("largest_norm", power=0.0)
    result = doctest.testmod(template)
    assert result.attempted and not result.failed
