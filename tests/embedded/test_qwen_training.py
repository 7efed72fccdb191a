"""Training code of tiny-qwen: crops and mosaics, the position layer, stages that stop and resume."""

import dataclasses

import numpy as np
import pytest
import torch

from vlmprune.embedded import scene_questions
from vlmprune.embedded.questions import ask
from vlmprune.embedded.qwen_model import CELL, VISION_END_ID, VISION_START_ID, build_model
from vlmprune.embedded.scenes import HELD_OUT, for_size, generate_scene
from vlmprune.embedded.train import qwen_start, qwen_teacher
from vlmprune.embedded.train.common import StageSettings
from vlmprune.embedded.train.labels import N_KINDS
from vlmprune.embedded.train.qwen_decoder import train_qwen_decoder
from vlmprune.embedded.train.qwen_tower import PictureCache, draw_batch, train_qwen_tower


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run with a cheaply fitted teacher."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_teacher, "FIT_SCENES", 24)
        patch.setattr(qwen_teacher, "FIT_EASY", 8)
        patch.setattr(qwen_teacher, "PROBE_STEPS", 40)
        teacher = qwen_teacher.make_teacher(out / "teacher.pt")
    return out, teacher


def test_scenes_of_other_sizes_stay_inside_and_fit_their_grid():
    for size in ((160, 160), (320, 320), (160, 256)):
        scene = generate_scene(np.random.default_rng(1), "test", for_size(HELD_OUT, size))
        assert scene.image.shape == (*size, 3) and scene.size == size
        assert scene.patch_object.shape == (size[0] // 16, size[1] // 16)
        assert all(o.bbox[2] <= size[1] and o.bbox[3] <= size[0] for o in scene.objects)


def test_sides_are_told_from_the_middle_of_the_picture():
    rng, size, answers = np.random.default_rng(2), (160, 320), set()
    for _ in range(60):
        scene = generate_scene(rng, "test", for_size(HELD_OUT, size))
        question = ask(rng, scene, "side")
        if question is not None:
            x, y = scene.objects[question.targets[0]].centre
            expected = ("left" if x < 160 else "right") if "left" in question.text else ("top" if y < 80 else "bottom")
            assert question.answer == expected
            answers.add(question.answer)
    assert answers == {"left", "right", "top", "bottom"}


def test_questions_of_a_size_out_of_range_are_refused():
    assert scene_questions(n=2, size=(160, 256))[0].image.size == (256, 160)
    for size in ((100, 224), (64, 224), (224, 400)):
        with pytest.raises(ValueError, match="multiples of 16"):
            scene_questions(n=2, size=size)


def test_the_teacher_without_places_is_read_by_its_probe(run):
    _, teacher = run
    rng = np.random.default_rng(3)
    scene = generate_scene(rng, "train")
    centres = torch.from_numpy(qwen_teacher.patch_centres(scene))
    targets = teacher.targets(scene.image[None], centres[None])[0]
    full = teacher.features(scene.image[None])[0]
    torch.testing.assert_close(full - targets, centres @ teacher.place)
    assert teacher.place.norm(dim=1).min() > 5  # features do tell where things are


def test_crops_and_mosaics_carry_the_labels_of_their_pixels(run):
    _, teacher = run
    cache, rng = PictureCache(teacher, 6), np.random.default_rng(4)
    cache.renew(rng, 6, crowded=0.5)
    for rows, columns in ((8, 8), (14, 14), (20, 12)):
        batch = draw_batch(rng, cache, rows, columns)
        assert batch.images.shape[1:3] == (rows * CELL, columns * CELL)
        for row in range(min(3, len(batch.images))):
            y, x = np.argwhere(batch.kind[row] != N_KINDS)[0]
            cell = batch.images[row, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
            found = [
                (slot, r, c)
                for slot in range(6)
                for r in range(14)
                for c in range(14)
                if np.array_equal(cache.images[slot, r * CELL : (r + 1) * CELL, c * CELL : (c + 1) * CELL], cell)
            ]
            assert found
            slot, r, c = found[0]
            assert batch.kind[row, y, x] == cache.kinds[slot][cache.owner[slot, r, c]]
            torch.testing.assert_close(batch.targets[row, y, x], cache.targets[slot, r, c].float())


def test_objects_that_a_crop_cuts_do_not_count(run):
    _, teacher = run
    cache, rng = PictureCache(teacher, 3), np.random.default_rng(5)
    cache.renew(rng, 3, crowded=1.0)
    cut = 0
    for _ in range(20):
        slot, rows, columns, whole = cache.piece(rng, 6, 6)
        for box, inside in zip(cache.boxes[slot], whole, strict=True):
            edges = (columns.start, rows.start, columns.stop, rows.stop)
            x0, y0, x1, y1 = (CELL * edge for edge in edges)
            assert inside == (box[0] >= x0 and box[1] >= y0 and box[2] <= x1 and box[3] <= y1)
        cut += int((~whole).sum())
    assert cut > 20


def test_the_decoder_starts_as_tiny_llavas(run):
    from vlmprune.embedded import load_embedded

    model, source = build_model(0), load_embedded("tiny-llava")[0].model.language_model
    qwen_start.transplant(model)
    new = model.model.language_model
    assert torch.equal(new.layers[3].self_attn.q_proj.weight, source.layers[2].self_attn.q_proj.weight)
    assert not new.layers[3].self_attn.q_proj.bias.any()
    assert torch.equal(new.embed_tokens.weight[:456], source.embed_tokens.weight[:456])
    assert VISION_START_ID == 456 and VISION_END_ID == 457


def test_the_first_layer_learns_places_and_the_stages_resume(run, monkeypatch):
    out, teacher = run
    tokenizer = qwen_start.load_tokenizer()
    model = qwen_start.start_decoder(out, tokenizer, steps=80)
    ids, rng = qwen_start.prompt_ids(tokenizer), np.random.default_rng(6)
    place, scene = teacher.place, generate_scene(rng)
    centres = torch.from_numpy(qwen_teacher.patch_centres(scene))[None]
    features = teacher.targets(scene.image[None], centres)[0]
    data = qwen_start.PositionData(model, features, place, torch.arange(5, 400))
    x, layout, target = data.draw(rng, ids)
    with torch.no_grad():
        change = qwen_start.decoder_layer(model.model.language_model.layers[0], x, layout, 4, torch.float32)[0] - x
    visual = slice(qwen_start.BEFORE, layout.n_prefix - qwen_start.AFTER)
    shown, wanted = (change[:, visual] @ place.T).flatten(0, 1), (target[:, visual] @ place.T).flatten(0, 1)
    for axis in range(2):
        assert np.corrcoef(shown[:, axis].numpy(), wanted[:, axis].numpy())[0, 1] > 0.8
    assert change[:, layout.n_prefix :].abs().mean() < 0.5 * change[:, visual].abs().mean()

    settings = StageSettings(minutes=0.01, batch=4, eval_scenes=3, cache=8)
    train_qwen_tower(0, 1, out, settings)
    first = torch.load(out / "qwen_tower.pt", weights_only=True)
    train_qwen_tower(0, 1, out, dataclasses.replace(settings, minutes=0.03))
    second = torch.load(out / "qwen_tower.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and not torch.equal(first["values"], second["values"])

    monkeypatch.setattr("vlmprune.embedded.train.qwen_decoder.EVAL_SIZES", ((224, 224), (160, 160)))
    model = qwen_start.load_start(out)
    before = {name: p.clone() for name, p in model.model.visual.named_parameters()}
    train_qwen_decoder(0, 1, out, settings, model, tokenizer)
    state = torch.load(out / "qwen_decoder.pt", weights_only=True)
    assert state["step"] > 0
    changed = {name for name, p in model.model.visual.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("merger.") for name in changed)  # blocks are frozen
    metrics = {row.split(",")[4] for row in (out / "curve.csv").read_text().splitlines()[1:]}
    assert metrics >= {"distance", "digit", "loss", "mass", "relation", "random22", "mean160", "side160"}
