"""The registry: names, wildcards, suggestions, duplicates, and real entry points on disk."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import Registry, suggest
from vlmprune.core.registry import registry as shared


def policy_class(class_name: str, **extra: object) -> type[Policy]:
    cls = type(class_name, (Policy,), {"meta": PolicyMeta(class_name), "__module__": __name__, **extra})
    return dataclass(frozen=True)(cls)


@dataclass(frozen=True)
class Tunable(Policy):
    meta = PolicyMeta("Tunable")
    tau: float = 0.1
    layers: tuple[int, ...] = ()


@pytest.fixture
def registry() -> Registry:
    """Three policies and a wrapper; nothing built in."""
    filled = Registry(package=None)
    for name in ("hiprune", "divprune", "tome"):
        filled.register(name)(policy_class(name.title()))
    filled.register("compose")(policy_class("Compose", is_wrapper=True))
    filled.register("tunable")(Tunable)
    return filled


def test_names(registry: Registry) -> None:
    assert registry.get("hiprune").name == "hiprune"
    assert registry.available() == ["divprune", "hiprune", "tome", "tunable"]
    assert registry.available(wrappers=True) == ["compose", "divprune", "hiprune", "tome", "tunable"]
    assert registry.by_class_name("Tome") is registry.get("tome")
    assert registry.by_class_name("tome") is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*prune*", ["divprune", "hiprune"]), ("t*", ["tome", "tunable"]), ("tom?", ["tome"]), ("x*", [])],
)
def test_wildcards(registry: Registry, pattern: str, expected: list[str]) -> None:
    assert registry.available(pattern) == expected


def test_create(registry: Registry) -> None:
    policy = registry.create("tunable", keep=0.5, tau=0.2)
    assert policy == Tunable(keep=0.5, tau=0.2)
    with pytest.raises(InputError, match="no parameter 'tao'.*Did you mean 'tau'"):
        registry.create("tunable", tao=0.2)


@pytest.mark.parametrize("parameter", ["meta", "name", "basis", "default_positions", "is_wrapper", "budget"])
def test_facts_about_a_class_are_no_parameters(registry: Registry, parameter: str) -> None:
    with pytest.raises(InputError, match=f"no parameter '{parameter}'"):
        registry.create("tunable", **{parameter: 1})


def test_all_parameters_are_listed_where_none_is_near(registry: Registry) -> None:
    with pytest.raises(InputError, match="Known: keep, layers, positions, tau"):
        registry.check_parameters("tunable", {"zzzzz": 1})


@pytest.mark.parametrize(("name", "near"), [("hiprun", "hiprune"), ("HiPrune", "hiprune"), ("div_prune", "divprune")])
def test_unknown_names_get_a_suggestion(registry: Registry, name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"Unknown policy '{name}'.* Did you mean .*'{near}'"):
        registry.get(name)


def test_unknown_names_far_from_all_list_all() -> None:
    assert suggest("zzzzz", ["tome", "dart"]) == " Known: dart, tome."


def test_a_name_has_one_class(registry: Registry) -> None:
    with pytest.raises(ValueError, match="'tome' is taken by .*Tome"):
        registry.register("tome")(policy_class("Other"))
    # Two classes of one name in two modules are two classes.
    twin = policy_class("Tome", __module__="elsewhere")
    with pytest.raises(ValueError, match="is taken by"):
        registry.register("tome")(twin)
    assert registry.get("tome") is not twin


def test_a_reloaded_module_replaces_its_class(registry: Registry) -> None:
    again = policy_class("Tome")
    registry.register("tome")(again)
    assert registry.get("tome") is again


PLUGIN = """
from dataclasses import dataclass
from vlmprune.core.policy import Policy, PolicyMeta

@dataclass(frozen=True)
class Mine(Policy):
    meta = PolicyMeta("Mine")
    strength: int = 3

@dataclass(frozen=True)
class Child(Mine):
    meta = PolicyMeta("Child")

not_a_policy = 5
"""


def install(folder: Path, module: str, source: str, entry_points: dict[str, str]) -> None:
    """Put a distribution with entry points on disk, as pip would."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vlmprune.policies]", *lines]) + "\n")


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_entry_points(site_packages: Path) -> None:
    points = {"mine": "vp_plugin:Mine", "child": "vp_plugin:Child", "five": "vp_plugin:not_a_policy"}
    install(site_packages, "vp_plugin", PLUGIN, points)
    found = Registry(package=None)
    assert found.available() == ["child", "mine"]
    assert found.create("mine", strength=5).strength == 5
    # A subclass of a registered policy gets its own name.
    assert [found.get(name).name for name in ("mine", "child")] == ["mine", "child"]


def test_a_broken_plugin_is_logged_and_left_out(site_packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site_packages, "vp_broken", "import no_such_module_anywhere", {"broken": "vp_broken:X"})
    install(site_packages, "vp_good", PLUGIN, {"mine": "vp_good:Mine"})
    with caplog.at_level(logging.WARNING, logger="vlmprune"):
        assert Registry(package=None).available() == ["mine"]
    assert "'broken'" in caplog.text and "no_such_module_anywhere" in caplog.text


def test_a_plugin_does_not_take_a_name_that_is_there(
    site_packages: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    install(site_packages, "vp_thief", PLUGIN, {"tome": "vp_thief:Mine"})
    with caplog.at_level(logging.WARNING, logger="vlmprune"):
        assert registry.get("tome").__name__ == "Tome"
    assert "'tome' is taken" in caplog.text


def test_modules_of_a_package_register_themselves(site_packages: Path) -> None:
    package = site_packages / "vp_package"
    package.mkdir()
    (package / "__init__.py").write_text("seen = []\n")
    (package / "one.py").write_text("from vp_package import seen\nseen.append('one')\n")
    (package / "_template.py").write_text("from vp_package import seen\nseen.append('template')\n")
    loaded = Registry(package="vp_package")
    loaded.complete()
    loaded.complete()
    assert sys.modules["vp_package"].seen == ["one"]


def test_a_failing_import_is_not_forgotten(site_packages: Path) -> None:
    package = site_packages / "vp_fails"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("raise RuntimeError('bad module')\n")
    loaded = Registry(package="vp_fails")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bad module"):
            loaded.available()


def test_every_built_in_policy_is_a_documented_dataclass() -> None:
    names = shared.available(wrappers=True)
    assert {"uniform", "compose"} <= set(names)
    for name in names:
        cls = shared.get(name)
        assert cls.name == name
        assert cls.__dataclass_params__.frozen and "__dataclass_fields__" in vars(cls), name
        assert cls.meta.title and cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), name
