"""The runner `lmms-eval`: the harness loads the tasks, builds the prompts, asks and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.core.errors import InputError, VlmpruneError
from vlmprune.evaluation.cells import Cell
from vlmprune.evaluation.native import Answer
from vlmprune.evaluation.summary import TaskRun
from vlmprune.evaluation.tasks.prepare import prepare_task

if TYPE_CHECKING:
    from vlmprune.api import Handle
    from vlmprune.evaluation.lmms_model import VlmPrune


class HarnessError(VlmpruneError, RuntimeError):
    """lmms-eval's answers or scores do not fit the questions."""


@dataclass
class LmmsEngine:
    """Answers through lmms-eval. Make one with :meth:`create`."""

    lm: VlmPrune
    processor: Any
    style: str
    cache: Path | None

    @classmethod
    def create(cls, model: Any, processor: Any, batch_size: int, style: str, cache: Path | None) -> LmmsEngine:
        """Import lmms-eval (10 to 40 seconds) and wrap the model.

        Raises:
            InputError: lmms-eval is not installed.
        """
        try:
            from vlmprune.evaluation.lmms_model import VlmPrune
        except ImportError as error:
            raise InputError(
                f"The runner lmms-eval cannot be imported ({error}): pip install 'vlmprune[eval]', or use "
                "--runner native."
            ) from None
        return cls(VlmPrune.wrap(model, processor, batch_size), processor, style, cache)

    def answer(self, run: TaskRun, cell: Cell, handle: Handle | None, advance: Callable[[int], None]) -> list[Answer]:
        """Answers in the order of the documents.

        Raises:
            HarnessError: the harness lost or re-ordered documents, or scored differently.
        """
        from lmms_eval import evaluator
        from lmms_eval.tasks import TaskManager

        folder = prepare_task(run.task, run.docs, self.cache)
        manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name=self.style)
        self.lm.use_handle(handle)
        name = run.task.name
        with _without_usage_counts():
            output = evaluator.simple_evaluate(
                model=self.lm,
                tasks=[name],
                task_manager=manager,
                batch_size=self.lm.batch_size,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
            )
        advance(len(run.docs))
        return self._collect(run, output["samples"][name])

    def _collect(self, run: TaskRun, samples: list[dict[str, Any]]) -> list[Answer]:
        logged = {int(sample["doc_id"]): sample for sample in samples}
        if sorted(logged) != list(range(len(run.docs))):
            raise HarnessError(f"lmms-eval logged {len(logged)} of {len(run.docs)} documents of {run.task.name}.")
        answers = []
        for number, doc in enumerate(run.docs):
            sample, answer = logged[number], self.lm.answers[run.task.name, number]
            if sample["doc"]["doc_id"] != doc["doc_id"]:
                raise HarnessError(f"lmms-eval's document {number} of {run.task.name} is another one.")
            prediction = sample["filtered_resps"][0]
            if run.task.is_right(doc, prediction) != (sample[run.task.metric] == 1.0):
                raise HarnessError(f"lmms-eval scored {doc['doc_id']} differently.")
            answers.append(
                Answer(prediction, answer.n_images, answer.visual, answer.kept, answer.layers, answer.new_tokens)
            )
        return answers


@contextmanager
def _without_usage_counts() -> Iterator[None]:
    """Keep `datasets` from asking the hub's server for a local parquet, only to have the use counted."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before
