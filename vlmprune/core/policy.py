"""The policy contract: frozen hyper-parameters, where a policy acts, and what stays there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vlmprune.core.budget import Basis, Budget
from vlmprune.core.calibration import Calibrator, Measurement
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Positions, SiteRequest

NewlineRule = Literal["rows", "compete"]
"""What becomes of newline tokens: kept with each row that keeps tokens, or candidates like all others."""


@dataclass(frozen=True)
class PolicyMeta:
    """Facts about a policy, shown by ``vlmprune list`` and ``info``.

    Attributes:
        title: the paper's title, or what the policy is.
        arxiv: arXiv id, or None.
        venue: where it was published, if anywhere.
        training_free: False if it needs a calibrated or trained artefact.
        batch, video, any_resolution, multi_image: what it serves.
        code_licence: licence of the official code, for orientation.
    """

    title: str
    arxiv: str | None = None
    venue: str | None = None
    training_free: bool = True
    batch: bool = True
    video: bool = True
    any_resolution: bool = True
    multi_image: bool = True
    code_licence: str = "no official code"


@dataclass(frozen=True)
class Policy:
    """Base of all policies. Subclasses are frozen dataclasses of hyper-parameters.

    A policy is pure: ``select`` maps a context to a selection and keeps nothing. One method per site,
    ``select_<site>``, does the work.

    Args:
        keep: budget of visual tokens (see :meth:`vlmprune.core.budget.Budget.parse`; a list is stored as a
            tuple); what it is a share of is the class's ``basis``.
        positions: ``auto`` (what the source says, ``keep`` on M-RoPE models), ``keep``, ``compact``, or for merging
            before the decoder ``virtual`` (see :class:`~vlmprune.core.sites.SiteRequest`).
    """

    meta: ClassVar[PolicyMeta]
    name: ClassVar[str] = ""
    basis: ClassVar[Basis] = "site"
    default_positions: ClassVar[Positions] = "compact"
    is_wrapper: ClassVar[bool] = False
    takes_flops: ClassVar[bool] = False
    measured: ClassVar[bool] = False
    newlines: ClassVar[NewlineRule] = "rows"
    instead_of_keep: ClassVar[tuple[str, ...]] = ()
    """Parameters that say how much is kept in place of ``keep``."""

    keep: Any = field(default=1.0, kw_only=True)
    positions: Positions = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        Budget.parse(self.keep)
        object.__setattr__(self, "keep", _frozen(self.keep))
        if self.positions not in ("auto", "keep", "compact", "virtual"):
            raise InputError(f"positions={self.positions!r} is unknown; give 'auto', 'keep', 'compact' or 'virtual'.")

    @property
    def budget(self) -> Budget:
        """The parsed budget."""
        return Budget.parse(self.keep)

    def leaves(self) -> tuple[Policy, ...]:
        """The policies that act, in order: itself, or a wrapper's members."""
        return (self,)

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        """Where this policy acts on a model and what it needs there; empty if it does nothing there.

        Raises:
            InputError: a hyper-parameter does not fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement requests().")

    def select(self, context: Context) -> Selection:
        """Decide one site: dispatches to ``select_<site>``."""
        method = getattr(self, f"select_{context.site.value}", None)
        if method is None:
            raise NotImplementedError(f"{type(self).__name__} requested {context.site} but has no method for it.")
        return method(context)

    def reduces(self, info: ModelInfo) -> bool:
        """True if the settings ask for fewer tokens than the dense model has (False at ``keep=1.0``)."""
        return not self.budget.is_all

    def is_random(self, info: ModelInfo) -> bool:
        """True if this policy draws, so that per-item seeds must be derived."""
        return False

    def needs_processor(self) -> bool:
        """True if the policy acts on images before the model sees them."""
        return False

    def calibration(self, info: ModelInfo, *, calls: int = 50, seed: int = 0) -> Calibrator | None:
        """The calibration this policy can run on a model, or None.

        Args:
            info: the model. calls: settings to try. seed: of the search.
        """
        return None

    def measurement(self, info: ModelInfo, *, tolerance: float = 1e-3, least: int = 10) -> Measurement | None:
        """What this policy measures on a model before it can be applied, or None; ``measured`` says so beforehand.

        Args:
            info: the model. tolerance: standard error at which it ends. least: batches that it takes at least.
        """
        return None

    def reset(self) -> None:
        """Forget state between sequences; stateless policies do nothing."""

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        """FLOPs (2 per multiply-add) of one item's scores and selection, or None where not stated."""
        return None

    def resolve_positions(self, info: ModelInfo, source: Positions | None = None) -> Positions:
        """The position mode of a site: the caller's, else ``keep`` on M-RoPE models, else ``source``."""
        if self.positions != "auto":
            return self.positions
        return "keep" if info.mrope else (source or self.default_positions)

    def check_count(self, info: ModelInfo) -> None:
        """Refuse a budget that this policy cannot meet on a model.

        Raises:
            BudgetError: a number of tokens above the fixed number per image, or a FLOP share for a policy
                that does not take one.
        """
        if not self.takes_flops and self.budget.has_flops:
            raise BudgetError(f"{self.name!r} takes a share or a number of tokens, not {self.budget}.")
        check_tokens(self.budget, info)


def check_tokens(budget: Budget, info: ModelInfo) -> None:
    """Refuse a token count above the model's fixed tokens per image, in ``budget`` or any of its parts."""
    for part in budget.parts or ():
        check_tokens(part, info)
    most = info.tokens_per_image
    if budget.tokens is not None and most is not None and budget.tokens > most:
        raise BudgetError(
            f"keep={budget.tokens} tokens, but {info.model_class} has {most} visual tokens per image; "
            f"give at most {most}, or a share in (0, 1]."
        )


def _frozen(keep: Any) -> Any:
    """Lists as tuples, so that a policy can be hashed and equals its copy from a file."""
    return tuple(_frozen(part) for part in keep) if isinstance(keep, (list, tuple)) else keep
