"""Policies as data: dict, YAML and JSON in both directions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmprune.core import config
from vlmprune.core.budget import Budget
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import Registry
from vlmprune.policies.compose import Compose

# The registry is the same for all examples of a property.
PROPERTY = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Full(Policy):
    """One parameter of every kind."""

    meta = PolicyMeta("Full")
    tau: float | None = 0.1
    off: float | None = None
    layers: tuple[int | float, ...] = (2, 0.5)
    mode: Literal["mean", "sum"] = "mean"
    steps: int = 3
    flag: bool = False
    label: str = ""
    pairs: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy around another one."""

    meta = PolicyMeta("Wrapper")
    is_wrapper = True
    policy: Policy
    split: str = "equal"


@dataclass(frozen=True)
class Strict(Policy):
    """A policy with a rule of its own."""

    meta = PolicyMeta("Strict")
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise InputError(f"steps={self.steps} is too small; give at least 1.")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    filled = Registry(package=None)
    for cls in (Full, Wrapper, Strict, Compose):
        filled.register(cls.__name__.lower())(cls)
    monkeypatch.setattr(config, "registry", filled)
    return filled


SHARES = st.floats(0.001, 1.0).map(lambda share: round(share, 6))
KEEPS = st.one_of(
    SHARES,
    st.integers(1, 500),
    SHARES.map(lambda share: f"flops:{share}"),
    st.lists(st.one_of(SHARES, st.integers(1, 50)), min_size=1, max_size=3),
    st.just(Budget.parse([0.5, 3])),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
FULL = st.builds(
    Full,
    keep=KEEPS,
    positions=st.sampled_from(["auto", "keep", "compact"]),
    tau=st.none() | FLOATS,
    off=st.none() | FLOATS,
    layers=st.lists(st.one_of(st.integers(-3, 30), st.floats(0, 1)), max_size=3).map(tuple),
    mode=st.sampled_from(["mean", "sum"]),
    steps=st.integers(-5, 10**6),
    flag=st.booleans(),
    label=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8),
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2).map(tuple),
    weights=st.lists(FLOATS, max_size=2).map(tuple),
)
POLICIES = st.one_of(
    FULL,
    st.builds(Wrapper, FULL, keep=KEEPS, split=st.sampled_from(["equal", "other"])),
    st.lists(FULL, min_size=1, max_size=3).map(lambda members: Compose(tuple(members))),
)


def same(read: Policy, policy: Policy) -> bool:
    """Equal, where a budget counts as equal to its description."""
    if read == policy:
        return True
    leaves = [*zip(read.leaves(), policy.leaves(), strict=True)]
    return all(a.budget == b.budget for a, b in leaves) and config.to_dict(read) == config.to_dict(policy)


@PROPERTY
@given(policy=POLICIES)
def test_dict_round_trip(policy: Policy) -> None:
    read = config.from_dict(config.to_dict(policy))
    assert type(read) is type(policy)
    assert same(read, policy)
    hash(read)


@PROPERTY
@given(policy=POLICIES, suffix=st.sampled_from([".yaml", ".yml", ".json"]))
def test_file_round_trip(policy: Policy, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"policy{suffix}"
    config.dump(policy, path)
    read = config.load(path)
    assert same(read, policy)
    assert not path.with_name(path.name + ".tmp").exists()
    # The file is plain: any reader of the format gives the dict form.
    text = path.read_text(encoding="utf-8")
    assert (json.loads(text) if suffix == ".json" else yaml.safe_load(text)) == config.to_dict(policy)


def test_dict_form_holds_what_differs() -> None:
    assert config.to_dict(Full()) == {
        "policy": "full",
        "parameters": {"keep": 1.0, "weights": []},
        "version": config.CONFIG_VERSION,
    }
    changed = config.to_dict(Full(keep=[0.5, 8], layers=(4, 0.75), tau=None))
    assert isinstance(changed, dict)
    assert changed["parameters"] == {"keep": [0.5, 8], "layers": [4, 0.75], "tau": None, "weights": []}


def test_none_survives_yaml(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    config.dump(Full(tau=None), path)
    assert "tau: null" in path.read_text()
    assert config.load(path) == Full(tau=None) != Full()


def test_lists_become_tuples() -> None:
    read = config.from_dict({"policy": "full", "parameters": {"layers": [3, 0.5], "pairs": [[1, 2]], "keep": [0.5, 2]}})
    assert read == Full(layers=(3, 0.5), pairs=((1, 2),), keep=(0.5, 2))
    assert [type(layer) for layer in read.layers] == [int, float]  # type: ignore[attr-defined]
    assert read.keep == (0.5, 2)
    assert Full(keep=[0.5, 2]) == Full(keep=(0.5, 2))


def test_numpy_values_are_written_plain(tmp_path: Path) -> None:
    policy = Full(keep=np.float64(0.5), tau=np.float32(0.25), layers=(np.int64(3),))
    config.dump(policy, tmp_path / "policy.yaml")
    assert config.load(tmp_path / "policy.yaml") == Full(keep=0.5, tau=0.25, layers=(3,))


def test_compositions_and_wrappers_nest() -> None:
    data = config.to_dict(Compose((Full(keep=0.5), Wrapper(Full(steps=2), keep=8))))
    assert isinstance(data, list) and len(data) == 2
    assert data[1]["parameters"]["policy"]["parameters"]["steps"] == 2
    assert config.from_dict(data).leaves()[1] == Wrapper(Full(steps=2), keep=8)
    assert isinstance(config.to_dict(Compose((Full(),))), list)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"policy": "ful"}, "Unknown policy 'ful'.*'full'"),
        ({"policy": "full", "parameter": {}}, "parameter: Extra inputs"),
        ({"policy": "full", "parameters": {"tao": 1}}, "no parameter 'tao'.*'tau'"),
        ({"policy": "full", "parameters": {"name": "x"}}, "no parameter 'name'"),
        ({"policy": "full", "version": config.CONFIG_VERSION + 1}, "newer than 1; update"),
        ({"policy": "full", "version": "first"}, "version"),
        ({"policy": 5}, "policy: "),
        ({"parameters": {}}, "policy: Field required"),
        ({"policy": "full", "parameters": None}, "parameters: "),
        ({"policy": "full", "parameters": {"steps": "many"}}, "'full': steps: "),
        ({"policy": "full", "parameters": {"steps": 1.5}}, "'full': steps: "),
        ({"policy": "full", "parameters": {"layers": 3}}, "'full': layers: "),
        ({"policy": "full", "parameters": {"layers": ["x"]}}, "'full': layers"),
        ({"policy": "full", "parameters": {"mode": "median"}}, "'full': mode: .*'mean' or 'sum'"),
        ({"policy": "full", "parameters": {"flag": "perhaps"}}, "'full': flag"),
        ({"policy": "full", "parameters": {"positions": "shuffle"}}, "positions"),
        ({"policy": "wrapper", "parameters": {"policy": {"policy": "nope"}}}, "Unknown policy 'nope'"),
        ({"policy": "wrapper", "parameters": {}}, "policy"),
        ([{"policy": "full"}, {"policy": "nope"}], "Unknown policy 'nope'"),
        ([], "at least one"),
        (None, "Not a policy config"),
        ("full", "Not a policy config"),
        (3, "Not a policy config"),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config.from_dict(data)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 2.0, True, "many", None, []])
def test_a_bad_budget_is_a_budget_error(keep: Any) -> None:
    with pytest.raises(BudgetError) as direct:
        Budget.parse(keep)
    with pytest.raises(BudgetError) as built:
        config.build("full", {"keep": keep})
    assert str(built.value) == str(direct.value)


def test_a_rule_of_the_policy_speaks_for_itself() -> None:
    with pytest.raises(InputError, match=r"^steps=0 is too small; give at least 1\.$"):
        config.build("strict", {"steps": 0})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.yaml", None, "does not exist"),
        ("bad.yaml", "a: [", "cannot be read"),
        ("bad.json", "{'policy': 1}", "cannot be read"),
        ("empty.yaml", "", "Not a policy config"),
        ("object.yaml", "!!python/object:os.system {}", "cannot be read"),
        ("newer.json", '{"policy": "full", "version": 99}', "version 99 is newer"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        config.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="cannot be read"):
        config.load(tmp_path / "binary.yaml")


def test_resolve(tmp_path: Path) -> None:
    full = Full(keep=0.5)
    path = tmp_path / "policy.json"
    config.dump(full, path)
    assert config.resolve(full) is full
    assert config.resolve("full", keep=0.5) == full
    assert config.resolve("wrapper", policy=full, keep=8) == Wrapper(full, keep=8)
    assert config.resolve(path) == config.resolve(str(path)) == full
    assert config.resolve(config.to_dict(full)) == full
    both = config.resolve(["full", Strict()], keep=None)
    assert both == Compose((Full(), Strict()))
    assert config.resolve(["full", "strict"], keep=[0.5, 8]) == Compose((full, Strict(keep=8)))
    assert config.resolve(("full", Strict()), keep=(0.5, None)) == Compose((full, Strict()))


@pytest.mark.parametrize(
    ("policy", "parameters", "message"),
    [
        (Full(), {"keep": 0.5}, "keep cannot be given beside an instance"),
        ({"policy": "full"}, {"tau": 0.5}, "tau cannot be given beside a config"),
        ("some.yaml", {"keep": 0.5}, "keep cannot be given beside a config file"),
        ("some.yaml", {}, "does not exist"),
        (["full", "strict"], {"keep": 0.5}, "composition of 2 policies takes one keep per policy.*0.5"),
        (["full", "strict"], {"keep": [0.5]}, "one keep per policy"),
        (["full"], {"tau": 0.5}, "tau cannot be given beside a composition"),
        (["full", Strict()], {"keep": [0.5, 0.5]}, "keep cannot be given beside an instance"),
        ([], {}, "no policy"),
        (None, {}, "None is no policy"),
        (5, {}, "5 is no policy"),
        (Full, {}, "is no policy"),
        ("nothing", {}, "Unknown policy 'nothing'"),
    ],
)
def test_resolve_refuses(policy: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.resolve(policy, **parameters)
