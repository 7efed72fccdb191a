"""Reports: caches, scores, summaries and refusals, by example."""

from __future__ import annotations

import json

import pytest
import torch

from vlmprune.core import records, report
from vlmprune.core.errors import InputError
from vlmprune.core.report import ImageRecord, Report, SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site


def site(
    where: Site, layer: int | None, samples: tuple[int, ...], lengths: tuple[int, ...], kept: list[list[int]]
) -> SiteRecord:
    width = max(map(len, kept))
    rows = torch.tensor([row + [-1] * (width - len(row)) for row in kept]).reshape(len(kept), width)
    scores = torch.arange(len(kept) * max(lengths)).reshape(len(kept), -1).float()
    selection = Selection(max(lengths), rows.long(), scores=scores)
    return SiteRecord("test", where, layer, "keep", samples, lengths, selection)


def two_samples() -> Report:
    """Sample 0 has images of 3 and 2 tokens, sample 1 one of 4, sample 2 none."""
    images = (ImageRecord(0, 0, 3), ImageRecord(0, 1, 2), ImageRecord(1, 0, 4))
    return Report("Test", {"policy": "test"}, 3, 20, images, text_depth=3)


def test_import_paths() -> None:
    assert report.SiteRecord is records.SiteRecord
    assert report.ImageRecord is records.ImageRecord


def test_without_sites_everything_is_kept() -> None:
    empty = two_samples()
    assert empty.visual_tokens == empty.kept_tokens == (5, 4, 0)
    assert empty.kept_tokens_per_layer == ((5, 4, 0),) * 3
    assert empty.mean_kept_layers == 3.0
    assert empty.kept(0, 1) == [0, 1]
    assert empty.groups(0, 1) == [[0], [1]]
    assert empty.scores() is None and empty.milliseconds is None and empty.kv_bytes is None
    assert empty.layers_used == {}
    assert empty.lineage(2).weights.shape == (1, 0, 0)


def test_a_record_leaves_other_samples_alone() -> None:
    result = two_samples()
    result.sites = [site(Site.POST_ENCODER, None, (0, 0), (3, 2), [[0, 2], [1]])]
    assert result.kept_tokens == (3, 4, 0)
    assert result.kept(1) == [0, 1, 2, 3]
    result.sites.append(site(Site.POST_ENCODER, None, (1,), (4,), [[3]]))
    assert result.kept_tokens == (3, 1, 0)
    assert [result.kept(0, 0), result.kept(0, 1), result.kept(1)] == [[0, 2], [1], [3]]


def test_caches_are_reduced_layer_by_layer() -> None:
    """A cut before layer 1, then an eviction from each of the caches of layers 0 to 2."""
    result = two_samples()
    result.sites = [
        site(Site.DECODER_LAYER, 1, (0, 1), (5, 4), [[0, 1, 4], [0, 3]]),
        site(Site.KV_CACHE, 0, (0, 1), (5, 4), [[2, 3], [1, 2, 3]]),
        site(Site.KV_CACHE, 1, (0, 1), (3, 2), [[2], [0, 1]]),
        site(Site.KV_CACHE, 2, (0, 1), (3, 2), [[0, 1], []]),
    ]
    assert result.kept_tokens_per_layer == ((2, 3, 0), (1, 2, 0), (2, 0, 0))
    assert result.kept_tokens == (2, 0, 0)
    assert [result.kept(0, 0, layer) for layer in range(3)] == [[2], [], [0, 1]]
    assert [result.kept(0, 1, layer) for layer in range(3)] == [[0], [1], []]
    assert [result.kept(1, 0, layer) for layer in range(3)] == [[1, 2, 3], [0, 3], []]
    assert result.kept(1) == result.kept(1, 0, 2) == []
    assert result.layers_used == {"test": [1, 0, 2]}


def test_a_cache_reduced_twice_composes() -> None:
    result = two_samples()
    result.sites = [
        site(Site.KV_CACHE, 2, (1,), (4,), [[0, 2, 3]]),
        site(Site.KV_CACHE, 2, (1,), (3,), [[1, 2]]),
    ]
    assert result.kept(1) == [2, 3]
    assert result.kept_tokens_per_layer == ((5, 4, 0), (5, 4, 0), (5, 2, 0))


def test_tower_layers_are_no_decoder_layers() -> None:
    result = two_samples()
    result.sites = [
        site(Site.VISION_BLOCK, 20, (0, 0, 1), (3, 2, 4), [[0, 1], [0], [1, 2, 3]]),
        site(Site.KV_CACHE, 2, (1,), (3,), [[2]]),
    ]
    assert result.kept_tokens_per_layer == ((3, 3, 0), (3, 3, 0), (3, 1, 0))
    assert result.kept(1) == [3]


def test_scores_per_image() -> None:
    result = two_samples()
    result.sites = [site(Site.POST_ENCODER, None, (0, 0, 1), (3, 2, 4), [[0], [0], [0]])]
    assert result.scores(0, 0) == [0, 1, 2]
    assert result.scores(0, 1) == [4, 5]  # rows are padded to 4
    assert result.scores(1) == [8, 9, 10, 11]


def test_scores_of_a_sample_are_cut_into_images() -> None:
    result = two_samples()
    result.sites = [site(Site.DECODER_LAYER, 1, (0, 1), (5, 4), [[0], [0]])]
    assert result.scores(0, 1) == [3, 4]
    assert result.scores(1) == [5, 6, 7, 8]


def test_scores_of_survivors_alone_are_not_shown() -> None:
    result = two_samples()
    first = Selection(4, torch.tensor([[0, 1], [0, -1], [0, 1]]))
    result.sites = [
        SiteRecord("first", Site.POST_ENCODER, None, "keep", (0, 0, 1), (3, 2, 4), first),
        site(Site.DECODER_LAYER, 1, (0, 1), (3, 2), [[0], [0]]),
    ]
    assert result.scores(0, 0) is None


def test_times_add_up_where_all_are_known() -> None:
    result = two_samples()
    result.sites = [site(Site.DECODER_LAYER, layer, (1,), (4,), [[0, 1, 2, 3]]) for layer in (1, 2)]
    assert result.milliseconds is None
    result.sites[0].elapsed = lambda: 1.5
    assert result.milliseconds is None
    result.sites[1].elapsed = lambda: 2.0
    assert result.milliseconds == 3.5


def test_cache_bytes() -> None:
    result = two_samples()
    result.kv_bytes_per_layer, result.kv_bytes_per_layer_dense = (10, 20, 30), (40, 40, 40)
    assert (result.kv_bytes, result.kv_bytes_dense) == (60, 120)


def test_summary_is_json() -> None:
    result = two_samples()
    result.sites = [
        site(Site.POST_ENCODER, None, (0, 0, 1), (3, 2, 4), [[0, 1], [1], [0, 3]]),
        site(Site.DECODER_LAYER, 1, (0, 1), (3, 2), [[0], [0, 1]]),
    ]
    result.sites[0].elapsed = lambda: 0.25
    result.sites[1].flops = 12.0
    result.kv_bytes_per_layer, result.warnings = (1, 2, 3), ["careful"]
    read = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert read["visual_tokens"] == [5, 4, 0] and read["kept_tokens"] == [1, 2, 0]
    assert read["mean_kept_layers"] == pytest.approx((5 + 3 + 3) / 9)
    assert read["layers_used"] == {"test": [1]}
    assert read["policy"] == {"policy": "test"} and read["model"] == "Test"
    assert (read["kv_bytes"], read["kv_bytes_dense"], read["kv_bytes_per_layer"]) == (6, None, [1, 2, 3])
    assert read["warnings"] == ["careful"]
    first, second = read["sites"]
    assert first == {
        "policy": "test",
        "site": "post_encoder",
        "layer": None,
        "positions": "keep",
        "tokens_in": [3, 2, 4],
        "tokens_out": [2, 1, 2],
        "milliseconds": 0.25,
        "flops": None,
    }
    assert (second["site"], second["layer"], second["flops"]) == ("decoder_layer", 1, 12.0)


def test_an_empty_report_has_a_summary() -> None:
    read = json.loads(json.dumps(Report("Test", "dense").summary()))
    assert read["visual_tokens"] == [] and read["mean_kept_layers"] is None


@pytest.mark.parametrize(
    ("sample", "image", "message"),
    [
        (3, 0, "Sample 3 is out of range; the batch had 3"),
        (-1, 0, "Sample -1"),
        (0, 2, "Image 2 is out of range; sample 0 has 2"),
        (2, 0, "sample 2 has 0"),
        (0, -1, "Image -1"),
    ],
)
def test_samples_and_images_out_of_range(sample: int, image: int, message: str) -> None:
    result = two_samples()
    for read in (result.kept, result.groups, result.scores):
        with pytest.raises(InputError, match=message):
            read(sample, image)


def test_reading_needs_no_dense_copy_of_other_samples() -> None:
    """Sample 1's lineage can be read although sample 0 is listed by no site."""
    result = two_samples()
    result.sites = [site(Site.DECODER_LAYER, 2, (1,), (4,), [[1, 2]])]
    assert torch.equal(result.lineage(0).weights[0], torch.eye(5))
    assert result.lineage(1).weights[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
