"""Which signals can be had at which site, so that a policy that cannot work fails at ``apply``."""

from __future__ import annotations

from vlmprune.core import signals as s
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site, SiteRequest

FROM_TOWER = (
    s.ColumnMass,
    s.ClsRow,
    s.ClsLogits,
    s.Keys,
    s.QK,
    s.Attention,
    s.Hidden,
    s.PreProjector,
    s.Pixels,
)
IN_TOWER = (s.KeyMean, s.HeadAttention)
FROM_PROMPT = (s.Projected, s.Projector, s.TextEmbeddings)
FROM_ATTENTION = (s.GroupMass, s.AttentionRows, s.ColumnMass)


def why_missing(signal: s.Signal, request: SiteRequest, info: ModelInfo) -> str | None:
    """Why a request's signal cannot be delivered on a model, None if it can."""
    if type(signal) not in info.signals:
        return f"which {info.model_class} cannot give{_hint(signal, info)}"
    layer = getattr(signal, "layer", None)
    depth = info.vision_depth if signal.stack_name == "vision" else info.text_depth
    if layer is not None and depth is None:
        return f"which {info.model_class} cannot give{_hint(signal, info)}"
    if layer is not None and depth is not None and not 0 <= layer < depth:
        return f"but layer {layer} does not exist: the {signal.stack_name} stack of {info.model_class} has {depth}"
    if request.site == Site.VISION_BLOCK:
        served = _in_tower(signal, request)
    elif isinstance(signal, IN_TOWER):
        served = False
    elif request.site == Site.POST_ENCODER:
        served = isinstance(signal, FROM_PROMPT) or (isinstance(signal, FROM_TOWER) and signal.stack_name == "vision")
    else:
        served = _in_decoder(signal, request)
    return None if served else f"which cannot be had at {_place(request)}"


def _in_tower(signal: s.Signal, request: SiteRequest) -> bool:
    """True if a site inside the tower can have the signal: of the block whose attention ran last."""
    block = (request.layer or 0) - (request.place == "before")
    return isinstance(signal, (*IN_TOWER, s.Keys)) and signal.stack_name == "vision" and signal.layer == block


def _in_decoder(signal: s.Signal, request: SiteRequest) -> bool:
    """True if a decoder or cache site of ``request.layer`` can have the signal."""
    cut = request.site == Site.DECODER_LAYER
    if isinstance(signal, s.FinalNorm):
        return cut
    if isinstance(signal, s.Hidden):  # the tokens as they enter the layer
        return cut and signal.stack_name == "text" and signal.when == "in" and signal.layer == request.layer
    if isinstance(signal, s.ProbeAttention):  # of the layer before which the tokens are cut
        return cut and signal.layer == request.layer
    if isinstance(signal, (*FROM_ATTENTION, s.ModuleTransition)) and signal.stack_name == "text":
        return not cut or signal.layer < (request.layer or 0)
    return False


def _place(request: SiteRequest) -> str:
    return f"{request.site}" if request.layer is None else f"{request.site} {request.layer}"


def _hint(signal: s.Signal, info: ModelInfo) -> str:
    if type(signal).__name__.startswith("Cls") and not info.has_cls and info.vision_depth is not None:
        return " (its vision tower has no CLS token)"
    return " (it has no vision tower)" if info.vision_depth is None and signal.stack_name == "vision" else ""
