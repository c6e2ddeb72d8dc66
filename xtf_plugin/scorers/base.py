"""The interface of a scorer: a config, a function from documents to one score per completion token, and its context.

Other packages depend on this module. A scorer returns numbers; unit, window, rule, cap, protection, `min_kept` and
report are the same for all scores. Imports no torch, so that a block is validated without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from ..data.predictions import Predictions as Predictions
from ..fields import Block, Drop, Layers, Name, Problems, ReferenceConfig, Share, Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..data.documents import DocumentSet
    from ..data.ragged import Bools, Floats, Ints
    from ..data.splices import Splices

T = TypeVar("T", bound="np.generic")
DROP = "Which tokens are dropped: exactly one rule. Low scores are dropped; `cluster` drops the class that it names."


class ScoreConfig(Block):
    """A score: a scorer, the unit that gets one number, and the rule; scorers derive from it to add keys as fields."""

    scorer: Name = Field(description="Name of a registered scorer.")
    drop: Drop = Field(description=DROP)
    unit: Literal["token", "sentence", "line"] = Field(
        default="token", description="Scores are averaged over it before the rule, which drops or keeps all of it."
    )
    window: Window = Field(
        default=1, description="Before the rule, scores are averaged over this many (odd) neighbouring tokens."
    )
    scope: Literal["document", "dataset"] = Field(
        default="dataset", description="Whose quantiles a fence or a quantile uses: the document's, or the dataset's."
    )
    scale: Literal["linear", "log"] = Field(default="linear", description="What a fence's quartiles are taken over.")
    max_fraction: Share | None = Field(
        default=None, description="Largest share of a document's completion that this score may drop; null: no cap."
    )

    @model_validator(mode="after")
    def _every_key_acts(self) -> ScoreConfig:
        idle: list[tuple[str, Any, str]] = []
        none = f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}}"
        if self.scale == "log" and self.drop.fence is None:
            idle.append(("scale", self.scale, none))
        if self.scope != type(self).model_fields["scope"].default and self.drop.fence is self.drop.quantile:
            idle.append(("scope", self.scope, f"{none} or {{quantile: q}}"))
        if self.window > 1 and self.unit != "token":
            idle.append(("window", self.window, f"has no effect beside `unit: {self.unit}`; remove it"))
        if idle:
            raise Problems(*idle)
        return self


class ScoreSource(Protocol):
    """Provides a context with what depends on a model or a text; `scoring.cached_scores` implements it."""

    def predictions(self, reference: ReferenceConfig | None) -> Predictions: ...  # noqa: D102
    def predictions_of(self, splices: Splices, reference: ReferenceConfig | None) -> Predictions: ...  # noqa: D102
    def attention_received(self, layers: Any) -> Floats: ...  # noqa: D102
    def segments(self, unit: str) -> Ints: ...  # noqa: D102
    def embeddings(self, token_ids: Ints, kind: str) -> Floats: ...  # noqa: D102
    def vocabulary_size(self) -> int: ...  # noqa: D102
    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats: ...  # noqa: D102
    def marks(self, column: str, form: str, text: str | None) -> Bools: ...  # noqa: D102


class ScoringContext:
    """The input of a scorer: the dataset's distinct documents and a reference's predictions.

    The M completion tokens of N documents lie in flat read-only arrays, document after document.

    Args:
        documents: the distinct documents, prompts included.
        tokenizer: the training tokenizer.
        source: provides what depends on a model or a text.
        protected, forced: see below; None: no token.

    Attributes:
        token_ids: ids of the completion tokens, (M,).
        positions: index of each within its document, prompt included, (M,); nothing predicts index 0.
        offsets: document `i` holds the completion tokens `offsets[i]` up to `offsets[i + 1]`, (N + 1,).
        counts: how often each document occurs in the dataset, (N,); it is scored once.
        protected: flags of tokens that no rule may drop, (M,); see `protect` in the block.
        forced: flags of tokens that are dropped whatever the scores are, unless protected, (M,); see `force_drop`.
        scores: scores of the block that were computed before this one, by name; see `Scorer.reads_scores`.
        parts: the scores' parts of the block, by name.
        warnings: texts that were passed to `warn`.
    """

    def __init__(
        self,
        documents: DocumentSet,
        tokenizer: Any,
        source: ScoreSource,
        protected: Bools | None = None,
        forced: Bools | None = None,
    ) -> None:
        import numpy as np  # not at the top: a block is read without NumPy

        self.documents, self.tokenizer, self.source = documents, tokenizer, source
        self.token_ids: NDArray[np.int32] = _read_only(documents.completion_ids)
        self.positions: NDArray[np.int32] = _read_only(documents.completion_positions)
        self.offsets: Ints = _read_only(documents.completion_offsets)
        self.counts: Ints = _read_only(documents.counts)
        none = np.zeros(len(self.token_ids), dtype=bool)
        self.protected: Bools = _read_only(none if protected is None else protected)
        self.forced: Bools = _read_only(none if forced is None else forced)
        self.scores: dict[str, Floats] = {}
        self.parts: Mapping[str, ScoreConfig] = {}
        self.warnings: list[str] = []

    @property
    def logprobs(self) -> Floats:
        """Log-probabilities under the run's own reference: `log_probabilities()`."""
        return self.log_probabilities()

    def log_probabilities(self, reference: ReferenceConfig | None = None) -> Floats:
        """Natural-log probability of every completion token under a reference, (M,) float32; NaN: undefined.

        Stored by content, so a second run does not load the reference. A separate model is freed before training.

        Args:
            reference: as in the block; None, or one without a `model`: the run's own reference.

        Raises:
            XTFUserError: the reference cannot be loaded, or has another tokenizer.
            XTFError: it gives no finite log-probability at all.
        """
        return _read_only(self.predictions(reference).logprobs)

    def predictions(self, reference: ReferenceConfig | None = None) -> Predictions:
        """Log-probability, entropy and deviation at every completion token; otherwise as `log_probabilities`."""
        return self.source.predictions(_named(reference))

    def predictions_of(self, splices: Splices, reference: ReferenceConfig | None = None) -> Predictions:
        """What a reference predicts in splices of the documents: in a part of each, right after its beginning.

        The common beginning of a document's splices is read once. Results are stored by content. Ask for splices that
        begin with whole prompts before `predictions`: then prompts are read once for both.

        Args:
            splices: see `data.splices.Splices`.
            reference: as in `log_probabilities`.

        Returns:
            (sum of the splices' lengths,) float32 each, splice after splice.
        """
        return self.source.predictions_of(splices, _named(reference))

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
            token_ids: (n,).
            kind: `input`: rows of the embedding layer; `output`: the last hidden state of the token alone.
        """
        return self.source.embeddings(token_ids, kind)

    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """A table computed from `embeddings`, (n,) float32; stored under `key` with the reference's scores.

        Args:
            key: hex digest of everything besides the reference that the table depends on.
            compute: computes the table; called only if no rank has it stored.
        """
        return _read_only(self.source.vocabulary_table(key, compute))

    def marks(self, column: str, form: str, text: str | None = None) -> Bools:
        """Completion tokens that a column of the dataset marks, (M,).

        Args:
            column, form, text: `column`, `format` and `text` of the scorer `column`, or of a config derived from it.

        Raises:
            XTFUserError: no score of the block reads this column, or a document is not among the rows that it was read
                from.
        """
        return _read_only(self.source.marks(column, form, text))

    def warn(self, text: str) -> None:
        """Warn the user: in the terminal and in summary.json, under the score's name."""
        self.warnings.append(text)

    def segments(self, unit: Literal["sentence", "line"]) -> Ints:
        """Indices of the first completion token of every sentence or line, (S,) from 0; see docs/method.md."""
        return _read_only(self.source.segments(unit))


Score = Callable[[ScoringContext, Any], "Floats"]


@dataclass(frozen=True)
class Scorer:
    """A registered scorer; made by the decorator `scorer`.

    Args:
        name: what the block names, and under which the entry point registers it.
        score: `score(context, config)` -> (M,) float32, one per completion token: low scores are dropped, NaN is
            undefined and never dropped. Deterministic, so that every rank and every restart gets the same masks.
        Config: its part of the block, `ScoreConfig` or a class derived from it.
        version: whole number, raised when the same inputs get other scores; reported in summary.json.
        per_document: a document's scores depend on the document and the options alone, so streams can be scored.
        reads_attention: it runs before the others, so that one pass of the reference serves all.
        reads_scores: it runs after the others, because it reads `context.scores`.
        finds_nothing: that its rule fires on nothing is not a reason for a warning: clean data has nothing to find.
        stored: scores of a large dataset are stored as a whole: they depend on nothing but documents, tokenizer,
            `protected`, `forced`, options, the run's own reference and, with `reads_scores`, scores and their options.
        seen: maps averaged scores to what the rule sees; None: they are not changed.
        frozen: `frozen(context, config)` -> a `score` for later documents of a stream, using statistics of the
            documents of `context`. None: `per_document` scorers need none; others are refused for streams.
    """

    name: str
    score: Score
    Config: type[ScoreConfig] = ScoreConfig
    version: int = 1
    per_document: bool = False
    reads_attention: bool = False
    reads_scores: bool = False
    finds_nothing: bool = False
    stored: bool = False
    seen: Callable[[Floats], Floats] | None = None
    frozen: Callable[[ScoringContext, Any], Score] | None = None


def scorer(name: str, config: type[ScoreConfig] = ScoreConfig, **options: Any) -> Callable[[Score], Scorer]:
    """Decorator that makes a `Scorer` of a function `score(context, config)`; `options` are further fields of it."""
    return lambda score: Scorer(name, score, config, **options)


def _named(reference: ReferenceConfig | None) -> ReferenceConfig | None:
    """The reference, or None for the run's own, which has no model name."""
    return reference if reference is not None and reference.model else None


def _read_only(array: NDArray[T]) -> NDArray[T]:
    """A read-only view: all scorers share these arrays, and selection uses them afterwards."""
    view: NDArray[T] = array.view()
    view.flags.writeable = False
    return view
