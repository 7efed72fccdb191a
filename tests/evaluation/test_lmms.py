"""lmms-eval: the same answers as the native runner, and the traps of its 0.7.3."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fixed_policy import FixedKeep

from vlmprune.api import HANDLE, applied
from vlmprune.core import config
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.selection import Selection
from vlmprune.evaluation.runner import CellsFailed, evaluate
from vlmprune.evaluation.schema import read_samples

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval")

QUESTIONS = 100
SETTINGS = {"model_name": "tiny-llava", "seed": 11, "batch_size": 20, "measure_time": False}


class Broken(FixedKeep):
    name = "broken"

    def select(self, context: Context) -> Selection:
        raise RuntimeError("the policy broke")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def model_class() -> Any:
    """The class as lmms-eval's own registry finds it by our manifest."""
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from vlmprune.evaluation.lmms_plugin import manifests

    registry = ModelRegistryV2()
    for manifest in manifests():
        registry.register_manifest(manifest)
    return registry.get_model_class("vlmprune")


def test_both_runners_give_the_same_answers(tiny: tuple[Any, Any], tmp_path: Path, cache: Path) -> None:
    policies = [config.resolve("hiprune", keep=0.11)]
    rows = {}
    for runner in ("native", "lmms-eval"):
        results = evaluate(
            *tiny,
            policies=policies,
            tasks=["scenes", "easy_vqa"],
            limit=QUESTIONS // 2,
            output=tmp_path / runner,
            runner=runner,
            cache=cache,
            **SETTINGS,
        )
        rows[runner] = [row.model_dump(exclude={"stamp"}) for row in results.rows]
        assert all(row.stamp.runner == runner for row in results.rows)
    native, harness = (read_samples(tmp_path / runner) for runner in ("native", "lmms-eval"))
    assert len(native) == 3 * QUESTIONS and any(sample.prediction for sample in native)
    assert native == harness
    assert rows["native"] == rows["lmms-eval"]


def test_nothing_is_looked_up(tiny: tuple[Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` counts uses on a server, unless it is told not to; here it is not offline."""
    import datasets

    asked: list[Any] = []

    def session() -> None:
        asked.append("session")
        raise OSError("no network in this test")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", session)
    evaluate(*tiny, limit=3, runner="lmms-eval", cache=cache, **(SETTINGS | {"seed": 12}))
    assert not asked and datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True


def test_a_policy_that_raises_is_a_failed_cell(tiny: tuple[Any, Any], tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CellsFailed, match="the policy broke") as caught:
        evaluate(*tiny, policies=[Broken()], limit=4, runner="lmms-eval", cache=cache, random_seeds=0, **SETTINGS)
    assert {row.policy for row in caught.value.results.rows} == {"dense"}
    assert HANDLE not in tiny[0].__dict__


def test_the_entry_point_names_the_plugin(repo_root: Path, model_class: Any) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    (group,) = [group for name, group in project["entry-points"].items() if name == "lmms_eval.models"]
    point = importlib.metadata.EntryPoint("vlmprune", group["vlmprune"], "lmms_eval.models")
    (manifest,) = point.load()()
    assert (manifest.model_id, manifest.chat_class_path) == (
        "vlmprune",
        f"{model_class.__module__}.{model_class.__name__}",
    )


def test_the_cache_key_tells_policies_apart(tiny: tuple[Any, Any], model_class: Any) -> None:
    """The harness keys stored answers by this text: it must tell budgets apart and hold no address."""
    lm = model_class.wrap(*tiny, batch_size=4)
    keys = [str(lm)]
    others = [("uniform", 0.2), ("uniform", 0.3), ("grid", 0.2), ("uniform", 1), ("uniform", 1.0)]
    for name, keep in others:
        with applied(tiny[0], name, keep=keep) as handle:
            lm.use_handle(handle)
            keys.append(str(lm))
    assert len(set(keys)) == len(keys)
    assert str(model_class.wrap(*tiny, batch_size=2)) == keys[0]


def test_cleaning_keeps_the_model(tiny: tuple[Any, Any], model_class: Any) -> None:
    lm = model_class.wrap(*tiny, batch_size=4)
    lm.clean()
    assert lm.model is tiny[0] and lm.device == tiny[0].device


def test_answers_come_one_batch_at_a_time(tiny: tuple[Any, Any], model_class: Any) -> None:
    """An interrupted run keeps what was answered before, so nothing may be computed ahead."""
    from lmms_eval.api.instance import Instance

    from vlmprune.evaluation.tasks.definition import load_task

    task = load_task("scenes")
    docs = task.load_docs(11, 6)
    lm = model_class.wrap(*tiny, batch_size=2)
    lm.task_dict["scenes"] = {"test": docs}

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    requests = []
    for number in range(6):
        arguments = ("", messages, {"max_new_tokens": 2}, number, "scenes", "test")
        metadata = {"task": "scenes", "doc_id": number, "repeats": 1}
        requests.append(Instance("generate_until", arguments, number, metadata))
    answers = lm.generate_until(requests)
    first = next(answers)
    assert sorted(lm.answers) == [("scenes", 0), ("scenes", 1)]
    rest = list(answers)
    assert [a.text for a in (first, *rest)] == [lm.answers["scenes", i].text for i in range(6)]


def test_model_args(model_class: Any) -> None:
    lm = model_class.create_from_arg_string(
        "pretrained=tiny-llava,policy=random,keep=0.25,seed=3", {"batch_size": 2, "device": None}
    )
    policy = lm.model.__dict__[HANDLE].policy
    assert (policy.name, policy.keep, policy.seed, lm.batch_size) == ("random", 0.25, 3, 2)
    tokens = model_class.create_from_arg_string("pretrained=tiny-llava,policy=uniform,keep=1")
    assert tokens.model.__dict__[HANDLE].policy.budget.tokens == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("policy=hiprune", "pretrained"),
        ("pretrained=tiny-llava,policy=hipune", "hiprune"),
        ("pretrained=tiny-llava,policy=uniform,keep=2.5", "out of range"),
        ("pretrained=tiny-llava,policy=uniform,depth=3", "no parameter 'depth'"),
        ("pretrained=tiny-llava,keep=0.5", "dense takes no budget"),
        ("pretrained=tiny-llava,batch_size=0", "batch_size=0"),
        ("pretrained=tiny-llava,base=vlmprune", "itself"),
        ("pretrained=tiny-llava,base=unheard_of", "unheard_of"),
    ],
)
def test_bad_model_args(model_class: Any, arguments: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_class.create_from_arg_string(arguments)


def test_a_model_class_of_the_harness_can_be_pruned(model_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception must come out of a class that answers "" on any exception, as llava_hf does."""
    import lmms_eval.models

    from vlmprune.embedded import load_embedded

    class Swallowing:
        def __init__(self, pretrained: str, batch_size: int = 1) -> None:
            self._model, self.processor = load_embedded(pretrained)

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers, text = [], ["USER: <image>\nwhy? ASSISTANT:"]
            for image in requests:
                try:
                    batch = self.processor(images=[image], text=text, return_tensors="pt")
                    answers.append(str(self._model.generate(**batch, max_new_tokens=1).shape[1]))
                except Exception:
                    answers.append("")
            return answers

    monkeypatch.setattr(lmms_eval.models, "get_model", lambda name: Swallowing)
    from vlmprune.evaluation.tasks.definition import load_task

    image = load_task("scenes").load_docs(0, 1)[0]["image"]
    lm = model_class.create_from_arg_string("base=toy,pretrained=tiny-llava,policy=uniform,keep=0.25")
    assert len(list(lm.generate_until([image]))) == 1
    assert lm.vlmprune_handle.last.kept_tokens == (49,)
    lm.clean()
    assert lm._model is lm.vlmprune_handle.model
    monkeypatch.setattr(type(lm.vlmprune_handle.policy), "pick", _broken)
    with pytest.raises(RuntimeError, match="the policy broke"):
        list(lm.generate_until([image]))


def _broken(*args: Any) -> None:
    raise RuntimeError("the policy broke")
