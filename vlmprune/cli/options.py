"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from vlmprune.core.policy import Policy
    from vlmprune.loading import Prepare

DEFAULT_KEEP = "0.33"

ModelOption = Annotated[str, typer.Option("--model", help="tiny-llava, tiny-qwen, a local folder, or a hub id.")]
PolicyOption = Annotated[
    str,
    typer.Option("--policy", help="A policy (see `vlmprune list`), several joined by '+', or a config file."),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Budget: 0.33 or 1.0 is a share, 192 or 1 a number of tokens, flops:0.4 a share of the FLOPs, "
        "0.5,0.3 one per stage or policy.",
        show_default=DEFAULT_KEEP,
    ),
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter as key=value, of a composition as policy.key=value; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def build_policy(
    name: str, keep: str | None = None, parameters: dict[str, Any] | None = None, default: str = DEFAULT_KEEP
) -> Policy:
    """A policy from the command line.

    Args:
        name: a registered name, names joined by ``+`` (a composition, one budget each), or a config file.
        keep: budget as text; None takes the file's, else ``default``, unless a parameter stands in its place.
        parameters: hyper-parameters, of a composition as ``member.key``.
        default: see ``keep``.

    Raises:
        InputError: unknown name or parameter, or a budget out of range.
    """
    from vlmprune.core.budget import Budget
    from vlmprune.core.config import resolve
    from vlmprune.core.registry import registry

    given = dict(parameters or {})
    if name.endswith((".yaml", ".yml", ".json")):
        return resolve(name, **given, **({} if keep is None else {"keep": keep}))
    budget = Budget.parse(keep or default).describe()
    if "+" not in name:
        if keep is None and set(given) & set(registry.get(name).instead_of_keep):
            return resolve(name, **given)
        return resolve(name, keep=budget, **given)
    names = [part.strip() for part in name.split("+")]
    own = _by_member(given, names)
    if not given or not isinstance(budget, list) or len(budget) != len(names):
        return resolve(names, keep=budget)
    return resolve([resolve(part, keep=one, **own[part]) for part, one in zip(names, budget, strict=True)])


def _by_member(parameters: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """Parameters of a composition's members, given as ``member.key``.

    Raises:
        InputError: a parameter that names no member.
    """
    found: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in parameters.items():
        member, dot, own = key.partition(".")
        if not dot or member not in found:
            raise InputError(
                f"{key} names no member of {'+'.join(names)}; write it as one's own, such as {names[0]}.{own or key}."
            )
        found[member][own] = value
    return found


def parse_parameters(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs as a dict; values are read as YAML (numbers, true, null, lists, text).

    Raises:
        InputError: a pair without ``=``, a key given twice, or a value that is no YAML.
    """
    import yaml

    parameters: dict[str, Any] = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise InputError(f"--param {pair!r} is not of the form key=value.")
        if key.strip() in parameters:
            raise InputError(f"--param {key.strip()} is given twice.")
        try:
            parameters[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--param {pair!r}: {value!r} cannot be read as a value.") from None
    return parameters


def load(name: str, dtype: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """Model and processor, without the progress bars and notes of the libraries.

    Raises:
        InputError: there is no such model or device.
    """
    from vlmprune.loading import load_model

    device = choose_device(device)
    quiet()
    return load_model(name, dtype, device)


def load_for_pictures(name: str, dtype: str | None = None, device: str = "auto") -> tuple[Any, Prepare]:
    """As :func:`load`, of any model that takes pictures, with what prepares them for its tower."""
    from vlmprune.loading import load_image_model

    device = choose_device(device)
    quiet()
    return load_image_model(name, dtype, device)


def choose_device(name: str) -> str:
    """A device that is there, for ``auto`` the best one.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise InputError(f"Unknown device {name!r}; give auto, cpu or cuda.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("There is no CUDA device here; give --device cpu.")
    return name


def quiet() -> None:
    """Keep progress bars and notes of transformers off standard error."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
