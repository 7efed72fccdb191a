"""The code of docs/qwen2_5_vl.md runs as it stands, on a random-weight model of that class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

import vlmprune

PAGE = Path(__file__).parents[2] / "docs" / "qwen2_5_vl.md"


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading gives a model of the class with random weights, and a processor that fits it."""
    model, processor = vlmprune.load_embedded("tiny-qwen")

    def load_model(name: str, **options: Any) -> Any:
        config = model.config
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()

    monkeypatch.setattr(transformers.Qwen2_5_VLForConditionalGeneration, "from_pretrained", load_model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: processor)
    monkeypatch.chdir(tmp_path)


def test_the_page_runs(offline: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names: dict[str, Any] = {"image": Image.effect_noise((224, 160), 90).convert("RGB")}
    blocks = code_blocks()
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "kept.png").is_file()
    [counts] = [line for line in printed if "->" in line]
    before, after = (int(n) for n in re.findall(r"\d+", counts))
    assert after == round(before * 0.33)
    batch = [line for line in printed if re.fullmatch(r"\(\d+, \d+, \d+\)", line)]
    assert batch and batch[0].endswith(" 0)")
    assert isinstance(names["model"], transformers.Qwen2_5_VLForConditionalGeneration)
    down = re.findall(r"\d+", printed[-1])
    assert int(down[0]) < before  # as far as the smallest size that the processor makes
    assert not names["model"].__dict__.get("_vlmprune")


def test_every_policy_on_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Which policy") :]
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert named and named <= set(vlmprune.available())
