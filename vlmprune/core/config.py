"""Policies as data: dict, YAML and JSON, in both directions, with unknown keys refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlmprune.core.budget import Budget
from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry

CONFIG_VERSION = 1


class PolicyConfig(BaseModel):
    """The file form of a policy. A list of these is a composition."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    version: int = CONFIG_VERSION


def to_dict(policy: Policy) -> dict[str, Any] | list[dict[str, Any]]:
    """The settings that differ from a policy's defaults, as plain values; a composition becomes a list."""
    if policy.leaves() != (policy,):
        return [to_dict(leaf) for leaf in policy.leaves()]  # type: ignore[misc]
    parameters = {}
    for field in fields(policy):
        value = getattr(policy, field.name)
        if field.default is MISSING or value != field.default or field.name == "keep":
            parameters[field.name] = _plain(value)
    return PolicyConfig(policy=policy.name, parameters=parameters).model_dump()


def from_dict(data: Any) -> Policy:
    """A policy from :func:`to_dict`'s form; a list becomes a composition.

    Raises:
        InputError: unknown policy, key, parameter, or config version.
    """
    if isinstance(data, list):
        return compose([from_dict(part) for part in data])
    try:
        config = PolicyConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"Not a policy config: {_first_error(error)}") from None
    if config.version > CONFIG_VERSION:
        raise InputError(f"Policy config version {config.version} is newer than {CONFIG_VERSION}; update vlmprune.")
    return build(config.policy, config.parameters)


def build(name: str, parameters: Mapping[str, Any]) -> Policy:
    """A policy by name, with parameter types checked against the dataclass's annotations."""
    parameters = {key: v if key == "keep" else _revive(v) for key, v in parameters.items()}
    cls = registry.get(name)
    registry.check_parameters(name, parameters)
    try:
        return TypeAdapter(cls).validate_python(parameters)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(cause, InputError):  # raised by the policy itself, e.g. for its budget
            raise cause from None
        raise InputError(f"Policy {name!r}: {_first_error(error)}") from None


def load(path: str | Path) -> Policy:
    """Read a ``.yaml``, ``.yml`` or ``.json`` policy config.

    Raises:
        InputError: the file is missing, unreadable, or not a policy config.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Policy config {str(path)!r} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Policy config {str(path)!r} cannot be read: {reason}") from None
    return from_dict(data)


def dump(policy: Policy, path: str | Path) -> None:
    """Write a policy config atomically; the suffix decides between JSON and YAML."""
    path = Path(path)
    data = to_dict(policy)
    text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def compose(policies: Sequence[Policy]) -> Policy:
    """One policy out of several, in order."""
    return registry.create("compose", policies=tuple(policies))


def resolve(policy: str | Policy | Path | Sequence[Any] | Mapping[str, Any], /, **parameters: Any) -> Policy:
    """A policy from whatever ``apply`` takes: a name, a policy, a config path or dict, or a list of these.

    Args:
        policy: see above. A composition takes one ``keep`` per member as a list.
        parameters: hyper-parameters, for a name only.

    Raises:
        InputError: unknown name, parameter or file.
    """
    if isinstance(policy, Policy):
        _refuse_parameters(parameters, "an instance")
        return policy
    if isinstance(policy, Mapping):
        _refuse_parameters(parameters, "a config")
        return from_dict(dict(policy))
    if isinstance(policy, (str, Path)):
        if isinstance(policy, Path) or policy.endswith((".yaml", ".yml", ".json")):
            _refuse_parameters(parameters, "a config file")
            return load(policy)
        return build(policy, parameters)
    if not isinstance(policy, Sequence) or not policy:
        raise InputError(f"{policy!r} is no policy; give a name, a policy, a config, or a list of these.")
    keep = parameters.pop("keep", None)
    _refuse_parameters(parameters, "a composition")
    members = list(policy)
    if keep is None:
        return compose([resolve(member) for member in members])
    if not isinstance(keep, (list, tuple)) or len(keep) != len(members):
        raise InputError(f"A composition of {len(members)} policies takes one keep per policy, a list; got {keep!r}.")
    given = [{} if part is None else {"keep": part} for part in keep]
    return compose([resolve(member, **part) for member, part in zip(members, given, strict=True)])


def _refuse_parameters(parameters: Mapping[str, Any], what: str) -> None:
    if parameters:
        raise InputError(f"{', '.join(parameters)} cannot be given beside {what}; set it there instead.")


def _revive(value: Any) -> Any:
    """Tuples and policies out of plain lists and nested configs."""
    if isinstance(value, Mapping) and "policy" in value:
        return from_dict(dict(value))
    return tuple(_revive(part) for part in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Policy):
        return to_dict(value)
    if isinstance(value, Budget):
        return value.describe()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]
