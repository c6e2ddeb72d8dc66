"""The interface of a scorer: the keys of its part of the block, what it is given, and the scores it gives back.

Kept small because other packages depend on it: a scorer turns documents into one number per completion token, low
means drop, and everything after that (window, rule, cap, protection, floor, report) is the same for all of them.
Imports no torch, so that a block is validated without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from ..config_rules import Block, Drop, Finite, Name, NonNegative, Problems, Quantile, ReferenceConfig, Share, Window
from ..errors import XTFError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..documents import DocumentSet

    Floats = NDArray[np.float32]

T = TypeVar("T", bound="np.generic")


class SelectorDrop(Drop):
    """Rule over a scorer's scores, low ones go: exactly one of quantile, below and fence."""

    rules = (("quantile",), ("below",), ("fence",))
    quantile: Quantile | None = Field(default=None, description="Drop the lowest share of the scores.")
    below: Finite | None = Field(default=None, description="Drop scores below this, in units of the scorer's score.")
    fence: NonNegative | None = Field(default=None, description="Drop scores below Q1 - fence * (Q3 - Q1).")


class SelectorConfig(Block):
    """One selector: a scorer, its own keys, and what happens to its scores.

    A scorer that has keys of its own derives from this class and adds them as fields; unknown keys stay refused.
    """

    scorer: Name = Field(description="Name of a registered scorer.")
    drop: SelectorDrop = Field(description="Which tokens go: exactly one rule, over the scorer's scores. Low ones go.")
    scope: Literal["document", "dataset"] = Field(
        default="dataset",
        description="Whose quantiles a fence or a quantile uses: each document's own, or the dataset's.",
    )
    window: Window = Field(
        default=1,
        description="Before the rule, scores averaged over this many (odd) neighbours, or over the token's sentence or "
        "line.",
    )
    max_fraction: Share | None = Field(
        default=None,
        description="Never drop more than this share of a document's completion through this selector; null: no cap.",
    )

    @model_validator(mode="after")
    def _scope_acts(self) -> SelectorConfig:
        if self.scope == "document" and self.drop.below is not None:
            why = f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}} or {{quantile: q}}"
            raise Problems(("scope", self.scope, why))
        return self


class Predictions(Protocol):
    """What a reference predicts at every completion token, (M,) float32 each, in nats; NaN where undefined.

    Attributes:
        logprobs: log-probability of the token.
        entropy: mean surprisal of a token drawn from the reference's own distribution there.
        deviation: standard deviation of that surprisal.
    """

    @property
    def logprobs(self) -> Floats: ...  # noqa: D102
    @property
    def entropy(self) -> Floats: ...  # noqa: D102
    @property
    def deviation(self) -> Floats: ...  # noqa: D102


class ScoringContext:
    """What a scorer is given: the dataset's distinct documents, and what any reference predicts in them.

    M completion tokens of N documents lie in flat arrays, document after document; all arrays are read-only.

    Args:
        documents: the distinct documents, prompts included.
        tokenizer: the training tokenizer.
        predictions: a reference (None: the run's own) -> what it predicts.
        segments: `sentence` or `line` -> index of the first completion token of each.
        without: what `predictions_without` does, the reference last.
        protected: (M,) completion tokens that no rule may drop; forced: (M,) those that go in any case. None: none.

    Attributes:
        warnings: what `warn` was given.
    """

    def __init__(
        self,
        documents: DocumentSet,
        tokenizer: Any,
        predictions: Callable[[ReferenceConfig | None], Predictions],
        segments: Callable[[str], NDArray[np.int64]] | None = None,
        without: Callable[..., Predictions] | None = None,
        protected: NDArray[np.bool_] | None = None,
        forced: NDArray[np.bool_] | None = None,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.warnings: list[str] = []
        self._protected, self._forced, self._without = protected, forced, without
        self._predictions, self._segments = predictions, segments
        self._cut: dict[str, NDArray[np.int64]] = {}
        self._positions = documents.completion_positions
        self._offsets = documents.completion_offsets
        self._token_ids = documents.input_ids[documents.completion]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Ids of the completion tokens, (M,)."""
        return _read_only(self._token_ids)

    @property
    def positions(self) -> NDArray[np.int32]:
        """Place of each completion token within its document, prompt included, (M,); nothing predicts place 0."""
        return _read_only(self._positions)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Document `i` holds the completion tokens `offsets[i]` up to `offsets[i + 1]`, (N + 1,)."""
        return _read_only(self._offsets)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each document occurs in the dataset, (N,); its tokens are scored once."""
        return _read_only(self.documents.counts)

    @property
    def logprobs(self) -> Floats:
        """Log-probabilities under the run's own reference; the same as `log_probabilities()`."""
        return self.log_probabilities()

    def log_probabilities(self, reference: ReferenceConfig | None = None) -> Floats:
        """Natural-log probability of every completion token under a reference, (M,) float32; NaN: undefined.

        Stored by content: a second run neither loads nor runs the reference. A separate model is loaded for the scoring
        pass and freed before training.

        Args:
            reference: as in the block; None, or one without a `model`: the run's own reference.

        Raises:
            XTFUserError: the reference cannot be loaded, or its tokenizer is another one.
            XTFError: it gives no finite log-probability at all.
        """
        return _read_only(self.predictions(reference).logprobs)

    def predictions(self, reference: ReferenceConfig | None = None) -> Predictions:
        """Log-probability, entropy and deviation at every completion token; otherwise as `log_probabilities`."""
        return self._predictions(_named(reference))

    def predictions_without(
        self,
        hidden: NDArray[np.bool_],
        starts: NDArray[np.int64],
        wanted: NDArray[np.int64],
        reference: ReferenceConfig | None = None,
    ) -> Predictions:
        """What a reference predicts in some segments when it has not read certain tokens before them.

        Equals, per wanted segment: `predictions` for a document of all tokens before the segment that are not hidden,
        and the segment. Prompts and other turns stay, and so does the line break of a line of which something does.
        Each segment takes a forward over that document; results are stored by content.

        Args:
            hidden: (M,) completion tokens to leave out; in the segment itself they stay.
            starts: (S,) first completion token of each segment, ascending from 0, as from `segments`; none spans two
                documents or turns.
            wanted: (W,) indices into `starts`.
            reference: as in `log_probabilities`.

        Returns:
            (M,) float32 each; NaN outside the wanted segments.
        """
        if self._without is None:
            raise XTFError("this context gives no predictions for other documents than the dataset's.")
        return self._without(hidden, starts, wanted, _named(reference))

    @property
    def protected(self) -> NDArray[np.bool_]:
        """Completion tokens that no rule may drop, special tokens among them, (M,); see `protect` in the block."""
        return self._marks(self._protected)

    @property
    def forced(self) -> NDArray[np.bool_]:
        """Completion tokens that go whatever the scores say, unless protected, (M,); see `force_drop` in the block."""
        return self._marks(self._forced)

    def _marks(self, marks: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        import numpy as np

        return _read_only(np.zeros(len(self._token_ids), dtype=bool) if marks is None else marks)

    def warn(self, text: str) -> None:
        """Tell the user something: it reaches the terminal and summary.json under the selector's name."""
        self.warnings.append(text)

    def segments(self, unit: Literal["sentence", "line"]) -> NDArray[np.int64]:
        """Index of the first completion token of every sentence or line, (S,) ascending from 0; see docs/method.md.

        Raises:
            XTFError: the context was made without a text to cut.
        """
        if self._segments is None:
            raise XTFError(f"this context does not tell where a {unit} begins.")
        if unit not in self._cut:
            self._cut[unit] = self._segments(unit)
        return _read_only(self._cut[unit])


class Scorer:
    """Base class of scorers: one score per completion token, low means drop.

    Attributes:
        name: under which the entry point registers it.
        version: whole number, raised when the same inputs get other scores; told in summary.json.
        Config: its part of the block, `SelectorConfig` or a class derived from it.
        per_document: a document's scores depend on nothing but the document and the options; `check_scorer` checks it.

    Args:
        config: the selector's part of the block, an instance of `Config`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type[SelectorConfig]] = SelectorConfig
    per_document: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def score(self, context: ScoringContext) -> Floats:
        """One float32 per completion token, (M,): low means drop; NaN is undefined and never dropped.

        Must be deterministic: the same masks have to come out in every process and after a restart.
        """
        raise NotImplementedError


def _named(reference: ReferenceConfig | None) -> ReferenceConfig | None:
    """The reference itself, or None for the run's own: one without a model."""
    return reference if reference is not None and reference.model else None


def _read_only(array: NDArray[T]) -> NDArray[T]:
    """A view that cannot be written to: every scorer sees the same arrays, and selection uses them after it."""
    view: NDArray[T] = array.view()
    view.flags.writeable = False
    return view
