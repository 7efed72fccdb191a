"""Artefacts survive their file and refuse what they were not made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import contexts
import pytest

from vlmprune.core.artefact import Artefact, Trial, model_facts, read_artefact, write_artefact
from vlmprune.core.errors import InputError


def made(**changes: Any) -> Artefact:
    fields: dict[str, Any] = {
        "policy": "vflowopt",
        "settings": {"keep": 0.25, "layer": -1},
        "model": model_facts(contexts.LLAVA),
        "best": {"t": 1.5},
        "value": 2.5,
        "calls": 3,
        "seed": 0,
        "samples": 3,
        "data": "d",
        "history": [Trial(settings={"t": 1.5}, measured={"objective": 2.5})],
    }
    return Artefact(**{**fields, **changes})


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write_artefact(made(value=0.1), path)
    write_artefact(made(), path)
    assert read_artefact(path) == made()
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"policy": "vflowopt"}', '{"format": "other"}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.json"
    with pytest.raises(InputError, match="does not exist"):
        read_artefact(path)
    path.write_text(text)
    with pytest.raises(InputError, match="is no calibration artefact"):
        read_artefact(path)


def test_unknown_versions_and_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    for change in ('"version":2', '"version":1,"extra":1'):
        path.write_text(made().model_dump_json().replace('"version":1', change))
        with pytest.raises(InputError, match="is no calibration artefact"):
            read_artefact(path)


def test_what_it_was_made_for() -> None:
    made().check_policy("vflowopt", {"keep": 0.25, "layer": -1})
    with pytest.raises(InputError, match="one of 'vflowopt', not of 'other'"):
        made().check_policy("other", {})
    with pytest.raises(InputError, match="calibrated for keep=0.25, not 0.5; give keep=0.25, or calibrate again"):
        made().check_policy("vflowopt", {"keep": 0.5})
    with pytest.raises(InputError, match="no result yet"):
        made(best={}).check_policy("vflowopt", {})
    made().check_model(contexts.LLAVA)
    with pytest.raises(InputError, match="another model .text_depth 32, not 28.; calibrate this one"):
        made().check_model(replace(contexts.LLAVA, text_depth=28))
    with pytest.raises(InputError, match="class LlavaForConditionalGeneration, not Other"):
        made().check_model(replace(contexts.LLAVA, model_class="Other"))
