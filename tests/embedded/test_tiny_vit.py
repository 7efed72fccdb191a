"""The shipped tiny-vit: files, stock timm, starting weights, training pass, accuracy."""

import builtins
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")

import timm

from vlmprune.core.errors import InputError
from vlmprune.embedded import digit_picture, embedded_models, load_embedded, model_path
from vlmprune.embedded.fastpath import patchify
from vlmprune.embedded.model import vision_tower
from vlmprune.embedded.train.common import StageSettings
from vlmprune.embedded.train.vit import choose_patches, patch_labels, train_vit
from vlmprune.embedded.vit_check import check, logits_of
from vlmprune.embedded.vit_fast import vit_features, vit_logits
from vlmprune.embedded.vit_files import export_vit, load_vit
from vlmprune.embedded.vit_model import split_blocks, vit_from_tower


@pytest.fixture(scope="module")
def tiny():
    return load_embedded("tiny-vit")


@pytest.fixture(scope="module")
def llava():
    return load_embedded("tiny-llava")


def pictures(n, seed=0):
    return [Image.fromarray(digit_picture(number, "test", seed).image) for number in range(n)]


def test_loads_as_a_stock_timm_model(tiny):
    model, transform = tiny
    assert "tiny-vit" in embedded_models()
    assert type(model) is timm.models.vision_transformer.VisionTransformer and not model.training
    assert len(model.blocks) == 12 and model.num_classes == len(transform.labels) == 10
    assert model.patch_embed.num_patches == 196 and model.num_prefix_tokens == 1 and model.global_pool == "token"
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert load_embedded("tiny-vit", dtype=torch.bfloat16)[0].head.weight.dtype == torch.bfloat16


def test_timm_reads_the_folder_by_itself(tiny):
    theirs = timm.create_model(f"local-dir:{model_path('tiny-vit')}", pretrained=True).eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, tiny[0].state_dict()[name]), name
    settings = timm.data.resolve_model_data_config(theirs)
    assert settings == timm.data.resolve_model_data_config(tiny[0])
    transform = timm.data.create_transform(**settings, is_training=False)
    for size in ((224, 224), (300, 260), (190, 401), (224, 300)):
        image = pictures(1)[0].resize(size)
        torch.testing.assert_close(tiny[1](image)[0], transform(image), atol=1e-5, rtol=0)


def test_the_transform_takes_one_picture_or_several_of_any_mode(tiny):
    several = pictures(2)
    batch = tiny[1](several)
    assert batch.shape == (2, 3, 224, 224) and batch.dtype == torch.float32
    assert torch.equal(tiny[1](several[1]), batch[1:])
    assert tiny[1]([several[0].convert("L"), several[1].convert("RGBA")]).shape == batch.shape


def test_files_are_small_and_complete():
    folder = model_path("tiny-vit")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"MODEL_CARD.md", "check.json", "config.json", "curve.csv", "training.json", "model.safetensors"}
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    facts = json.loads((folder / "training.json").read_text())
    assert {"start", "patch_labels", "fewer_patches"} == set(facts["training_aids"])


def test_a_tower_becomes_a_timm_model_with_the_same_features(llava):
    model, processor = llava
    tower = vision_tower(model)
    pixels = processor.image_processor(images=pictures(3), return_tensors="pt")["pixel_values"]
    vit = vit_from_tower(tower)
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True)
        blocks = vit.forward_intermediates(pixels, norm=False, output_fmt="NLC", intermediates_only=True)
        for number, block in enumerate(blocks):
            torch.testing.assert_close(block, stock.hidden_states[number + 1][:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vit.forward_features(pixels)[:, 0], stock.pooler_output, atol=1e-5, rtol=1e-5)
        assert not vit(pixels).any()


def test_split_blocks_share_out_the_mlp_and_keep_the_attention(llava):
    vit = vit_from_tower(vision_tower(llava[0]))
    deep = split_blocks(vit)
    x, block = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0)), vit.blocks[1]
    first, second = deep.blocks[2], deep.blocks[3]
    with torch.no_grad():
        torch.testing.assert_close(first.mlp(x) + second.mlp(x), block.mlp(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(first.attn(first.norm1(x)), block.attn(block.norm1(x)))
        assert not second.attn(second.norm1(x)).any()
    assert len(deep.blocks) == 12 and torch.equal(deep.pos_embed, vit.pos_embed)


def test_fast_pass_equals_the_stock_model(tiny):
    model, transform = tiny
    images = pictures(3, seed=4)
    raw = patchify(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    index = torch.from_numpy(np.sort(np.argsort(np.random.default_rng(0).random((3, 196)))[:, :60]))
    some = raw.gather(1, index[..., None].expand(-1, -1, 768))
    with torch.no_grad():
        fast = vit_logits(model, vit_features(model, raw, None, torch.float32), torch.float32)
        torch.testing.assert_close(fast, model(transform(images)), atol=2e-3, rtol=1e-3)
        fast = vit_logits(model, vit_features(model, some, index, torch.float32), torch.float32)
        torch.testing.assert_close(fast, logits_of(model, transform(images), index), atol=2e-3, rtol=1e-3)


def test_training_patches_hold_the_digit_and_labels_follow_coverage():
    some = [digit_picture(number, "train") for number in range(8)]
    chosen = choose_patches(np.random.default_rng(0), some, 98)
    assert chosen.shape == (8, 98) and (np.diff(chosen, axis=1) > 0).all()
    for row, picture in zip(chosen, some, strict=True):
        coverage, labels = picture.coverage.reshape(-1), patch_labels(picture)
        assert set(np.flatnonzero(picture.patches)) <= set(row)
        assert (labels[coverage >= 0.3] == picture.label).all() and (labels[coverage == 0] == 10).all()
        assert (labels[(coverage > 0) & (coverage < 0.3)] == -100).all()


def test_the_stage_stops_resumes_and_exports(tmp_path):
    settings = StageSettings(minutes=0.005, batch=2, eval_scenes=10)
    train_vit(0, 1, tmp_path, settings)
    first = torch.load(tmp_path / "vit.pt", weights_only=True)
    train_vit(0, 1, tmp_path, dataclasses.replace(settings, minutes=0.015))
    second = torch.load(tmp_path / "vit.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and first["elapsed"] < second["elapsed"]
    assert not torch.equal(first["values"], second["values"])
    from vlmprune.embedded.train.cli import export_vit_run

    export_vit_run(tmp_path, tmp_path / "made", seed=0)
    model, _ = load_vit(tmp_path / "made")
    flat = torch.cat([value.flatten() for value in model.parameters()])
    averages = second["average"][: flat.numel()].to(torch.float16).float()
    assert torch.equal(flat, averages)
    facts = json.loads((tmp_path / "made" / "training.json").read_text())
    assert facts["model"] == "tiny-vit" and facts["stages"]["vit"]["steps"] == second["step"]


def test_export_and_load_give_the_weights_in_half_precision(tiny, tmp_path):
    export_vit(tiny[0], tmp_path)
    again, _ = load_vit(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny[0].state_dict().items())


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "timm" or name.startswith("timm."):
            raise ImportError("no timm here")
        return real(name, *rest, **options)

    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: without(name))
    with pytest.raises(InputError, match=r"pip install vlmprune\[vit\]"):
        load_embedded("tiny-vit")


def test_it_is_no_vision_language_model():
    from vlmprune.loading import load_model

    with pytest.raises(InputError, match="classifies images"):
        load_model("tiny-vit")


def test_held_out_accuracy_hangs_on_the_patches_of_the_digit():
    """A cheap gate on the shipped weights: unseen pictures, and what is left without the digit's or random patches."""
    found = check(model_path("tiny-vit"), n=150, seed=7, subsets=50)
    assert found["digits"]["all"]["right"] >= 0.91 * 150
    patches = {name: row["right"] / row["n"] for name, row in found["patches"].items()}
    assert patches["all but the digit's patches"] < 0.3 and patches["the digit's patches alone"] > 0.85
    assert patches["all patches"] > 0.85 > patches["98 random patches"] > patches["20 random patches"]
