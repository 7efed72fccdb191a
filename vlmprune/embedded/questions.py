"""Questions about a scene, with the answer and the objects that decide it.

Families: shape, colour, digit, digit_colour, side, count, exist, relation. A question is only asked where its
answer follows from the object list without doubt (a unique colour, a unique shape, a clear distance).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlmprune.core.errors import InputError

from .bank import SHAPES
from .scenes import COLOURS, DIGIT, KINDS, Scene, SceneObject

T = TypeVar("T")
FAMILIES = ("shape", "colour", "digit", "digit_colour", "side", "count", "exist", "relation")
HEADLINE_FAMILIES = ("shape", "colour", "digit", "digit_colour", "side", "exist")
INSTRUCTION = "\nAnswer the question using a single word or phrase."
SIDE_MARGIN = 14  # pixels from the middle of the image
RELATION_MARGIN = 20  # pixels between two centres
MAX_COUNT = 4
COUNT_WEIGHT = (1.0, 1.0, 1.2, 3.0, 6.0)  # larger counts are rarer in scenes, so prefer them where they occur


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        family: one of `FAMILIES`.
        text: lower-case English.
        answer: a single word.
        targets: indices of the objects that decide the answer; empty where none does.
        second: for `relation`, the index of the object of reference; otherwise equal to `targets`.
    """

    family: str
    text: str
    answer: str
    targets: tuple[int, ...] = ()
    second: tuple[int, ...] = ()


def ask(rng: np.random.Generator, scene: Scene, family: str) -> Question | None:
    """Draw a question of one family, or None where the scene allows none.

    Raises:
        InputError: unknown family.
    """
    if family not in _ASK:
        raise InputError(f"unknown question family {family!r}; choose one of {', '.join(FAMILIES)}")
    return _ASK[family](rng, scene)


def draw_questions(
    rng: np.random.Generator, scene: Scene, count: int, weights: dict[str, float] | None = None
) -> list[Question]:
    """Draw `count` questions (fewer where the scene allows too few); families by `weights`, equal without.

    Repeats are possible, as for training batches.
    """
    names = list(weights) if weights else list(FAMILIES)
    share = np.asarray([weights[n] for n in names] if weights else [1.0] * len(names))
    picks = rng.choice(len(names), size=3 * count, p=share / share.sum())
    found: list[Question] = []
    for pick in picks:
        question = ask(rng, scene, names[int(pick)])
        if question is not None:
            found.append(question)
        if len(found) == count:
            break
    return found


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _name(item: SceneObject) -> tuple[str, str]:
    return item.colour, item.kind


def _unique(keys: list) -> list[int]:
    """Positions of the keys that occur once."""
    counts = Counter(keys)
    return [i for i, key in enumerate(keys) if counts[key] == 1]


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    options = [i for i in _unique([o.colour for o in scene.objects]) if scene.objects[i].kind != DIGIT]
    if not options:
        return None
    i = _pick(rng, options)
    templates = ("what shape is {}?", "what is the {} shape?", "what shape is the {} object?")
    text = _pick(rng, templates).format(scene.objects[i].colour)
    return Question("shape", text, scene.objects[i].kind, (i,), (i,))


def _ask_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    options = [i for i in _unique([o.kind for o in scene.objects]) if scene.objects[i].kind != DIGIT]
    if not options:
        return None
    i = _pick(rng, options)
    text = _pick(rng, ("what color is the {}?", "what is the color of the {}?")).format(scene.objects[i].kind)
    return Question("colour", text, scene.objects[i].colour, (i,), (i,))


def _ask_digit(rng: np.random.Generator, scene: Scene) -> Question | None:
    digits = [i for i, o in enumerate(scene.objects) if o.kind == DIGIT]
    if not digits:
        return None
    if len(digits) == 1 and rng.random() < 0.5:
        i = digits[0]
        text = _pick(rng, ("what digit is shown?", "what digit is in the image?"))
    else:
        colours = [scene.objects[i].colour for i in digits]
        options = [digits[j] for j in _unique(colours)]
        if not options:
            return None
        i = _pick(rng, options)
        text = _pick(rng, ("what is the {} digit?", "what digit is {}?")).format(scene.objects[i].colour)
    return Question("digit", text, str(scene.objects[i].digit), (i,), (i,))


def _ask_digit_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    values = [o.digit if o.digit is not None else -1 for o in scene.objects]
    options = [i for i in _unique(values) if values[i] >= 0]
    if not options:
        return None
    i = _pick(rng, options)
    text = _pick(rng, ("what color is the digit {}?", "what is the color of the {}?")).format(values[i])
    return Question("digit_colour", text, scene.objects[i].colour, (i,), (i,))


def _ask_side(rng: np.random.Generator, scene: Scene) -> Question | None:
    axis = int(rng.integers(2))  # 0: left or right, 1: top or bottom
    middle = scene.size[1 - axis] / 2
    by_colour = rng.random() < 0.5
    keys = [o.colour if by_colour else _name(o) for o in scene.objects]
    far = [i for i in _unique(keys) if abs(scene.objects[i].centre[axis] - middle) >= SIDE_MARGIN]
    if not far:
        return None
    # Choose the side first, so that the answers balance.
    want_high = bool(rng.integers(2))
    options = [i for i in far if (scene.objects[i].centre[axis] > middle) == want_high] or far
    i = _pick(rng, options)
    item = scene.objects[i]
    thing = f"{item.colour} object" if by_colour else f"{item.colour} {item.kind}"
    words = (("left", "right"), ("top", "bottom"))[axis]
    place = ("on the left or right", "at the top or bottom")[axis]
    answer = words[int(item.centre[axis] > middle)]
    return Question("side", f"is the {thing} {place}?", answer, (i,), (i,))


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    by_answer: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for kind in KINDS:
        hits = tuple(i for i, o in enumerate(scene.objects) if o.kind == kind)
        by_answer.setdefault(len(hits), []).append((plural(kind), hits))
    for colour in COLOURS:
        hits = tuple(i for i, o in enumerate(scene.objects) if o.colour == colour)
        by_answer.setdefault(len(hits), []).append((f"{colour} objects", hits))
    values = [v for v in sorted(by_answer) if v <= MAX_COUNT]
    weight = np.asarray([COUNT_WEIGHT[v] for v in values])
    value = values[int(rng.choice(len(values), p=weight / weight.sum()))]
    thing, hits = _pick(rng, by_answer[value])
    text = _pick(rng, ("how many {} are there?", "how many {} are in the image?")).format(thing)
    return Question("count", text, str(value), hits, hits)


def _ask_exist(rng: np.random.Generator, scene: Scene) -> Question | None:
    present = {_name(o) for o in scene.objects}
    if not present:
        return None
    if rng.random() < 0.5:
        colour, kind = _name(_pick(rng, list(scene.objects)))
    else:
        # Both the colour and the kind occur, but not together: neither alone gives the answer away.
        absent = sorted({(a.colour, b.kind) for a in scene.objects for b in scene.objects} - present)
        if not absent:
            return None
        colour, kind = _pick(rng, absent)
    hits = tuple(i for i, o in enumerate(scene.objects) if _name(o) == (colour, kind))
    thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"
    text = _pick(rng, ("is there {}?", "is there {} in the image?", "does the image contain {}?")).format(thing)
    return Question("exist", text, "yes" if hits else "no", hits, hits)


def _ask_relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    named = _unique([_name(o) for o in scene.objects])
    if len(named) < 2:
        return None
    order = rng.permutation(named).tolist()
    axis = int(rng.integers(2))
    for first, second in zip(order, order[1:], strict=False):
        a, b = scene.objects[first], scene.objects[second]
        gap = a.centre[axis] - b.centre[axis]
        if abs(gap) < RELATION_MARGIN:
            continue
        negative = bool(rng.integers(2))  # "left of" or "above"
        words = (("left of", "right of"), ("above", "below"))[axis][0 if negative else 1]
        text = f"is the {a.colour} {a.kind} {words} the {b.colour} {b.kind}?"
        return Question("relation", text, "yes" if (gap < 0) == negative else "no", (first,), (second,))
    return None


def plural(kind: str) -> str:
    """English plural of a kind."""
    return kind + ("es" if kind.endswith("s") else "s")


_ASK: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "shape": _ask_shape,
    "colour": _ask_colour,
    "digit": _ask_digit,
    "digit_colour": _ask_digit_colour,
    "side": _ask_side,
    "count": _ask_count,
    "exist": _ask_exist,
    "relation": _ask_relation,
}
ANSWERS = (
    *SHAPES, *COLOURS, "gray", "teal", "brown", *map(str, range(10)), "yes", "no",
    "left", "right", "top", "bottom",
)  # fmt: skip
