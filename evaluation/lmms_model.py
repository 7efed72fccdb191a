"""lmms-eval's model class `vlmprune`: any image-text model of transformers, with a policy applied.

    lmms-eval eval --model vlmprune --model_args pretrained=tiny-llava,policy=hiprune,keep=0.33 --tasks ...

Importing this module imports parts of lmms-eval; nothing else in the package imports it at module level.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string

from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.policy import Policy
from vlmprune.evaluation.native import Answer, Request, answer_one_batch
from vlmprune.evaluation.prompts import render_prompt
from vlmprune.evaluation.schema import DENSE
from vlmprune.evaluation.stamp import weight_hash

if TYPE_CHECKING:
    from vlmprune.api import Handle


class VlmPrune(lmms):
    """A chat model of lmms-eval with a policy inside.

    Args:
        pretrained: embedded model (`tiny-llava`), local folder, or hub id.
        policy: registered policy, config file, or `dense`. keep: its budget (`1` is one token, `1.0` all).
        batch_size: questions per generate call.
        device: where to run, e.g. `cuda:0`; None takes the process's GPU under `accelerate launch`, else the
            CPU.
        dtype: dtype of the weights, None keeps the checkpoint's.
        parameters: hyper-parameters of the policy.

    With `base=<name>` another class of lmms-eval is built and pruned instead
    (:func:`vlmprune.evaluation.lmms_base.create_base`).

    Raises:
        InputError: unknown model, policy, parameter or budget.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        policy: str = DENSE,
        keep: Any = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **parameters: Any,
    ) -> None:
        from vlmprune.loading import load_model

        parameters.pop("max_batch_size", None)  # the harness passes it to every class
        resolved = resolve_policy(policy, keep, parameters)
        accelerator = _distributed()
        where = device if accelerator is None else str(accelerator.device)
        model, processor = load_model(pretrained, dtype=dtype, device=where)
        self._setup(model, processor, int(batch_size))
        if accelerator is not None:
            self.accelerator, self._rank = accelerator, accelerator.process_index
            self._world_size = accelerator.num_processes
        if resolved is not None:
            from vlmprune.api import apply

            self.use_handle(apply(model, resolved, processor=processor))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> lmms:
        """Build from the harness's `--model_args`; with `base=` an instance of that class."""
        arguments = simple_parse_args_string(arg_string)
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "pretrained" not in arguments:
            raise InputError("model_args lacks pretrained=...; give an embedded model, a folder, or a hub id.")
        if "base" in arguments:
            from vlmprune.evaluation.lmms_base import create_base

            return create_base(arguments, extra)
        return cls(**arguments, **{name: value for name, value in extra.items() if name not in arguments})

    @classmethod
    def wrap(cls, model: Any, processor: Any, batch_size: int) -> VlmPrune:
        """A harness model round one that is loaded already."""
        instance = cls.__new__(cls)
        instance._setup(model, processor, batch_size)
        return instance

    def _setup(self, model: Any, processor: Any, batch_size: int) -> None:
        lmms.__init__(self)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is out of range; give at least 1.")
        self._model, self._processor, self.batch_size = model, processor, batch_size
        self._weights = weight_hash(model)
        self._handle: Handle | None = None
        self.answers: dict[tuple[str, int], Answer] = {}

    def use_handle(self, handle: Handle | None) -> None:
        """Answer with this handle's policy from now on; None for the dense model."""
        self._handle = handle
        self.answers = {}

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def device(self) -> Any:
        """Where the model runs."""
        return self._model.device

    def __str__(self) -> str:
        """Weights, policy and budget. The harness keys its response cache with this text, so it must tell
        them apart and be the same in every process."""
        from vlmprune.core import config

        policy = DENSE if self._handle is None else json.dumps(config.to_dict(self._handle.policy), sort_keys=True)
        return f"vlmprune({type(self._model).__name__}, {self._weights}, {self._model.dtype}, {policy})"

    def clean(self) -> None:
        """Keep the model: the harness's own version deletes it after every run."""

    def generate_until(self, requests: list[Instance]) -> Iterator[GenerationResult]:
        """Answer in request order, one batch of neighbours with equal generation arguments at a time.

        A generator: the harness stores each answer as it comes, so an interrupted run keeps what it has.
        """
        for generation, group in itertools.groupby(requests, key=lambda instance: dict(instance.args[2])):
            instances = list(group)
            for start in range(0, len(instances), self.batch_size):
                yield from self._answer(instances[start : start + self.batch_size], generation)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Chat classes of the harness serve generation tasks only."""
        raise UnsupportedError("vlmprune serves generation tasks; choose the task's generation variant.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not served."""
        raise UnsupportedError("vlmprune answers single-round tasks only.")

    def _answer(self, instances: Sequence[Instance], generation: Mapping[str, Any]) -> list[GenerationResult]:
        asked = [self._request(instance) for instance in instances]
        answers = answer_one_batch(self._model, self._processor, asked, generation, self._handle)
        for instance, answer in zip(instances, answers, strict=True):
            self.answers[instance.args[4], instance.args[3]] = answer
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.new_tokens)) for a in answers]

    def _request(self, instance: Instance) -> Request:
        _, doc_to_messages, _, doc_id, task, split = instance.args
        doc = self.task_dict[task][split][doc_id]
        messages = ChatMessages(messages=doc_to_messages(doc))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise UnsupportedError(f"Task {task!r} has video or audio, which this class does not serve.")
        # Our own tasks name their documents, so that draws are the same in the native runner.
        sample_id = doc.get("doc_id", f"{task}/{doc_id}")
        prompt = render_prompt(self._processor, _plain(messages))
        return Request(sample_id, prompt, [image.convert("RGB") for image in images])


def resolve_policy(policy: str, keep: Any, parameters: Mapping[str, Any]) -> Policy | None:
    """The policy of a model_args string, None for `dense`.

    Raises:
        InputError: unknown policy or parameter, a budget out of range, or a budget beside `dense`.
    """
    from vlmprune.core import config

    if policy == DENSE:
        if keep not in (None, 1.0) or parameters:
            raise InputError(f"policy=dense takes no budget or parameters, got keep={keep} {dict(parameters)}.")
        return None
    given = dict(parameters) if keep is None else {**parameters, "keep": keep}
    return config.resolve(policy, **given)


def _plain(messages: ChatMessages) -> list[dict[str, Any]]:
    """Messages for a chat template, pictures as placeholders."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": item.text} if item.type == "text" else {"type": item.type}
                for item in message.content
            ],
        }
        for message in messages.messages
    ]


def _distributed() -> Any:
    """The accelerator of a launch with several processes, None otherwise."""
    from accelerate import Accelerator, PartialState

    return Accelerator() if PartialState().num_processes > 1 else None
