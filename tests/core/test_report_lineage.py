"""Lineage of random forwards against a plain-Python simulation.

A forward has several samples with several images, each of several views, ragged. Sites follow one another:
inside the tower (an item is a view), after it (an image), before decoder layers (a sample). The simulation
holds every token as the shares of the original tokens in it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.core.report import ImageRecord, Report, SiteRecord
from vlmprune.core.selection import Selection, Synthetic
from vlmprune.core.sites import Site

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
DEPTH = 6
KINDS = ("prune", "mean", "wavg", "synthetic", "all", "none")

Token = dict[int, Fraction]  # original token of the sample -> its share


def mix(tokens: list[Token], weights: list[int]) -> Token:
    out: Token = {}
    for token, weight in zip(tokens, weights, strict=True):
        for origin, share in token.items():
            out[origin] = out.get(origin, Fraction(0)) + share * Fraction(weight, sum(weights))
    return out


@dataclass
class Reduction:
    """One site, collected item by item."""

    kind: str
    lengths: list[int] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    weights: list[list[int]] = field(default_factory=list)
    new: list[list[tuple[int, list[int]]]] = field(default_factory=list)

    def reduce(self, tokens: list[Token], rng: random.Random) -> list[Token]:
        """Reduce one item in the simulation and note what was done."""
        n = len(tokens)
        self.lengths.append(n)
        if self.kind in ("mean", "wavg"):
            row = [rng.randrange(-1, max(1, n // 2)) for _ in range(n)]
            ids = {old: new for new, old in enumerate(sorted(set(row) - {-1}))}
            self.groups.append([ids.get(group, -1) for group in row])
            self.weights.append([rng.randint(1, 5) if self.kind == "wavg" else 1 for _ in range(n)])
            members = [[t for t in range(n) if self.groups[-1][t] == group] for group in range(len(ids))]
            return [mix([tokens[t] for t in m], [self.weights[-1][t] for t in m]) for m in members]
        chance = {"all": 1.0, "none": 0.0}.get(self.kind, 0.6)
        self.kept.append([t for t in range(n) if rng.random() < chance])
        out = [(t, 0, tokens[t]) for t in self.kept[-1]]
        self.new.append([])
        if self.kind == "synthetic":
            for _ in range(rng.randint(0, min(2, n))):
                sources = sorted(rng.sample(range(n), rng.randint(1, n)))
                self.new[-1].append((rng.choice(sources), sources))
            for place, sources in self.new[-1]:
                out.append((place, 1, mix([tokens[t] for t in sources], [1] * len(sources))))
        return [token for _, _, token in sorted(out, key=lambda entry: entry[:2])]

    def selection(self, rng: random.Random) -> Selection:
        """The same reductions as one padded selection."""
        width = max(self.lengths) + rng.randint(0, 1)
        if self.kind in ("mean", "wavg"):
            n_out = max(max([-1, *row]) for row in self.groups) + 1 + rng.randint(0, 1)
            weights = filled(self.weights, width, 1).float() if self.kind == "wavg" else None
            mode = "wavg" if weights is not None else "mean"
            return Selection.merge(filled(self.groups, width), n_out, mode, weights)
        scores = torch.zeros(len(self.lengths), width)
        kept = filled(self.kept, max(map(len, self.kept)) + rng.randint(0, 1))
        if self.kind != "synthetic":
            counts = tuple(map(len, self.kept)) if rng.random() < 0.5 else None
            return Selection(width, kept, counts, scores=scores)
        n_new = max(map(len, self.new))
        sources = torch.zeros(len(self.new), n_new, width)
        for item, row in enumerate(self.new):
            for number, (_, members) in enumerate(row):
                sources[item, number, members] = 1 / len(members)
        place = filled([[place for place, _ in row] for row in self.new], n_new)
        features = torch.zeros(len(self.new), n_new, 1)
        return Selection(width, kept, synthetic=Synthetic(features, sources, place))


def filled(rows: list[list[int]], width: int, fill: int = -1) -> Tensor:
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


class Forward:
    """A random forward: the report, and what the simulation says."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        n_samples = rng.randint(1, 3)
        self.views = [
            [[rng.randint(1, 5) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 3))]
            for _ in range(n_samples)
        ]
        if not any(self.views):
            self.views[0] = [[3], [2, 2]]
        images = [(s, i, sum(views)) for s, row in enumerate(self.views) for i, views in enumerate(row)]
        self.report = Report("Test", {"policy": "test"}, n_samples, 40, text_depth=DEPTH)
        self.report.images = tuple(ImageRecord(*image) for image in images)
        # Pieces of a sample: (image, tokens); views first, then images, then all together.
        self.pieces: list[list[tuple[int, list[Token]]]] = []
        for row in self.views:
            origin, pieces = 0, []
            for image, lengths in enumerate(row):
                for length in lengths:
                    pieces.append((image, [{origin + t: Fraction(1)} for t in range(length)]))
                    origin += length
            self.pieces.append(pieces)
        self.dense = [self.tokens(s) for s in range(n_samples)]
        self.per_layer = []
        for layer in sorted(rng.choices(range(2, 10), k=rng.randint(0, 2))):
            self.act(Site.VISION_BLOCK, layer)
        self.join(lambda image: image)
        for _ in range(rng.randint(0, 2)):
            self.act(Site.POST_ENCODER, None)
        self.join(lambda image: 0)
        cuts = sorted(rng.sample(range(DEPTH), rng.randint(0, 3)))
        for layer in range(DEPTH):
            if layer in cuts:
                self.act(Site.DECODER_LAYER, layer)
            self.per_layer.append(tuple(len(self.tokens(s)) for s in range(n_samples)))

    def tokens(self, sample: int) -> list[Token]:
        return [token for _, tokens in self.pieces[sample] for token in tokens]

    def join(self, key) -> None:
        for sample, pieces in enumerate(self.pieces):
            joined: dict[int, list[Token]] = {}
            for image, tokens in pieces:
                joined.setdefault(key(image), []).extend(tokens)
            self.pieces[sample] = list(joined.items())

    def act(self, site: Site, layer: int | None) -> None:
        places = [(s, p) for s, pieces in enumerate(self.pieces) for p in range(len(pieces))]
        reduction = Reduction(self.rng.choice(KINDS if site == Site.DECODER_LAYER else KINDS[:4]))
        for sample, number in places:
            image, tokens = self.pieces[sample][number]
            self.pieces[sample][number] = (image, reduction.reduce(tokens, self.rng))
        record = SiteRecord(
            policy=reduction.kind,
            site=site,
            layer=layer,
            positions="keep",
            samples=tuple(s for s, _ in places),
            lengths=tuple(reduction.lengths),
            selection=reduction.selection(self.rng),
        )
        after = tuple(len(self.pieces[s][p][1]) for s, p in places)
        assert record.tokens_in == tuple(reduction.lengths)
        assert record.tokens_out == after
        self.report.sites.append(record)


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_lineage_kept_and_groups(seed: int) -> None:
    forward = Forward(seed)
    report = forward.report
    for sample, views in enumerate(forward.views):
        tokens, n = forward.tokens(sample), len(forward.dense[sample])
        expected = torch.zeros(len(tokens), n, dtype=torch.float64)
        for row, token in enumerate(tokens):
            for origin, share in token.items():
                expected[row, origin] = float(share)
        lineage = report.lineage(sample)
        assert lineage.weights.shape == (1, len(tokens), n)
        assert torch.allclose(lineage.weights[0].double(), expected, rtol=1e-4, atol=1e-6)
        start = 0
        for image, lengths in enumerate(views):
            inside = range(start, start + sum(lengths))
            groups = [[o - start for o in sorted(token) if o in inside] for token in tokens]
            assert report.groups(sample, image) == [group for group in groups if group]
            assert report.kept(sample, image) == sorted({o for group in groups for o in group})
            start += sum(lengths)


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_token_counts(seed: int) -> None:
    forward = Forward(seed)
    report, samples = forward.report, range(len(forward.views))
    assert report.visual_tokens == tuple(len(forward.dense[s]) for s in samples)
    assert report.kept_tokens == forward.per_layer[-1]
    assert report.kept_tokens_per_layer == tuple(forward.per_layer)
    total = sum(sum(row) for row in forward.per_layer)
    assert report.mean_kept_layers == total / (DEPTH * len(samples))
    for layer, counts in enumerate(forward.per_layer):
        assert tuple(report.lineage(s, layer).weights.shape[1] for s in samples) == counts
