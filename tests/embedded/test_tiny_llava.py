"""tiny-llava: loads with stock classes, exact prompt and placeholders, fast passes equal the stock ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune.embedded import embedded_models, load_embedded, model_path, scene_questions
from vlmprune.embedded.fastdecoder import decode
from vlmprune.embedded.fastpath import patchify, project, tower_features, tower_pooled
from vlmprune.embedded.model import vision_tower
from vlmprune.embedded.processor import prompt
from vlmprune.embedded.questions import ANSWERS, HEADLINE_FAMILIES, INSTRUCTION
from vlmprune.embedded.scenes import generate_scene


@pytest.fixture(scope="module")
def tiny():
    return load_embedded("tiny-llava")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return np.stack([generate_scene(rng, "test").image for _ in range(3)])


def test_unknown_name_is_refused_with_the_nearest_one():
    assert "tiny-llava" in embedded_models()
    with pytest.raises(ValueError, match="did you mean 'tiny-llava'"):
        load_embedded("tiny-lava")


def test_loads_with_stock_classes(tiny):
    model, processor = tiny
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith("transformers.")
    assert model.dtype == torch.float32 and not model.training
    assert model.config.text_config.num_hidden_layers >= 6
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    assert load_embedded(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_one_image_becomes_exactly_196_placeholders(tiny):
    model, processor = tiny
    for size in ((224, 224), (64, 64), (300, 500)):
        inputs = processor(text=prompt("what digit is shown?"), images=Image.new("RGB", size), return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 196
        assert inputs["pixel_values"].shape == (1, 3, 224, 224)


def test_chat_template_makes_the_training_prompt(tiny):
    _, processor = tiny
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt("what color is the circle?")
    assert text == "USER: <image>\nwhat color is the circle? ASSISTANT:"


def test_every_answer_is_one_token(tiny):
    tokenizer = tiny[1].tokenizer
    start = tokenizer(prompt("what?"))["input_ids"]
    for word in ANSWERS:
        ids = tokenizer(f"{prompt('what?')} {word}")["input_ids"]
        assert ids[:-1] == start and tokenizer.decode(ids[-1:]).strip() == word
    assert tokenizer.unk_token_id not in tokenizer(prompt("what is the red shape?", INSTRUCTION))["input_ids"]


def test_fast_tower_equals_the_stock_tower(tiny, images):
    model, processor = tiny
    pixels = processor.image_processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    tower = vision_tower(model)
    with torch.no_grad():
        stock = model.model.vision_tower(pixels, output_hidden_states=True)
        exact = tower_features(tower, patchify(torch.from_numpy(images)), dtype=torch.float32)
        torch.testing.assert_close(exact, stock.hidden_states[-2], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(tower_pooled(tower, exact, torch.float32), stock.pooler_output, atol=2e-4, rtol=2e-4)
        visual = model.model.multi_modal_projector(stock.hidden_states[-2][:, 1:])
        mine = project(model.model.multi_modal_projector, exact[:, 1:], torch.float32)
        torch.testing.assert_close(mine, visual, atol=2e-3, rtol=2e-3)


def test_fast_decoder_equals_the_stock_decoder(tiny):
    decoder = tiny[0].model.language_model
    generator = torch.Generator().manual_seed(0)
    prefix = 0.5 * torch.randn(2, 20, 128, generator=generator)
    branches = torch.randint(5, 450, (2, 3, 7), generator=generator)
    with torch.no_grad():
        fast = decode(decoder, prefix, branches, watch_layer=2, dtype=torch.float32)
        for row in range(2):
            for branch in range(3):
                embeds = torch.cat([prefix[row], decoder.embed_tokens(branches[row, branch])])[None]
                stock = decoder(inputs_embeds=embeds).last_hidden_state[0, 20:]
                torch.testing.assert_close(fast.hidden[row, branch], stock, atol=2e-4, rtol=2e-3)


def test_training_facts_name_the_aids():
    facts = json.loads((model_path() / "training.json").read_text())
    assert facts["training_aids"]["attention_supervision"] == {"decoder_layer": 2, "heads": [0, 1]}
    assert (model_path() / "curve.csv").read_text().startswith("stage,step,images,seconds,metric,value")


def test_held_out_accuracy_stays_above_its_bound(tiny):
    """A cheap gate on the shipped weights: 60 unseen headline questions through stock `generate`."""
    model, processor = tiny
    rows = [r for r in scene_questions(seed=5, n=84) if r.family in HEADLINE_FAMILIES][:60]
    inputs = processor(
        text=[prompt(r.question) for r in rows],
        images=[r.image for r in rows],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    words = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    accuracy = np.mean([w.strip() == r.answer for w, r in zip(words, rows, strict=True)])
    assert len(rows) == 60 and accuracy >= 0.90
