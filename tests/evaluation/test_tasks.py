from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmprune.core.errors import InputError
from vlmprune.evaluation.tasks.common import DOC_KEYS
from vlmprune.evaluation.tasks.definition import load_task, load_tasks, task_names
from vlmprune.evaluation.tasks.prepare import prepare_task
from vlmprune.evaluation.tasks.scoring import exact_match


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("Circle.", "circle", True),
        (" yes, it is", "yes", True),
        ('"No"', "no", True),
        ("7", "7", True),
        ("light blue thing", "light blue", True),
        ("light", "light blue", False),
        ("the circle", "circle", False),
        ("circles", "circle", False),
        ("17", "7", False),
        ("", "circle", False),
        ("...", "circle", False),
        ("circle", "", False),
        ("", "", False),
    ],
)
def test_exact_match(prediction: str, target: str, right: bool) -> None:
    assert exact_match(prediction, target) is right


@pytest.mark.parametrize("name", ["scenes", "easy_vqa"])
def test_documents(name: str) -> None:
    task = load_task(name)
    docs = task.load_docs(3, 60)
    assert len(docs) == 60 and len({doc["doc_id"] for doc in docs}) == 60
    for doc in docs:
        assert tuple(sorted(doc)) == tuple(sorted(DOC_KEYS))
        assert doc["family"] in task.families
        assert task.is_right(doc, f"{doc['answer'].title()}.") and not task.is_right(doc, "nothing")
        (image,) = task.doc_to_visual(doc)
        assert image.mode == "RGB"
        assert task.text(doc, "default") == doc["question"]
        assert task.text(doc, "instruct").startswith(doc["question"] + "\n")
    again = task.load_docs(3, 60)
    assert [doc["doc_id"] for doc in again] == [doc["doc_id"] for doc in docs]
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(docs, again, strict=True))


def test_scene_seeds_give_fresh_scenes_and_limits_nest() -> None:
    task = load_task("scenes")
    few, many, other = task.load_docs(1, 20), task.load_docs(1, 50), task.load_docs(2, 50)
    strip = [[(d["doc_id"], d["question"], d["answer"]) for d in docs] for docs in (few, many[:20])]
    assert strip[0] == strip[1]
    assert not {d["image_id"] for d in many} & {d["image_id"] for d in other}
    pixels = [{np.asarray(d["image"]).tobytes() for d in docs} for docs in (many, other)]
    assert not pixels[0] & pixels[1]
    assert max(Counter(d["family"] for d in many).values()) <= 8  # 50 questions over 8 families


def test_easy_vqa_is_the_whole_public_split() -> None:
    task = load_task("easy_vqa")
    docs = task.load_docs(0, None)
    assert len(docs) == 9673 and len({doc["image_id"] for doc in docs}) == 1000
    assert task.load_docs(5, 100_000)[77]["doc_id"] == docs[77]["doc_id"]
    by_id = {doc["doc_id"]: doc for doc in docs}
    drawn, other = task.load_docs(0, 200), task.load_docs(1, 200)
    assert all(by_id[d["doc_id"]]["question"] == d["question"] for d in drawn)
    assert {d["doc_id"] for d in drawn} != {d["doc_id"] for d in other}
    assert len({d["image_id"] for d in drawn}) > 100  # spread over the pictures


def test_unknown_tasks() -> None:
    assert task_names() == ["easy_vqa", "scenes"]
    with pytest.raises(InputError, match="Did you mean 'scenes'"):
        load_task("scene")
    for names in ([], ["scenes", "scenes"]):
        with pytest.raises(InputError):
            load_tasks(names)


def test_parquet_holds_the_same_pixels(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    task = load_task("scenes")
    docs = task.load_docs(4, 15)
    folder = prepare_task(task, docs, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["scenes.parquet", "scenes.yaml"]
    assert (folder / "scenes.yaml").read_bytes() == task.yaml_path.read_bytes()
    table = parquet.read_table(folder / "scenes.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    for row, doc in zip(table.to_pylist(), docs, strict=True):
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(doc["image"]))
        assert all(row[key] == doc[key] for key in DOC_KEYS if key != "image")


def test_parquet_folders_follow_their_content(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    task = load_task("scenes")
    first = prepare_task(task, task.load_docs(4, 10), tmp_path)
    written = (first / "scenes.parquet").stat().st_mtime_ns
    assert prepare_task(task, task.load_docs(4, 10), tmp_path) == first
    assert (first / "scenes.parquet").stat().st_mtime_ns == written
    assert prepare_task(task, task.load_docs(5, 10), tmp_path) != first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(InputError, match="no documents"):
        prepare_task(task, [], tmp_path)
