"""What a stock model with eager attention computes: the reference of every delivered signal.

Nothing here asks an adapter. Modules are found by their names, and what the model does with queries, keys and patches
is watched with hooks and a spy on its own eager attention function.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from family_prompts import FamilyPrompt, prefill
from masked_reference import decoder_layers
from prompt_parts import VIDEO
from torch import Tensor, nn

Patches = list[Tensor]
"""Values ``[P_v, ...]`` of the patches of each encoder view, row by row of tokens."""

CLS = ("llava", "llava_next", "internvl")
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def find(root: nn.Module, *paths: str) -> Any:
    """The first of several attribute paths that exists."""
    for path in paths:
        node: Any = root
        for name in path.split("."):
            node = getattr(node, name, None)
        if node is not None:
            return node
    raise LookupError(paths)


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower."""
    return find(model.model, "visual", "vision_tower", "vision_model")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The tower's blocks."""
    return find(tower_of(model), "blocks", "encoder.layers", "encoder.layer", "vision_model.encoder.layers")


def projector_of(model: nn.Module) -> nn.Module:
    """What takes the tower's features to the decoder's width."""
    return find(model.model, "visual.merger", "multi_modal_projector", "connector")


@dataclass(frozen=True)
class Attended:
    """One call of the eager attention function: ``query``, ``key`` ``[B, H, T, d]``, ``weights`` ``[B, H, T, T]``."""

    query: Tensor
    key: Tensor
    weights: Tensor
    scale: float


@dataclass
class Run:
    """One run of the tower: what entered and left each block, the projector's input, and attention by block."""

    grids: list[list[int]] = field(default_factory=list)
    pixels: Any = None
    raster: Tensor | None = None
    entering: dict[int, Tensor] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    projector: Any = None
    attention: dict[int, list[Attended]] = field(default_factory=lambda: defaultdict(list))
    order: list[Tensor] | None = None


@contextmanager
def watched_attention(modules: list[nn.Module], note: Callable[[nn.Module, Attended], None]) -> Iterator[None]:
    """Tell ``note`` what the eager attention functions of the modules' files compute."""
    files = {sys.modules[type(module).__module__] for module in modules}
    before = {file: file.eager_attention_forward for file in files}

    def spy(original: Any, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "output_attentions" in kwargs:  # else CLIP of transformers 4 gives no weights
            kwargs["output_attentions"] = True
        output, weights = original(module, query, key, *args, **kwargs)
        note(module, Attended(query, key, weights, kwargs.get("scaling") or query.shape[-1] ** -0.5))
        return output, weights

    for file, original in before.items():
        file.eager_attention_forward = partial(spy, original)
    try:
        yield
    finally:
        for file, original in before.items():
            file.eager_attention_forward = original


class EagerReference:
    """A dense forward of a prompt through a model with eager attention, watched.

    Args:
        model: with eager attention.
        around: a context in which it runs, such as one that hides tokens.
    """

    def __init__(self, model: nn.Module, prompt: FamilyPrompt, around: Any = None) -> None:
        self.model, self.prompt = model, prompt
        self.first = int(prompt.family in CLS)
        self.runs: list[Run] = []
        self.text: dict[int, Attended] = {}
        self.text_entering: dict[int, Tensor] = {}
        blocks, layers = list(blocks_of(model)), list(decoder_layers(model))
        tower_attention = [find(block, "attn", "self_attn", "attention") for block in blocks]
        places = {module: i for i, module in enumerate(tower_attention)}
        text_places = {layer.self_attn: i for i, layer in enumerate(layers)}

        def note(module: nn.Module, attended: Attended) -> None:
            if module in places:
                self.runs[-1].attention[places[module]].append(attended)
            elif module in text_places:
                self.text[text_places[module]] = attended

        hooks = [
            tower_of(model).register_forward_pre_hook(self._begin, with_kwargs=True),
            projector_of(model).register_forward_pre_hook(self._projector, with_kwargs=True),
            *[b.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True) for i, b in enumerate(blocks)],
            *[b.register_forward_hook(partial(self._leave, i)) for i, b in enumerate(blocks)],
            *[
                layer.register_forward_pre_hook(partial(self._enter_text, i), with_kwargs=True)
                for i, layer in enumerate(layers)
            ],
        ]
        if prompt.family in PACKED:
            hooks.append(tower_of(model).patch_embed.register_forward_hook(self._embedded))
        try:
            with watched_attention([*places, *text_places], note):
                if around is None:
                    prefill(model, prompt)
                else:
                    with around:
                        prefill(model, prompt)
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        grids = [value for value in (*args[1:], kwargs.get("grid_thw")) if isinstance(value, Tensor)]
        run = Run(grids=grids[0].tolist() if grids else [])
        run.pixels = args[0] if args else next(iter(kwargs.values()))
        self.runs.append(run)

    def _embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.runs[-1].raster = output

    def _projector(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.runs[-1].projector = args[0] if args else next(iter(kwargs.values()))

    def _enter(self, block: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.runs[-1].entering[block] = args[0] if args else kwargs["hidden_states"]

    def _leave(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        self.runs[-1].leaving[block] = output[0] if isinstance(output, tuple) else output

    def _enter_text(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.text_entering[layer] = args[0] if args else kwargs["hidden_states"]

    @property
    def views(self) -> list[tuple[Run, int]]:
        """Run, and place in it, of every encoder view in prompt order."""
        counts = {False: 0, True: 0}
        stills = any(VIDEO not in part.kinds for row in self.prompt.rows for part in row.parts)
        found = []
        for row in self.prompt.rows:
            for part in row.parts:
                video = VIDEO in part.kinds
                for _ in range(encoder_views(part)):
                    found.append((self.runs[int(video and stills)], counts[video]))
                    counts[video] += 1
        assert sum(counts.values()) == len(found)
        return found

    def order(self, run: Run) -> list[Tensor]:
        """Per view of a packed run, where its patches stand in the tower."""
        if run.order is not None:
            return run.order
        assert run.raster is not None
        if self.prompt.family == "qwen3_vl":  # adds positions at once, and has no windows
            place = torch.arange(len(run.raster))
        else:
            equal = (run.raster[:, None] == run.entering[0][None]).all(-1)
            assert (equal.sum(1) == 1).all()
            place = equal.long().argmax(1)
        sizes = [height * width for frames, height, width in run.grids for _ in range(frames)]
        run.order = list(place.split(sizes))
        return run.order

    def patches(self, value: Callable[[Run], Tensor], axis: int = 0) -> Patches:
        """Values of the patches of each view, out of a tensor of each run in the tower's own order.

        Args:
            axis: of a packed run's tensor, the one that counts patches; batched ones count them behind the views.
        """
        found = []
        for run, number in self.views:
            states = value(run)
            if self.prompt.family in PACKED:
                found.append(states.index_select(axis, self.order(run)[number]))
            else:
                found.append(states[number].narrow(axis, self.first, states[number].shape[axis] - self.first))
        return found

    def matrices(self, block: int) -> list[Tensor]:
        """``[T_v, T_v]`` head mean of attention inside each view, its CLS token included."""
        found = []
        for run, number in self.views:
            calls = run.attention[block]
            if self.prompt.family not in PACKED:
                [call] = calls
                found.append(call.weights[number].mean(0))
                continue
            whole = torch.block_diag(*[call.weights[0].mean(0) for call in calls])
            place = self.order(run)[number]
            found.append(whole[place][:, place])
        return found

    def heads(self, block: int, name: str) -> Patches:
        """``[H, P_v, d]`` queries or keys of the patches of each view."""
        if self.prompt.family in PACKED:
            return self.patches(lambda run: torch.cat([getattr(c, name)[0] for c in run.attention[block]], 1), 1)
        return self.patches(lambda run: getattr(run.attention[block][0], name), 1)


def encoder_views(part: Any) -> int:
    """Encoder views of an image or video."""
    if "image_grid_thw" in part.tensors or "video_grid_thw" in part.tensors:
        [(frames, _, _)] = next(v for n, v in part.tensors.items() if n.endswith("grid_thw")).tolist()
        return frames
    pixels = next(v for n, v in part.tensors.items() if n.startswith("pixel_values"))
    return pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0]


def padded(values: Patches, axis: int = 0) -> Tensor:
    """``[V, P, ...]`` with zeros where a view has fewer patches."""
    width = max(value.shape[axis] for value in values)
    grown = []
    for value in values:
        shape = list(value.shape)
        shape[axis] = width - shape[axis]
        grown.append(torch.cat([value, value.new_zeros(shape)], axis))
    return torch.stack(grown)
