"""From a report to a picture: right image, right sample, right crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from plotted import noise, report_of

from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.report import ImageRecord
from vlmprune.core.selection import Selection
from vlmprune.core.views import View
from vlmprune.plot import draw_tokens, group_colours, model_view, plot_selection


def keep(rows: list[list[int]], scores: torch.Tensor | None = None) -> Selection:
    mask = torch.zeros(len(rows), 16, dtype=torch.bool)
    for item, tokens in enumerate(rows):
        mask[item, tokens] = True
    return Selection.from_mask(mask, scores=scores)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def test_each_sample_and_image_gets_its_own_tokens() -> None:
    rows = [[0, 5], [7], [1, 2, 3]]
    report, image = report_of(keep(rows), samples=(0, 0, 1)), noise(96, 96)
    for sample, place, tokens in ((0, 0, rows[0]), (0, 1, rows[1]), (1, 0, rows[2])):
        drawn = plot_selection(image, report, sample=sample, image_index=place)
        assert same(drawn, draw_tokens(image, (4, 4), tokens))


def test_merged_tokens_share_a_colour() -> None:
    group = torch.tensor([[0, 0, 1, 1] + [-1] * 12])
    report, image = report_of(Selection.merge(group, 2), (0,)), noise(96, 96)
    drawn = np.asarray(plot_selection(image, report))
    first, second = group_colours(2)
    assert (drawn[0, :48] == first).all() and (drawn[0, 48:] == second).all()
    plain = plot_selection(image, report, groups=False)
    assert same(plain, draw_tokens(image, (4, 4), [0, 1, 2, 3]))


def test_scores_are_those_of_the_image() -> None:
    scores = torch.arange(32.0).reshape(2, 16)
    report, image = report_of(keep([[0, 15], [3, 4]], scores), (0, 0)), noise(96, 96)
    drawn = plot_selection(image, report, image_index=1, scores=True)
    assert same(drawn, draw_tokens(image, (4, 4), [3, 4], scores=list(range(16, 32))))
    with pytest.raises(InputError, match="gave no scores"):
        plot_selection(image, report_of(keep([[0]]), (0,)), scores=True)


def test_view_with_tokens_in_another_order() -> None:
    view = View(4, 4, index=tuple(reversed(range(16))))
    image = noise(96, 96)
    drawn = plot_selection(image, report_of(keep([[0, 1]]), (0,), view))
    assert same(drawn, draw_tokens(image, (4, 4), [15, 14]))


def test_without_a_site_everything_is_kept() -> None:
    report, image = report_of(keep([[0]]), (0,)), noise(96, 96)
    report.sites.clear()
    assert same(plot_selection(image, report), draw_tokens(image, (4, 4), range(16)))


@pytest.mark.parametrize(("sample", "place"), [(1, 0), (0, 1), (0, -1)])
def test_image_that_is_not_there(sample: int, place: int) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plot_selection(noise(96, 96), report_of(keep([[0]]), (0,)), sample=sample, image_index=place)


def test_no_report_and_several_views() -> None:
    with pytest.raises(InputError, match="no report"):
        plot_selection(noise(96, 96), None)
    report = report_of(keep([[0]]), (0,))
    report.images = (ImageRecord(0, 0, 16, (View(2, 4), View(2, 4, 8))),)
    with pytest.raises(UnsupportedError, match="2 views"):
        plot_selection(noise(96, 96), report)


@pytest.mark.parametrize("size", [(300, 200), (120, 333), (64, 64), (50, 40)])
def test_the_view_is_what_the_processor_hands_to_the_model(size: tuple[int, int]) -> None:
    """Reference: CLIP's published arithmetic (shorter edge to 64, centre crop), by Pillow."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    image = noise(*size)
    view = model_view(image, processor)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = ((pixels * std + mean) * 255).permute(1, 2, 0).numpy()
    assert view.size == (64, 64)
    np.testing.assert_allclose(np.asarray(view).astype(float), seen, atol=0.51)
    # Pillow and torchvision resample a little differently; a crop that is off by a pixel would not pass.
    by_hand = np.asarray(model_view(image, size=64)).astype(float)
    assert np.abs(by_hand - seen).mean() < 1.0
    shifted = np.roll(by_hand, 1, axis=0 if size[1] > size[0] else 1)
    assert np.abs(shifted - seen).mean() > np.abs(by_hand - seen).mean() + 0.5


def test_a_stretching_processor() -> None:
    from transformers import SiglipImageProcessor

    image = noise(200, 100)
    view = model_view(image, SiglipImageProcessor(size={"height": 64, "width": 64}))
    whole = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(view) - whole).mean() < 2.0


def test_without_processor_the_centre_square_is_shown() -> None:
    image = noise(120, 80)
    assert same(model_view(image), image.crop((20, 0, 100, 80)))
    assert model_view(Image.new("L", (10, 30))).mode == "RGB"


def test_a_processor_of_several_tiles_is_refused() -> None:
    def tiles(**kwargs: object) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 3, 3, 8, 8)}

    with pytest.raises(UnsupportedError, match="not one picture"):
        model_view(noise(20, 20), tiles)
