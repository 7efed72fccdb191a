"""`vlmprune bench vit`: a small model end to end, against independent counts, and bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vlmprune.cli import main

timm = pytest.importorskip("timm")

from vlmprune.evaluation.bench import bench_vit  # noqa: E402
from vlmprune.evaluation.bench.textbook_tome import TextbookToMe, merge  # noqa: E402

SMALL = ("--model", "test_vit", "--batch", "2", "--repeats", "2", "--device", "cpu")


def printed(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(argv) == code
    output = capsys.readouterr()
    return output.out, output.err


def test_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vit.csv"
    before = torch.get_num_threads()
    command = ["bench", "vit", *SMALL, "--r", "7", "--threads", "1", "--output", str(path)]
    out, err = printed([*command, "--json"], capsys)
    (row,) = json.loads(out)
    assert err == "" and torch.get_num_threads() == before
    assert (row["model"], row["r"], row["batch"], row["threads"], row["dtype"]) == ("test_vit", 7, 2, 1, "float32")
    assert (row["tokens"], row["tokens_left"]) == (101, 101 - 6 * 7)
    assert row["flop_ratio"] == pytest.approx(row["flops_dense"] / row["flops_merged"], abs=1e-4)
    for name in bench_vit.PROVIDERS:
        assert row[f"{name}_q20_ms"] <= row[f"{name}_ms"] <= row[f"{name}_q80_ms"]
        assert row[f"{name}_images_s"] == pytest.approx(2000 / row[f"{name}_ms"], rel=0.02)
    assert row["share_ours"] == pytest.approx(row["speedup_ours"] / row["flop_ratio"], abs=2e-3)
    assert row["difference"] < 1e-4, "ours and the textbook merge the same tokens"
    out, _ = printed(command, capsys)
    assert "test_vit" in out and "batch 2, float32" in out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and set(rows[0]) == set(bench_vit.COLUMNS)
    assert {name: str(value) for name, value in row.items()} == rows[0]


@pytest.mark.parametrize("r", [0, 5, 40])
def test_flops_equal_the_counter(r: int) -> None:
    """The formula against PyTorch's count, for the merging model without what the matching adds."""
    model = bench_vit.build("test_vit")
    counts = bench_vit.token_counts(model, r)
    with torch.no_grad():
        counted = bench_vit.counted_flops(TextbookToMe(model, r), torch.randn(1, 3, 160, 160))
    merging = [n for n, left in zip(counts, counts[1:], strict=False) if left < n]
    cosines = sum(2 * (n - n // 2) * (n // 2) * model.blocks[0].attn.head_dim for n in merging)
    assert bench_vit.flops(model, counts) == counted - cosines


def test_textbook_merges() -> None:
    """Two pairs known beforehand; the class token (0), whose best cosine (to 1) is the highest, stays."""
    keys = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.1, 1], [1, 0.2], [-1, 0.5], [-1, 0.4]])[None]
    x = torch.arange(7.0)[None, :, None]
    size = torch.tensor([1.0, 3, 1, 1, 2, 3, 1])[None, :, None]
    merged, total = merge(x, keys, size, 2)
    assert total[0, :, 0].tolist() == [1, 2, 3, 2, 4]
    assert merged[0, :, 0].tolist() == [0, 4, 1, 2.5, 5.25]


def test_dense_model_stays_as_it_is() -> None:
    model = bench_vit.build("test_vit")
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        want = model(images)
        row = bench_vit.measure("test_vit", model, 9, 1, 1, torch.float32, torch.device("cpu"))
        assert torch.equal(model(images), want)
        torch.testing.assert_close(TextbookToMe(model, 0)(images), want)
    assert row["tokens_left"] == 101 - 54


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for options, message in (
        (["--model", "vit_bas_patch16_224"], "timm has no model"),
        (["--model", "test_vit"], "how many tokens"),
        (["--model", "test_vit", "--r", "0"], "merges nothing"),
        (["--model", "resnet18", "--r", "8"], "no plain vision transformer"),
        (["--model", "vit_base_patch16_siglip_224", "--r", "8"], "no plain vision transformer"),
        (["--dtype", "int8"], "Unknown dtype"),
        (["--model", "test_vit", "--r", "4", "--output", str(other)], "other columns"),
        (["--model", "test_vit", "--r", "4", "--output", str(tmp_path / "no" / "x.csv")], "does not exist"),
    ):
        out, err = printed(["bench", "vit", *options], capsys, code=2)
        assert out == "" and err.startswith("vlmprune: ") and message in err, err
