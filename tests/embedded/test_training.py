"""Training code: labels, token packing, and a stage that stops and resumes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from vlmprune.embedded import model_path
from vlmprune.embedded.bank import SHAPES
from vlmprune.embedded.model import build_model, vision_tower
from vlmprune.embedded.processor import build_tokenizer, prompt
from vlmprune.embedded.scenes import GRID, Scene, generate_scene
from vlmprune.embedded.train.align import WORDS, word_targets
from vlmprune.embedded.train.batches import ALL, Encoder, choose_tokens, make_batch
from vlmprune.embedded.train.common import StageSettings, learning_rate
from vlmprune.embedded.train.decoder import train_decoder
from vlmprune.embedded.train.labels import ALL_COLOURS, N_KINDS, Labels
from vlmprune.embedded.train.scene_cache import Entry
from vlmprune.embedded.train.tower import train_tower


@pytest.fixture(scope="module")
def encoder():
    return Encoder(AutoTokenizer.from_pretrained(model_path()))


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds():
    built = json.loads(build_tokenizer().to_str())
    assert built == json.loads((model_path() / "tokenizer.json").read_text())


def entries(n, seed=0):
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = [generate_scene(rng) for _ in range(n)]
    return [Entry(scene.patch_object.reshape(-1), scene=scene) for scene in scenes]


def test_patch_labels_agree_with_the_objects():
    scene = generate_scene(np.random.default_rng(2))
    labels = Labels(1)
    labels.fill_scene(0, scene)
    for number, item in enumerate(scene.objects):
        own = scene.patch_object.reshape(-1) == number
        kind = SHAPES.index(item.kind) if item.digit is None else len(SHAPES) + item.digit
        assert own.any() and (labels.kind[0][own] == kind).all()
        assert (labels.colour[0][own] == ALL_COLOURS.index(item.colour)).all()
    assert (labels.kind[0][scene.patch_object.reshape(-1) < 0] == N_KINDS).all()


def test_a_branch_is_the_full_prompt_cut_after_the_newline(encoder):
    ids, answer = encoder.branch("what color is the circle?", "red")
    full = encoder.tokenizer(prompt("what color is the circle?") + " red")["input_ids"]
    placeholder = encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert [*encoder.before, placeholder, *encoder.after, *ids, answer] == full


def test_batch_puts_the_answer_after_the_prompt_and_focus_on_its_object(encoder):
    rows, rng = entries(4), np.random.default_rng(3)
    kept = choose_tokens(rng, np.stack([row.owner for row in rows]), progress=0.0)
    batch = make_batch(rng, encoder, rows, 6, ALL, kept, instruction=False)
    following = batch.ids.gather(2, batch.place[..., None] + 1)[..., 0]
    assert torch.equal(following, batch.answers)
    assert batch.focus.shape == (4, 6, 2, kept.shape[1])
    for b, row in enumerate(rows):
        on_background = torch.from_numpy(row.owner[kept[b]] < 0)
        assert not batch.focus[b, :, :, on_background].any()
        for q, family in enumerate(batch.families[b]):
            if family in ("shape", "colour", "digit", "digit_colour", "side"):
                owners = set(row.owner[kept[b]][batch.focus[b, q, 0].numpy()].tolist())
                assert len(owners) <= 1


def test_chosen_tokens_are_ascending_and_distinct():
    rng = np.random.default_rng(4)
    owners = np.stack([row.owner for row in entries(3)])
    for progress in (0.0, 0.5, 0.9):
        for _ in range(10):
            kept = choose_tokens(rng, owners, progress)
            assert (np.diff(kept, axis=1) > 0).all() and kept.max() < GRID * GRID


def test_word_targets_describe_the_object_on_a_patch():
    row = entries(1, seed=6)[0]
    targets = word_targets(row)
    for patch in range(GRID * GRID):
        words = {WORDS[i] for i in np.flatnonzero(targets[patch])}
        if row.owner[patch] < 0:
            assert not words
        else:
            item = row.scene.objects[row.owner[patch]]
            assert {item.colour, item.kind} <= words and len(words & {"left", "right"}) == 1


def test_learning_rate_warms_up_and_decays():
    settings = StageSettings(minutes=1, lr=1e-3, warmup=10, floor=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(1e-4)
    assert learning_rate(settings, 100, 0.0) == pytest.approx(1e-3)
    assert learning_rate(settings, 100, 1.0) == pytest.approx(1e-4)


def test_tower_stage_stops_and_resumes(tmp_path):
    settings = StageSettings(minutes=0.005, batch=2, eval_scenes=4)
    train_tower(0, 1, tmp_path, settings)
    first = torch.load(tmp_path / "tower.pt", weights_only=True)
    train_tower(0, 1, tmp_path, dataclasses.replace(settings, minutes=0.02))
    second = torch.load(tmp_path / "tower.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and first["elapsed"] < second["elapsed"]
    assert not torch.equal(first["values"], second["values"])
    assert (tmp_path / "curve.csv").read_text().count("\n") > 8


def test_decoder_stage_runs_from_an_aligned_start(tmp_path, encoder):
    settings = StageSettings(minutes=0.01, batch=4, eval_scenes=2, cache=8)
    model = build_model(0)
    tower_before = vision_tower(model).embeddings.patch_embedding.weight.clone()
    projector_before = model.model.multi_modal_projector.linear_1.weight.clone()
    train_decoder(0, 1, tmp_path, settings, model, encoder.tokenizer)
    state = torch.load(tmp_path / "decoder.pt", weights_only=True)
    assert state["step"] > 0 and state["images"] == 4 * state["step"]
    assert torch.equal(vision_tower(model).embeddings.patch_embedding.weight, tower_before)  # frozen
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, projector_before)
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert {row.split(",")[4] for row in rows[1:]} >= {"loss", "mass", "shape", "relation", "random22"}
