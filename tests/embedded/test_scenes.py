"""Scene generator and questions: determinism, disjoint splits, labels recomputed independently."""

import re

import numpy as np
import pytest

from vlmprune.embedded.bank import SHAPES, load_bank
from vlmprune.embedded.questions import FAMILIES, ask, draw_questions
from vlmprune.embedded.scenes import COLOURS, GRID, IMAGE_SIZE, PALETTE, PATCH_SIZE, generate_scene
from vlmprune.embedded.tasks import scene_questions


def scenes(n, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    return [generate_scene(rng, split) for _ in range(n)]


def test_same_seed_gives_the_same_scene():
    for split in ("train", "test"):
        first, second = scenes(5, 3, split), scenes(5, 3, split)
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a.image, b.image) and a.objects == b.objects
            assert np.array_equal(a.patch_object, b.patch_object)
    assert not np.array_equal(scenes(1, 3)[0].image, scenes(1, 4)[0].image)


def test_unknown_split_and_family_are_refused():
    with pytest.raises(ValueError, match="train"):
        generate_scene(np.random.default_rng(0), "valid")
    with pytest.raises(ValueError, match="colour"):
        ask(np.random.default_rng(0), scenes(1)[0], "color")


def test_splits_share_neither_photos_nor_digits():
    train, test = load_bank("train"), load_bank("test")
    assert not set(train.photo_names) & set(test.photo_names)
    assert "motorcycle_right" not in test.photo_names  # stereo twin of a training photo
    seen = {digit.tobytes() for digit in train.digit_images}
    assert not any(digit.tobytes() in seen for digit in test.digit_images)
    assert len(test.digit_images) == 800 and len(train.digit_images) == 4200


def test_scene_has_the_stated_format_and_no_overlaps():
    for scene in scenes(30):
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.patch_object.shape == (GRID, GRID)
        owners = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for item in scene.objects:
            x0, y0, x1, y1 = item.bbox
            owners[y0:y1, x0:x1] += 1
            assert 0 <= x0 < x1 <= IMAGE_SIZE and 0 <= y0 < y1 <= IMAGE_SIZE
        assert owners.max() <= 1


def test_object_is_painted_in_its_colour_where_the_label_says():
    """The centre pixel of a filled shape has the named colour and lies in a labelled patch."""
    checked = 0
    for scene in scenes(60):
        for number, item in enumerate(scene.objects):
            if item.kind not in ("circle", "diamond", "cross"):
                continue
            x, y = (int(c) for c in item.centre)
            distance = {c: np.abs(scene.image[y, x].astype(int) - PALETTE[c]).max() for c in COLOURS}
            assert min(distance, key=distance.get) == item.colour
            assert scene.patch_object[y // PATCH_SIZE, x // PATCH_SIZE] == number
            checked += 1
    assert checked > 50


def answer_from_objects(question, objects):
    """Answer a question from its text alone: a second implementation, by string matching."""
    text = question.text
    colours = [w for w in re.findall(r"\w+", text) if w in COLOURS]
    kinds = [w for w in re.findall(r"\w+", text) if w in (*SHAPES, "digit")]
    numbers = re.findall(r"\d", text)
    if question.family == "shape":
        return [o.kind for o in objects if o.colour == colours[0]]
    if question.family == "colour":
        return [o.colour for o in objects if o.kind == kinds[0]]
    if question.family == "digit":
        return [str(o.digit) for o in objects if o.kind == "digit" and (not colours or o.colour == colours[0])]
    if question.family == "digit_colour":
        return [o.colour for o in objects if o.digit == int(numbers[0])]
    if question.family == "exist":
        return ["yes" if any(o.colour == colours[0] and o.kind == kinds[0] for o in objects) else "no"]
    if question.family == "count":
        if colours:
            return [str(sum(o.colour == colours[0] for o in objects))]
        noun = re.search(r"how many (\w+)", text).group(1)
        return [str(sum(noun in (o.kind + "s", o.kind + "es") for o in objects))]
    match = [o for o in objects if o.colour == colours[0] and (not kinds or o.kind == kinds[0])]
    x, y = match[0].centre
    if question.family == "side":
        sides = ("left" if x < 112 else "right", "top" if y < 112 else "bottom")
        return [sides[0] if "left" in text else sides[1]] * len(match)
    other = next(o for o in objects if o.colour == colours[1] and o.kind == kinds[1]).centre
    true = {"left of": x < other[0], "right of": x > other[0], "above": y < other[1], "below": y > other[1]}
    return ["yes" if next(v for k, v in true.items() if k in text) else "no"] * len(match)


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_object_list(split):
    rng = np.random.default_rng(8)
    seen = set()
    for scene in scenes(80, 8, split):
        for question in draw_questions(rng, scene, 12):
            assert answer_from_objects(question, scene.objects) == [question.answer], question
            seen.add(question.family)
    assert seen == set(FAMILIES)


def test_targets_name_the_deciding_objects():
    rng = np.random.default_rng(9)
    for scene in scenes(40, 9):
        for question in draw_questions(rng, scene, 10):
            if question.family in ("shape", "digit"):
                item = scene.objects[question.targets[0]]
                assert question.answer == (item.kind if item.digit is None else str(item.digit))
            if question.family == "count":
                assert len(question.targets) == int(question.answer)


def test_yes_and_no_and_sides_are_balanced():
    rng = np.random.default_rng(10)
    answers = [q.answer for s in scenes(300, 10) for q in draw_questions(rng, s, 8, {"exist": 1, "relation": 1})]
    assert 0.42 < np.mean([a == "yes" for a in answers]) < 0.58
    sides = [q.answer for s in scenes(300, 11) for q in draw_questions(rng, s, 4, {"side": 1})]
    assert all(0.18 < sides.count(word) / len(sides) < 0.32 for word in ("left", "right", "top", "bottom"))


def test_held_out_questions_are_balanced_and_reproducible():
    rows = scene_questions(seed=1, n=80)
    again = scene_questions(seed=1, n=80)
    assert [(r.image_id, r.question, r.answer) for r in rows] == [(r.image_id, r.question, r.answer) for r in again]
    assert len(rows) == 80 and len({r.image_id for r in rows}) >= 80 // 8
    counts = [sum(r.family == family for r in rows) for family in FAMILIES]
    assert max(counts) - min(counts) <= 3
    assert rows[0].image.size == (IMAGE_SIZE, IMAGE_SIZE)
    with pytest.raises(ValueError, match="per_scene"):
        scene_questions(0, 10, per_scene=9)
