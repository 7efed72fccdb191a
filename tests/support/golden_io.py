"""Golden vectors: reading `tests/golden/*.npz` and turning them into test cases.

This module lives in `tests/support`, which `pyproject.toml` puts on the path of every pytest run
(`pythonpath`), so a test module writes `from golden_io import Case`. Use it like this:

    @pytest.mark.golden("hiprune", "llava", "llava_next")
    def test_indices(case: Case) -> None:
        ...

The test runs once per case of the named kinds. `pytest --golden DIR` replays the same-named files of
another folder.

Key format of a file: `<case id>/<section>/<name>`, section one of `in`, `param`, `out`, `ref`, `state` (weights
of a model). A case's kind is read from its id (`kcenter0` -> `kcenter`) or from its key `param/site_<kind>`;
`KINDS` says which kinds a file may hold, and anything else is an error. `PENDING_KINDS` lists kinds without a test yet.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

GOLDEN_DIR = Path(__file__).resolve().parents[1] / "golden"
SECTIONS = {"in": "inputs", "param": "params", "out": "outputs", "ref": "refs", "state": "state"}
SITE_KEY = "site_"


@dataclass(frozen=True)
class KindRule:
    """Kinds that one golden file may hold.

    Args:
        prefixes: kinds given by the case id without its number.
        sites: kinds given by the key `param/site_<kind>`.
        default: kind of a case that carries no `param/site_*` key, None where every case needs one.
    """

    prefixes: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    default: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.prefixes, *self.sites, *(() if self.default is None else (self.default,)))


KINDS: Mapping[str, KindRule] = MappingProxyType(
    {
        "baselines": KindRule(sites=("downsample", "vtc"), default="reference"),
        "fastv": KindRule(default="reference"),
        "divprune": KindRule(default="set"),
        "hiprune": KindRule(sites=("llava", "llava_next", "qwen", "qwen_reduce")),
        "kernels": KindRule(prefixes=("kcenter", "dpp", "colmass")),
        "todre": KindRule(prefixes=("select", "ratio", "e2e")),
        "vflowopt": KindRule(prefixes=("imp", "rec", "align", "llm", "budget")),
        "transprune": KindRule(prefixes=("ttv",), default="reference"),
        "tome": KindRule(prefixes=("chain", "kth", "parse", "propattn", "vit"), default="reference"),
        "dymu": KindRule(prefixes=("calib", "single", "batch", "rs", "vtu")),
        "zero_tprune": KindRule(prefixes=("early",), default="reference"),
    }
)

# (file, kind): the feature under test does not exist yet. This list shrinks to nothing.
PENDING_KINDS: frozenset[tuple[str, str]] = frozenset(
    {
        ("kernels", "dpp"),
    }
)


class GoldenError(Exception):
    """A golden file does not have the form that the tests rely on."""


@dataclass(frozen=True)
class Case:
    """One golden case. All values are NumPy arrays (scalars have shape `()`)."""

    file: str
    id: str
    kind: str
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    params: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    refs: dict[str, np.ndarray] = field(default_factory=dict)
    state: dict[str, np.ndarray] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """A float parameter as it was written: stored as float32, rounded to 6 decimals."""
        return round(float(self.params[name]), 6)

    def integer(self, name: str) -> int:
        """An integer scalar parameter."""
        value = self.params[name]
        if not np.issubdtype(value.dtype, np.integer) or value.size != 1:
            raise GoldenError(f"{self.file} {self.id}: param/{name} is not one integer: {value!r}")
        return int(value.item())

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Inputs below `prefix/`, without the prefix, such as the model weights of `weights/`."""
        head = prefix + "/"
        return {key[len(head) :]: value for key, value in self.inputs.items() if key.startswith(head)}

    def __str__(self) -> str:
        return f"{self.file}-{self.id}-{self.kind}"


def kind_of(file: str, case_id: str, params: Mapping[str, object]) -> str:
    """Kind of a case by its id or its `site_*` parameter.

    Raises:
        GoldenError: the kind is unknown, missing or ambiguous.
    """
    rule = KINDS[file]
    sites = [name[len(SITE_KEY) :] for name in params if name.startswith(SITE_KEY)]
    if len(sites) > 1:
        raise GoldenError(f"{file} {case_id}: more than one kind: {sorted(sites)}")
    if sites:
        if sites[0] not in rule.sites:
            raise GoldenError(f"{file} {case_id}: unknown kind {sites[0]!r}, known: {rule.all}")
        return sites[0]
    prefix = re.sub(r"\d+$", "", case_id)
    if prefix in rule.prefixes:
        return prefix
    if prefix == "case" and rule.default is not None:
        return rule.default
    raise GoldenError(f"{file} {case_id}: unknown kind {prefix!r}, known: {rule.all}")


@functools.cache
def cases(path: Path) -> tuple[Case, ...]:
    """All cases of one golden file, in file order.

    Args:
        path: an `.npz` file whose stem is a key of `KINDS`.

    Raises:
        GoldenError: unknown file name, unknown section or kind, or no case in the file.
    """
    file = path.stem
    if file not in KINDS:
        raise GoldenError(f"{path}: no kinds known for {file!r}, known files: {sorted(KINDS)}")
    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(path, allow_pickle=False) as data:
        for key in data.files:
            case_id, section, name = _split(path, key)
            sections = parts.setdefault(case_id, {field_name: {} for field_name in SECTIONS.values()})
            sections[SECTIONS[section]][name] = data[key]
    if not parts:
        raise GoldenError(f"{path} holds no case")
    return tuple(
        Case(file, case_id, kind_of(file, case_id, sections["params"]), **sections)
        for case_id, sections in parts.items()
    )


def _split(path: Path, key: str) -> tuple[str, str, str]:
    case_id, _, rest = key.partition("/")
    section, _, name = rest.partition("/")
    if section not in SECTIONS or not name:
        raise GoldenError(f"{path}: key {key!r} is not <case>/<{'|'.join(SECTIONS)}>/<name>")
    return case_id, section, name


def select(folder: Path, file: str, kinds: tuple[str, ...]) -> Iterator[Case | str]:
    """Cases of the named kinds, or one sentence per file or kind that `folder` does not hold.

    The project's own folder must hold every kind; a replay folder may hold fewer.

    Raises:
        GoldenError: unknown file or kind, or the project's own folder lacks it.
    """
    if file not in KINDS:
        raise GoldenError(f"unknown golden file {file!r}, known: {sorted(KINDS)}")
    unknown = sorted(set(kinds) - set(KINDS[file].all))
    if unknown or not kinds:
        raise GoldenError(f"{file}: name one or more of {KINDS[file].all}, got {kinds}")
    path = folder / f"{file}.npz"
    own = folder == GOLDEN_DIR
    if not path.is_file():
        if own:
            raise GoldenError(f"{path} is missing")
        yield f"{file}.npz is not in {folder}"
        return
    found = cases(path)
    for kind in kinds:
        some = [case for case in found if case.kind == kind]
        if not some and own:
            raise GoldenError(f"{path} holds no case of kind {kind!r}")
        yield from some or [f"{path} holds no case of kind {kind!r}"]
