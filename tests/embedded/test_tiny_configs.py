"""Random-weight LLaVA builders: every pair runs, seeds matter, the global generator stays untouched."""

import pytest
import torch

from vlmprune.embedded.tiny_configs import IMAGE_TOKEN_ID, random_inputs, random_llava


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_every_pair_runs_and_generates(vision, text):
    model = random_llava(vision, text, text_layers=2, kv_heads=2)
    inputs = random_inputs(model, batch=2)
    assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == 2 * 16
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (2, 23, 64) and bool(torch.isfinite(logits).all()) and not model.training
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 23


def test_image_size_changes_the_number_of_tokens():
    model = random_llava(image_size=48, text_layers=1)
    assert random_inputs(model)["input_ids"].shape[1] == 3 + 36 + 4
    with torch.no_grad():
        assert model(**random_inputs(model)).logits.shape[1] == 43


def test_seed_decides_the_weights_and_spares_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = random_llava(seed=1), random_llava(seed=1), random_llava(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="clip"):
        random_llava("dino")
    with pytest.raises(ValueError, match="llama"):
        random_llava(text="gpt2")
    with pytest.raises(ValueError, match="multiple"):
        random_llava(image_size=30)
