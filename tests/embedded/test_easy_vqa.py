"""The packaged easy-VQA: counts as published, parquet round trip, labels derived from questions."""

import numpy as np
import pytest

from vlmprune.embedded.easyvqa import image_facts, load_easy_vqa, object_mask, write_parquet


def test_test_split_has_the_published_counts():
    data = load_easy_vqa("test")
    assert len(data.png) == 1000 and len(data.questions) == 9673
    assert sum(q.answer in ("yes", "no") for q in data.questions) == 7136
    assert data.image(0).size == (64, 64) and data.image(0).mode == "RGB"


def test_train_split_has_the_published_counts():
    data = load_easy_vqa("train")
    assert len(data.png) == 4000 and len(data.questions) == 38575


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train"):
        load_easy_vqa("val")


@pytest.mark.parametrize(
    ("pairs", "facts"),
    [
        ([("what is the blue shape?", "rectangle")], ("rectangle", "blue")),
        ([("what color is the circle?", "teal")], ("circle", "teal")),
        ([("is there not a red shape?", "no")], (None, "red")),
        ([("is no circle present?", "no")], ("circle", None)),
        ([("is a brown shape present?", "yes"), ("is there a circle?", "no")], (None, "brown")),
        ([("does the image not contain a gray shape?", "yes")], (None, None)),
    ],
)
def test_facts_follow_from_questions(pairs, facts):
    assert image_facts(pairs) == facts


def test_object_mask_finds_the_shape():
    image = np.full((64, 64, 3), 240, dtype=np.uint8)
    image[10:20, 30:50] = (200, 0, 0)
    assert object_mask(image).sum() == 200 and object_mask(image)[10:20, 30:50].all()


def test_parquet_carries_decodable_images(tmp_path):
    pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "easy.parquet", "test")
    table = pq.read_table(path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and table.num_rows == 9673
    data, row = load_easy_vqa("test"), table.slice(77, 1).to_pylist()[0]
    assert row["question"] == data.questions[77].question and row["image"]["bytes"] == data.png[row["image_id"]]
    assert path.stat().st_size < 2_000_000
