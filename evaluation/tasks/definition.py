"""Reading a task's YAML file without lmms-eval."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmprune.core.errors import InputError
from vlmprune.core.registry import suggest

TASKS_FOLDER = Path(__file__).resolve().parent
DEFAULT_PROMPT, INSTRUCT_PROMPT = "default", "instruct"


@dataclass(frozen=True)
class Task:
    """A task as its YAML file and its module of functions describe it.

    Attributes:
        name: task name, also the folder's and the file's.
        yaml_path: the YAML file.
        doc_to_visual, doc_to_text, doc_to_target, process_results: the functions that lmms-eval calls too.
        load_docs: `(seed, limit) -> documents`.
        generation: generation arguments. prompts: prompt style -> `pre_prompt` and `post_prompt`.
        metric: key of the score in what `process_results` returns.
        families: question families; headline: those that count for the headline.
    """

    name: str
    yaml_path: Path
    doc_to_visual: Callable[..., list[Any]]
    doc_to_text: Callable[..., str]
    doc_to_target: Callable[..., str]
    process_results: Callable[..., dict[str, float]]
    load_docs: Callable[[int, int | None], list[dict[str, Any]]]
    generation: Mapping[str, Any]
    prompts: Mapping[str, Mapping[str, str]]
    metric: str
    families: tuple[str, ...]
    headline: tuple[str, ...]

    def text(self, doc: Mapping[str, Any], style: str) -> str:
        """The question as it is put to the model."""
        return self.doc_to_text(doc, self.prompts[style])

    def is_right(self, doc: Mapping[str, Any], prediction: str) -> bool:
        """Score one answer."""
        return self.process_results(doc, [prediction])[self.metric] == 1.0


class _Loader(yaml.SafeLoader):
    """Safe YAML plus lmms-eval's tag for functions."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


_Loader.add_constructor("!function", _function)


def task_names() -> list[str]:
    """Names of the tasks in this package, sorted."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*/*.yaml"))


def load_task(name: str) -> Task:
    """Read a task.

    Raises:
        InputError: no such task; the message names the nearest ones.
    """
    if name not in task_names():
        raise InputError(f"Unknown task {name!r}.{suggest(name, task_names())}")
    path = TASKS_FOLDER / name / f"{name}.yaml"
    # The loader is safe apart from `!function`, and the file is this package's own.
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    module = importlib.import_module(f"vlmprune.evaluation.tasks.{name}.utils")
    return Task(
        name=name,
        yaml_path=path,
        doc_to_visual=content["doc_to_visual"],
        doc_to_text=content["doc_to_text"],
        doc_to_target=content["doc_to_target"],
        process_results=content["process_results"],
        load_docs=module.load_docs,
        generation=content["generation_kwargs"],
        prompts=content["lmms_eval_specific_kwargs"],
        metric=content["score_key"],
        families=tuple(module.FAMILY_NAMES),
        headline=tuple(module.HEADLINE),
    )


def load_tasks(names: Sequence[str]) -> list[Task]:
    """Read several tasks, in the given order.

    Raises:
        InputError: none given, one given twice, or unknown.
    """
    if not names:
        raise InputError(f"No task was given. Known: {', '.join(task_names())}.")
    if len(set(names)) != len(names):
        raise InputError(f"A task was given twice: {', '.join(names)}.")
    return [load_task(name) for name in names]
