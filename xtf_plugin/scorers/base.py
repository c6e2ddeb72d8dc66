"""The interface of a scorer: a config, a function from documents to one score per completion token, and its context.

Other packages depend on this module, so it is small. A scorer returns numbers; unit, window, rule, cap, protection,
`min_kept` and report are the same for all scores. Imports no torch, so that a block is validated without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from ..data.predictions import Predictions as Predictions
from ..fields import Block, Drop, Layers, Name, Problems, ReferenceConfig, Share, Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..data.documents import DocumentSet

    Floats = NDArray[np.float32]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

T = TypeVar("T", bound="np.generic")


class ScoreConfig(Block):
    """A score: a scorer with its own keys, the unit that is judged as a whole, and the rule that drops.

    A scorer with keys of its own derives from this class and adds them as fields.
    """

    scorer: Name = Field(description="Name of a registered scorer.")
    drop: Drop = Field(description="Which tokens are dropped: exactly one rule. Low scores are dropped.")
    unit: Literal["token", "sentence", "line"] = Field(
        default="token", description="What is judged as a whole: scores are averaged over it before the rule."
    )
    window: Window = Field(
        default=1, description="Before the rule, scores are averaged over this many (odd) neighbouring tokens."
    )
    scope: Literal["document", "dataset"] = Field(
        default="dataset",
        description="Whose quantiles a fence or a quantile uses: each document's own, or the dataset's.",
    )
    scale: Literal["linear", "log"] = Field(default="linear", description="What a fence's quartiles are taken over.")
    max_fraction: Share | None = Field(
        default=None,
        description="Never drop more than this share of a document's completion through this score; null: no cap.",
    )

    @model_validator(mode="after")
    def _every_key_acts(self) -> ScoreConfig:
        idle: list[tuple[str, Any, str]] = []
        if self.scale == "log" and self.drop.fence is None:
            idle.append(("scale", self.scale, f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}}"))
        if self.scope != type(self).model_fields["scope"].default and self.drop.fence is self.drop.quantile:
            why = f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}} or {{quantile: q}}"
            idle.append(("scope", self.scope, why))
        if self.window > 1 and self.unit != "token":
            why = f"has no effect beside `unit: {self.unit}`, which is averaged as a whole; remove one of them"
            idle.append(("window", self.window, why))
        if idle:
            raise Problems(*idle)
        return self


class ScoreSource(Protocol):
    """Where a context gets what depends on a model or a text; `scoring.cached_scores` implements it."""

    def predictions(self, reference: ReferenceConfig | None) -> Predictions: ...  # noqa: D102
    def predictions_without(  # noqa: D102
        self, hidden: Bools, starts: Ints, wanted: Ints, reference: ReferenceConfig | None
    ) -> Predictions: ...
    def attention_received(self, layers: Any) -> Floats: ...  # noqa: D102
    def segments(self, unit: str) -> Ints: ...  # noqa: D102
    def embeddings(self, token_ids: Ints, kind: str) -> Floats: ...  # noqa: D102
    def vocabulary_size(self) -> int: ...  # noqa: D102
    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats: ...  # noqa: D102


class ScoringContext:
    """What a scorer reads: the dataset's distinct documents, and what a reference says about them.

    M completion tokens of N documents lie in flat arrays, document after document. All arrays are read-only.

    Args:
        documents: the distinct documents, prompts included.
        tokenizer: the training tokenizer.
        source: answers what depends on a model or a text.
        protected: (M,) completion tokens that no rule may drop; forced: (M,) those that are always dropped unless
            protected. None: none.

    Attributes:
        warnings: what `warn` was given.
    """

    def __init__(
        self,
        documents: DocumentSet,
        tokenizer: Any,
        source: ScoreSource,
        protected: Bools | None = None,
        forced: Bools | None = None,
    ) -> None:
        self.documents, self.tokenizer, self.source = documents, tokenizer, source
        self.warnings: list[str] = []
        self._protected, self._forced = protected, forced
        self._token_ids = documents.input_ids[documents.completion]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Ids of the completion tokens, (M,)."""
        return _read_only(self._token_ids)

    @property
    def positions(self) -> NDArray[np.int32]:
        """Place of each completion token within its document, prompt included, (M,); nothing predicts place 0."""
        return _read_only(self.documents.completion_positions)

    @property
    def offsets(self) -> Ints:
        """Document `i` holds the completion tokens `offsets[i]` up to `offsets[i + 1]`, (N + 1,)."""
        return _read_only(self.documents.completion_offsets)

    @property
    def counts(self) -> Ints:
        """How often each document occurs in the dataset, (N,); its tokens are scored once."""
        return _read_only(self.documents.counts)

    @property
    def logprobs(self) -> Floats:
        """Log-probabilities under the run's own reference; the same as `log_probabilities()`."""
        return self.log_probabilities()

    def log_probabilities(self, reference: ReferenceConfig | None = None) -> Floats:
        """Natural-log probability of every completion token under a reference, (M,) float32; NaN: undefined.

        Stored by content: a second run does not load the reference. A separate model is loaded for the scoring pass and
        freed before training.

        Args:
            reference: as in the block; None, or one without a `model`: the run's own reference.

        Raises:
            XTFUserError: the reference cannot be loaded, or its tokenizer is another one.
            XTFError: it gives no finite log-probability at all.
        """
        return _read_only(self.predictions(reference).logprobs)

    def predictions(self, reference: ReferenceConfig | None = None) -> Predictions:
        """Log-probability, entropy and deviation at every completion token; otherwise as `log_probabilities`."""
        return self.source.predictions(_named(reference))

    def predictions_without(
        self, hidden: Bools, starts: Ints, wanted: Ints, reference: ReferenceConfig | None = None
    ) -> Predictions:
        """What a reference predicts in some segments when it has not read certain tokens before them.

        Equals, per wanted segment: `predictions` for a document of all tokens before the segment that are not hidden,
        and the segment. Prompts and other turns stay, and so does the line break of a line of which something stays.
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
        return self.source.predictions_without(hidden, starts, wanted, _named(reference))

    def attention_received(self, layers: Layers) -> Floats:
        """Attention that each completion token receives from later ones under the run's own reference, (M,) float32.

        1.0 is uniform attention; NaN for a document's last token. See `scoring.kernels.eager.attention_received`.

        Args:
            layers: whose attention is averaged: first, middle, last, all, or a list of indices.

        Raises:
            XTFUserError: the model has no such layer, or no attention that could be recorded.
        """
        return _read_only(self.source.attention_received(layers))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the reference's embedding layer."""
        return self.source.vocabulary_size()

    def embeddings(self, token_ids: Ints, kind: Literal["input", "output"]) -> Floats:
        """Context-free vectors of token ids from the run's own reference, (n, D) float32.

        Args:
            token_ids: (n,) token ids.
            kind: `input`: rows of the embedding layer; `output`: the last hidden state of the token alone.
        """
        return self.source.embeddings(token_ids, kind)

    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """A table that `compute` makes from `embeddings`, (n,) float32; stored under `key` with the reference's scores.

        Args:
            key: hex digest of everything besides the reference that the table depends on.
            compute: makes the table; called only if no rank has it stored.
        """
        return _read_only(self.source.vocabulary_table(key, compute))

    @property
    def protected(self) -> Bools:
        """Completion tokens that no rule may drop, special tokens among them, (M,); see `protect` in the block."""
        return self._flags(self._protected)

    @property
    def forced(self) -> Bools:
        """Completion tokens that are dropped whatever the scores say, unless protected, (M,); see `force_drop`."""
        return self._flags(self._forced)

    def _flags(self, flags: Bools | None) -> Bools:
        import numpy as np

        return _read_only(np.zeros(len(self._token_ids), dtype=bool) if flags is None else flags)

    def warn(self, text: str) -> None:
        """Warn the user: in the terminal and in summary.json, under the score's name."""
        self.warnings.append(text)

    def segments(self, unit: Literal["sentence", "line"]) -> Ints:
        """Index of the first completion token of every sentence or line, (S,) ascending from 0; see docs/method.md."""
        return _read_only(self.source.segments(unit))


Score = Callable[[ScoringContext, Any], "Floats"]


@dataclass(frozen=True)
class Scorer:
    """A registered scorer; made by the decorator `scorer`.

    Args:
        name: what the block names, and under which the entry point registers it.
        score: `score(context, config)` -> (M,) float32, one per completion token: low means drop; NaN is undefined and
            never dropped. Deterministic: the same masks have to come out in every process and after a restart.
        Config: its part of the block, `ScoreConfig` or a class derived from it.
        version: whole number, raised when the same inputs get other scores; reported in summary.json.
        per_document: a document's scores depend on nothing but the document and the options, so that streams can be
            scored; `testing.check_scorer` checks it.
        first: reads attention received, so it runs before the others and one pass serves all.
        seen: averaged scores -> what the rule sees; None: as they are.
        frozen: `frozen(context, config)` -> a `score` for later documents of a stream, with what the dataset of
            `context` decides; None: none is needed, or streams are refused.
    """

    name: str
    score: Score
    Config: type[ScoreConfig] = ScoreConfig
    version: int = 1
    per_document: bool = False
    first: bool = False
    seen: Callable[[Floats], Floats] | None = None
    frozen: Callable[[ScoringContext, Any], Score] | None = None


def scorer(name: str, config: type[ScoreConfig] = ScoreConfig, **options: Any) -> Callable[[Score], Scorer]:
    """Decorator that makes a `Scorer` of a function `score(context, config)`.

    Args:
        name: see `Scorer`.
        config: the scorer's part of the block.
        options: `version`, `per_document`, `first`, `seen`, `frozen`; see `Scorer`.
    """

    def made(score: Score) -> Scorer:
        return Scorer(name, score, config, **options)

    return made


def _named(reference: ReferenceConfig | None) -> ReferenceConfig | None:
    """The reference itself, or None for the run's own: one without a model."""
    return reference if reference is not None and reference.model else None


def _read_only(array: NDArray[T]) -> NDArray[T]:
    """A view that cannot be written to: every scorer sees the same arrays, and selection uses them after it."""
    view: NDArray[T] = array.view()
    view.flags.writeable = False
    return view
