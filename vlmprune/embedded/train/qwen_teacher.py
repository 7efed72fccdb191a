"""What `tiny-qwen` learns from: tiny-llava's projected features without positions, and linear probes on them.

A tower with rotary positions sees distances only, so the part of a feature that is linear in the place of its
object is taken out here; the first decoder layer of `tiny-qwen` learns to put it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import load_embedded
from ..bank import SHAPES
from ..easyvqa import load_easy_vqa
from ..fastpath import patchify, project, tower_features
from ..model import WIDTH, vision_tower
from ..scenes import GRID, IMAGE_SIZE, Scene, SceneSettings, generate_scene
from .common import load_checkpoint, logger, save_checkpoint
from .labels import ALL_COLOURS, IGNORE, N_COLOURS, N_KINDS, EasyPictures, Labels

CROWDED = SceneSettings(
    objects=(9, 14), digit_weights=(0, 0, 0.05, 0.15, 0.2, 0.25, 0.2, 0.15), clutter=(2, 6), plain=0.25
)
USUAL = SceneSettings(objects=(4, 9), digit_weights=(0.06, 0.25, 0.29, 0.25, 0.15), plain=0.06)
FIT_SCENES, FIT_EASY = 900, 200
PROBE_STEPS = 900
FIT_SEED = 51


def kind_index(scene: Scene) -> list[int]:
    """Class of every object: shapes, then digits."""
    return [SHAPES.index(o.kind) if o.digit is None else len(SHAPES) + o.digit for o in scene.objects]


def colour_index(scene: Scene) -> list[int]:
    """Colour class of every object."""
    return [ALL_COLOURS.index(o.colour) for o in scene.objects]


@dataclass
class Teacher:
    """tiny-llava's tower and projector, and what was fitted to their output.

    Attributes:
        tower: CLIP tower of tiny-llava.
        projector: its projector.
        place: float32 `[2, C]`, change of a feature from the middle to the right or bottom edge.
        scale: rms deviation of a feature on objects.
        probe: linear layer from features to kinds (background last), then colours (background last).
    """

    tower: Any
    projector: Any
    place: Tensor
    scale: float
    probe: nn.Linear

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Projected features of uint8 `[B, 224, 224, 3]`: float32 `[B, 196, C]`."""
        return project(self.projector, tower_features(self.tower, patchify(torch.from_numpy(images)))[:, 1:])

    def targets(self, images: np.ndarray, centres: Tensor) -> Tensor:
        """Features with the part that is linear in `centres` `[B, 196, 2]` (-1..1) taken out."""
        return self.features(images) - centres @ self.place


def patch_centres(scene: Scene) -> np.ndarray:
    """Centre of the object on each patch, or of the patch itself on background, -1..1: float32 `[196, 2]`."""
    middle = (np.arange(GRID, dtype=np.float32) + 0.5) / (GRID / 2) - 1
    own = np.stack(np.meshgrid(middle, middle, indexing="xy"), axis=-1).reshape(-1, 2)
    owner = scene.patch_object.reshape(-1)
    table = np.asarray([o.centre for o in scene.objects], dtype=np.float32).reshape(-1, 2) / (IMAGE_SIZE / 2) - 1
    return np.where(owner[:, None] >= 0, table[owner] if len(table) else own, own)


def make_teacher(path: Path, seed: int = 0) -> Teacher:
    """Load the teacher, fitting place and probes once; the fit goes to `path`."""
    model, _ = load_embedded("tiny-llava")
    model.requires_grad_(False)
    probe = nn.Linear(WIDTH, N_KINDS + N_COLOURS + 2).requires_grad_(False)
    teacher = Teacher(vision_tower(model), model.model.multi_modal_projector, torch.zeros(2, WIDTH), 1.0, probe)
    state = load_checkpoint(path)
    if state is None:
        state = _fit(teacher, np.random.default_rng([seed, FIT_SEED]))
        save_checkpoint(path, state)
    teacher.place, teacher.scale = state["place"], state["scale"]
    probe.load_state_dict(state["probe"])
    return teacher


def _fit(teacher: Teacher, rng: np.random.Generator) -> dict[str, Any]:
    scenes = [generate_scene(rng, "train", CROWDED if i % 2 else USUAL) for i in range(FIT_SCENES)]
    labels = Labels(FIT_SCENES + FIT_EASY)
    easy, pictures = EasyPictures(load_easy_vqa("train")), []
    for row, scene in enumerate(scenes):
        labels.fill_scene(row, scene)
    for row in range(FIT_EASY):
        image, shape, colour = easy.draw(rng)
        pictures.append(image)
        labels.fill_easy(FIT_SCENES + row, image, shape, colour)
    images = [s.image for s in scenes] + pictures
    parts = [teacher.features(np.stack(images[i : i + 32])) for i in range(0, len(images), 32)]
    features = torch.cat(parts)
    centres = torch.from_numpy(np.stack([patch_centres(s) for s in scenes]))
    on_object = torch.from_numpy(np.stack([s.patch_object.reshape(-1) >= 0 for s in scenes]))
    seen = features[:FIT_SCENES][on_object]
    design = torch.cat([centres[on_object], torch.ones(len(seen), 1)], dim=1)
    place = torch.linalg.lstsq(design, seen).solution[:2]
    features[:FIT_SCENES] -= centres @ place
    scale = float(features[:FIT_SCENES][on_object].std(0).square().mean().sqrt())
    probe = _fit_probe(features.flatten(0, 1), labels, scale)
    norms = place.norm(dim=1).tolist()
    logger.info("teacher fit: scale %.2f, place norms %.1f %.1f", scale, *norms)
    return {"place": place, "scale": scale, "probe": probe.state_dict()}


def _fit_probe(features: Tensor, labels: Labels, scale: float) -> nn.Linear:
    kind, colour = (torch.from_numpy(a).flatten() for a in (labels.kind, labels.colour))
    front = (kind != N_KINDS).nonzero()[:, 0]
    back = (kind == N_KINDS).nonzero()[:, 0]
    torch.manual_seed(0)
    probe = nn.Linear(WIDTH, N_KINDS + N_COLOURS + 2)
    nn.init.normal_(probe.weight, std=0.1 / scale)
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for step in range(PROBE_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / PROBE_STEPS) + 1e-4
        rows = torch.cat([front[torch.randint(len(front), (1536,))], back[torch.randint(len(back), (512,))]])
        loss = sum(probe_losses(probe(features[rows]), kind[rows], colour[rows]))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    right = probe(features[front])[:, : N_KINDS + 1].argmax(-1) == kind[front]
    logger.info("probe loss %.3f kind accuracy %.3f", loss.mean().item(), right.float().mean().item())
    return probe


def probe_losses(logits: Tensor, kind: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies `[N]` of kinds and of colours from logits `[N, K]`; classes of `IGNORE` give 0."""
    kinds, colours = logits.split([N_KINDS + 1, N_COLOURS + 1], dim=-1)
    return (
        F.cross_entropy(kinds, kind, ignore_index=IGNORE, reduction="none"),
        F.cross_entropy(colours, colour, ignore_index=IGNORE, reduction="none"),
    )
