"""The shipped tiny-qwen: files, prompts of any size, agreement of the fast paths with stock modules, accuracy."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune.embedded import embedded_models, load_embedded, model_path, scene_questions
from vlmprune.embedded.questions import ANSWERS, HEADLINE_FAMILIES, INSTRUCTION
from vlmprune.embedded.qwen_fast import mrope_tables, prompt_positions, visual_tokens
from vlmprune.embedded.qwen_model import MROPE_SECTION, THETA
from vlmprune.embedded.qwen_processor import build_qwen_tokenizer, qwen_prompt
from vlmprune.embedded.scenes import HELD_OUT, for_size, generate_scene


@pytest.fixture(scope="module")
def tiny():
    return load_embedded("tiny-qwen")


def picture(size, seed=0):
    return Image.fromarray(generate_scene(np.random.default_rng(seed), "test", for_size(HELD_OUT, size)).image)


def ask(tiny, questions, images):
    _, processor = tiny
    return processor(text=[qwen_prompt(q) for q in questions], images=images, padding=True, return_tensors="pt")


def test_loads_with_stock_classes(tiny):
    model, processor = tiny
    assert "tiny-qwen" in embedded_models()
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and not model.training
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith("transformers.")
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    assert load_embedded("tiny-qwen", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_architecture_has_what_policies_meet_in_qwen(tiny):
    vision, text = tiny[0].config.vision_config, tiny[0].config.text_config
    assert vision.depth >= 4 and 0 < len(vision.fullatt_block_indexes) < vision.depth
    assert vision.window_size == 64 and vision.patch_size * vision.spatial_merge_size == 16
    assert text.num_hidden_layers >= 6
    assert 2 * sum(MROPE_SECTION) == text.hidden_size // text.num_attention_heads
    assert tiny[0].generation_config.eos_token_id == text.eos_token_id == tiny[1].tokenizer.eos_token_id
    assert tiny[0].generation_config.pad_token_id == tiny[1].tokenizer.pad_token_id


def test_files_are_small_and_complete():
    folder = model_path("tiny-qwen")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"MODEL_CARD.md", "check.json", "curve.csv", "training.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds():
    built = build_qwen_tokenizer(model_path("tiny-llava") / "tokenizer.json")
    assert json.loads(built.to_str()) == json.loads((model_path("tiny-qwen") / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(224, 224, (14, 14)), (160, 160, (10, 10)), (320, 320, (20, 20)), (256, 160, (10, 16)), (64, 64, (10, 10))],
)
def test_a_picture_keeps_its_size_in_tokens(tiny, width, height, grid):
    inputs = ask(tiny, ["what digit is shown?"], [Image.new("RGB", (width, height))])
    assert inputs["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]]
    assert int((inputs["input_ids"] == tiny[0].config.image_token_id).sum()) == grid[0] * grid[1]


def test_large_pictures_are_limited(tiny):
    inputs = ask(tiny, ["what digit is shown?"], [Image.new("RGB", (1200, 900))])
    assert int((inputs["input_ids"] == tiny[0].config.image_token_id).sum()) <= 400


def test_chat_template_makes_the_training_prompt(tiny):
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    text = tiny[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == qwen_prompt("what color is the circle?")
    assert text == "USER: <|vision_start|><|image_pad|><|vision_end|>\nwhat color is the circle? ASSISTANT:"


def test_every_answer_is_one_token(tiny):
    tokenizer = tiny[1].tokenizer
    start = tokenizer(qwen_prompt("what?"))["input_ids"]
    assert start[0] == tokenizer.bos_token_id
    for word in ANSWERS:
        ids = tokenizer(f"{qwen_prompt('what?')} {word}")["input_ids"]
        assert ids[:-1] == start and tokenizer.decode(ids[-1:]).strip() == word
    assert tokenizer.unk_token_id not in tokenizer(qwen_prompt("what is the red shape?", INSTRUCTION))["input_ids"]


@pytest.mark.parametrize("size", [(224, 224), (160, 256), (320, 160), (192, 192), (176, 208)])
def test_fast_tower_equals_the_stock_tower(tiny, size):
    model, processor = tiny
    images = np.stack([np.asarray(picture(size, seed)) for seed in range(2)])
    pictures = [Image.fromarray(image) for image in images]
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == 2 * [[1, size[0] // 8, size[1] // 8]]
    with torch.no_grad():
        stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        stock = getattr(stock, "pooler_output", stock)
        fast = visual_tokens(model.model.visual, torch.from_numpy(images), torch.float32)
    torch.testing.assert_close(fast.flatten(1, 2), torch.stack(list(stock)), atol=1e-3, rtol=1e-3)


def test_positions_equal_those_of_the_stock_model(tiny):
    for size in ((224, 224), (160, 256), (256, 160)):
        inputs = ask(tiny, ["what color is the circle?"], [picture(size)])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        stock, _ = tiny[0].model.get_rope_index(**{n: inputs[n] for n in names if n in inputs})
        grid = (size[0] // 16, size[1] // 16)
        length = inputs["input_ids"].shape[1] - 3 - grid[0] * grid[1] - 2
        mine = prompt_positions(torch.arange(grid[0] * grid[1])[None], grid, 3, 2, (1, length))
        assert torch.equal(mine, stock)


def test_fast_decoder_equals_the_stock_model(tiny):
    """Logits of the training pass at the answer, for two questions on one picture, all tokens and a third of them."""
    from vlmprune.embedded.fastdecoder import decode

    model, _ = tiny
    questions, image = ["what color is the circle?", "is there a red star?"], picture((160, 256))
    grid, decoder = (10, 16), model.model.language_model
    with torch.no_grad():
        visual = visual_tokens(model.model.visual, torch.from_numpy(np.asarray(image)[None].copy()), torch.float32)
        for question in questions:
            inputs = ask(tiny, [question], [image])
            ids = inputs["input_ids"][0]
            before, tail = ids[:3], ids[3 + 160 :]
            table = decoder.embed_tokens.weight
            prefix = torch.cat([table[before], visual.flatten(1, 2)[0], table[tail[:2]]])[None]
            branches = tail[2:].expand(1, 3, -1)  # equal branches must not see each other
            positions = prompt_positions(torch.arange(160)[None], grid, 3, 2, (3, len(tail) - 2))
            tables = mrope_tables(positions, 32, MROPE_SECTION, THETA, torch.float32)
            fast = decode(decoder, prefix, branches, watch_layer=3, dtype=torch.float32, tables=tables)
            stock = model(**inputs).logits[0, -1]
            for branch in range(3):
                logits = fast.hidden[0, branch, -1] @ table.T
                torch.testing.assert_close(logits, stock, atol=5e-3, rtol=1e-3)


def test_padding_does_not_change_answers(tiny):
    questions = ["what is the red digit?", "does the image contain an orange rectangle?"]
    images = [picture((224, 224), 1), picture((160, 256), 2)]
    with torch.no_grad():
        together = tiny[0](**ask(tiny, questions, images)).logits[:, -1]
        pairs = zip(questions, images, strict=True)
        alone = torch.cat([tiny[0](**ask(tiny, [q], [i])).logits[:, -1] for q, i in pairs])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_training_facts_name_the_aids():
    facts = json.loads((model_path("tiny-qwen") / "training.json").read_text())
    assert facts["training_aids"]["attention_supervision"] == {"decoder_layer": 3, "heads": [0, 1]}
    assert {"distillation", "dense_patch_labels", "decoder_start"} <= set(facts["training_aids"])
    assert (model_path("tiny-qwen") / "curve.csv").read_text().startswith("stage,step,images,seconds,metric,value")


@pytest.mark.parametrize(("size", "bound"), [((224, 224), 0.85), ((160, 160), 0.85), ((320, 320), 0.85)])
def test_held_out_accuracy_stays_above_its_bound(tiny, size, bound):
    """A cheap gate on the shipped weights: 40 unseen headline questions through stock `generate`."""
    model, processor = tiny
    rows = [r for r in scene_questions(seed=5, n=64, size=size) if r.family in HEADLINE_FAMILIES][:40]
    inputs = ask(tiny, [r.question for r in rows], [r.image for r in rows])
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    words = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    accuracy = np.mean([w.strip() == r.answer for w, r in zip(words, rows, strict=True)])
    assert len(rows) == 40 and accuracy >= bound
