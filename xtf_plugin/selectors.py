"""Selectors at work: their scorers run on the documents, with predictions out of the store or a reference.

What a scorer gives back is checked before anything is decided with it: a wrong shape or nothing but NaN would read as
"keep everything".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .batches import ScoringStats
from .documents import DocumentSet
from .errors import XTFError, XTFUserError
from .excerpts import Excerpted, predictions_without
from .passes import stored_scores
from .ranks import ALONE, Ranks
from .records import StoredScores
from .scorers import ReferenceConfig, Scorer, ScoringContext, registry
from .sentences import line_breaks
from .store import Index, ScoreStore

if TYPE_CHECKING:
    from .config import XTFConfig

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
MAIN_KEY = "xtf.reference.model"  # how messages about a separate reference begin


class StoredPredictions:
    """What any reference predicts for all completion tokens, each worked out once.

    Args:
        config: the block.
        documents: of the dataset.
        main: the provider of the run's own reference.
        references: makes the provider of another one; None: there can be no other.
        known: what the run's own reference says, if it is there already.
        ranks: of the run.
        index: see `ScoreStore`.

    Attributes:
        known: the same, also once a scorer has asked for them.
        main_pass: what it took to get `known` then, and how many documents came from the store.
        passes: the same about other references, for the summary.
        excerpts: what it took to score other documents than the dataset's, and how many of them came from the store.
        warnings: what to tell about the references.
        whole: whether these are the documents of a whole dataset, in which some score has to be defined.
    """

    whole = True

    def __init__(
        self,
        config: XTFConfig,
        documents: DocumentSet,
        main: Any,
        references: Callable[[ReferenceConfig], Any] | None,
        known: StoredScores | None,
        *,
        progress: bool,
        ranks: Ranks = ALONE,
        index: Index | None = None,
    ) -> None:
        self.ranks = ranks
        self.config, self.documents, self.known = config, documents, known
        self.progress = progress
        self.main_pass: tuple[ScoringStats, int] | None = None
        self.passes: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.excerpts, self.stored_excerpts = ScoringStats(), 0
        self._main, self._references = main, references
        self._others: dict[ReferenceConfig, StoredScores] = {}
        self._providers: dict[ReferenceConfig, Any] = {}
        self._fingerprints: dict[int, str] = {}  # providers live as long as this does
        self._stack, self._keeps = ExitStack(), False
        self._open: tuple[Any, Any] | None = None
        self._index, self._stores = index, dict[str, ScoreStore]()

    def under(self, reference: ReferenceConfig | None, documents: DocumentSet | None = None) -> StoredScores:
        """What a reference predicts, None: the run's own; see `ScoringContext.predictions`.

        Args:
            reference: who predicts.
            documents: None: the dataset's. Others are looked up and scored on every call, and kept in the store alone.
        """
        if documents is not None:
            scores, _, stats, reused = self._scored(self._provider(reference), documents)
            self.excerpts.add(stats)
            self.stored_excerpts += reused
            return scores
        if reference is None:
            if self.known is None:
                self.known, about, stats, reused = self._scored(self._main, self.documents)
                self._check(self.known, about)
                self.main_pass = stats, reused
            return self.known
        if reference not in self._others:
            scores, about, stats, reused = self._scored(self._provider(reference), self.documents)
            self._check(scores, about)
            self._others[reference] = scores
            self.passes.append({**about, **asdict(stats), "stored_documents": reused})
        return self._others[reference]

    def __enter__(self) -> StoredPredictions:
        """Keep the reference that is asked last open until the end, so that several rounds load it once."""
        self._keeps = True
        return self

    def __exit__(self, *_: object) -> None:
        """Free it."""
        self._keeps = False
        self._close()

    def _close(self) -> None:
        self._stack.close()
        self._open = None

    @contextmanager
    def _opened(self, provider: Any) -> Iterator[Any]:
        """The reference; one at a time is held in memory."""
        if self._open is None or self._open[0] is not provider:
            self._close()
            self._open = provider, self._stack.enter_context(provider.open())
        try:
            yield self._open[1]
        finally:
            if not self._keeps:
                self._close()

    def _fingerprint(self, provider: Any) -> str:
        """Of a provider, once: it may have to read all files of a model for it."""
        if id(provider) not in self._fingerprints:
            found = self._fingerprints[id(provider)] = self.ranks.run_with_heartbeat(provider.fingerprint)
            self.ranks.agree(found.encode(), "reference")
        return self._fingerprints[id(provider)]

    def about_excerpts(self) -> dict[str, Any]:
        """For the summary; nothing if there were none."""
        told = {**asdict(self.excerpts), "stored_documents": self.stored_excerpts}
        return {"excerpts": told} if self.excerpts.documents or self.stored_excerpts else {}

    def _provider(self, reference: ReferenceConfig | None) -> Any:
        if reference is None:
            return self._main
        if reference not in self._providers:  # it reads its tokenizer and files once
            if self._references is None:
                raise XTFError(f"the reference {reference.model} cannot be loaded here: only the run's own is known.")
            self._providers[reference] = self.ranks.run_with_heartbeat(partial(self._references, reference))
        return self._providers[reference]

    def _check(self, scores: StoredScores, about: dict[str, Any]) -> None:
        told = check_finite(scores.logprobs, self.documents.completion_positions, about)
        self.warnings += [f"{about['name']}: {warning}" for warning in told]

    def _scored(self, provider: Any, documents: DocumentSet) -> tuple[StoredScores, dict[str, Any], ScoringStats, int]:
        """Stored scores as they are, missing ones from one opening of the reference; and what that took."""
        fingerprint = self._fingerprint(provider)
        description = {**provider.description(), "fingerprint": fingerprint}
        if fingerprint not in self._stores:
            root = self.config.resolved_cache_dir()
            self._stores[fingerprint] = ScoreStore(root, fingerprint, None, description=description, index=self._index)
        label = "scoring" if documents is self.documents else "second look"
        budget = None if self.config.batch_tokens == "auto" else int(self.config.batch_tokens)
        with ExitStack() as stack, self._stores[fingerprint] as store:
            stored, stats, reused = stored_scores(
                store,
                documents,
                lambda: stack.enter_context(self._opened(provider)),
                (),
                batch_tokens=budget,
                progress=self.progress,
                label=label,
                ranks=self.ranks,
            )
        return stored, description, stats, reused


def check_finite(logprobs: Floats, positions: NDArray[np.int32], reference: dict[str, Any]) -> list[str]:
    """Refuse a reference that gives no finite log-probability; tell how many of a sound one's are undefined."""
    expected = positions > 0  # nothing predicts a document's first token
    undefined = int((~np.isfinite(logprobs[expected])).sum())
    total = int(expected.sum())
    if total and undefined == total:
        raise XTFError(
            f"the reference {reference.get('name')} gives NaN or infinite log-probabilities for all {total} "
            "completion tokens: "
            "its weights or its precision are broken. Try `reference.dtype: float32`, or another reference."
        )
    if undefined:
        return [
            f"{undefined} of {total} completion tokens have a NaN or infinite log-probability under the reference; an "
            "undefined score never drops a token"
        ]
    return []


def scorers(config: XTFConfig) -> dict[str, Scorer]:
    """A scorer for every selector of the block, by the selector's name."""
    return {name: registry.find(part.scorer)(part) for name, part in config.selectors.items()}


def score_selectors(
    config: XTFConfig,
    tokenizer: Any,
    source: StoredPredictions,
    current: Callable[[], Floats] | None = None,
    segments: Callable[[str], NDArray[np.int64]] | None = None,
    protected: NDArray[np.bool_] | None = None,
    forced: NDArray[np.bool_] | None = None,
) -> dict[str, Floats | None]:
    """Scores of every selector; with `current`, of those alone that evolve.

    Args:
        config: the block.
        tokenizer: the training tokenizer.
        source: predictions of references.
        current: the same under the model being trained as it stands. None: training has not begun, and a selector that
            evolves gets None instead of scores.
        segments: gives the first completion tokens of each `sentence` or `line`.
        protected: (M,) completion tokens that no rule may drop; forced: those that go in any case.

    Raises:
        XTFUserError: a reference cannot be used; names the selector.
        XTFError: a scorer gives something else than (M,) float32, or NaN alone; names selector and package.
    """
    found: dict[str, Floats | None] = {}
    breaks: list[NDArray[np.bool_]] = []

    def without(hidden: Any, starts: Any, wanted: Any, reference: ReferenceConfig | None) -> Excerpted:
        if not breaks:  # one read of the vocabulary for all selectors and rounds
            breaks.append(line_breaks(tokenizer, source.documents.input_ids[source.documents.completion]))
        predict = partial(source.under, reference)
        return predictions_without(source.documents, hidden, starts, wanted, breaks[0], predict)

    context = ScoringContext(source.documents, tokenizer, source.under, current, segments, without, protected, forced)
    with source:
        _run(context, scorers(config), source, found)
    return found


def _run(
    context: ScoringContext, chosen: dict[str, Scorer], source: StoredPredictions, found: dict[str, Floats | None]
) -> None:
    """Scores of the selectors that are to be scored now, into `found`."""
    current = context.evolving
    for name, scorer in chosen.items():
        if current and not scorer.evolves:
            continue
        found[name] = None
        if scorer.evolves and not current:
            source.under(None)  # what later epochs are held against is the model before training
            continue
        try:
            scores = scorer.score(context)
        except XTFUserError as error:
            said = str(error)
            if not said.startswith(MAIN_KEY):
                raise
            own = f"xtf.selectors.{name}.reference.model{said.removeprefix(MAIN_KEY)}"
            raise XTFUserError(own) from error
        found[name] = _checked(name, scorer, scores, len(context.token_ids), source.whole)
        source.warnings += [f"{name}: {told}" for told in context.warnings]
        context.warnings.clear()


def _checked(name: str, scorer: Scorer, scores: Any, size: int, whole: bool) -> Floats:
    """The scores themselves, once they are what selection can work with."""
    owner = f"the selector {name}: the scorer {scorer.name} of {registry.package_of(scorer.name)}"
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (size,):
        told = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        raise XTFError(f"{owner} gave {told} where float32 ({size},) is needed, one score per completion token.")
    if whole and size and np.isnan(scores).all():
        raise XTFError(
            f"{owner} gave NaN for all {size} completion tokens, so it could drop nothing. Its data or its reference "
            "does not fit; ask that package's authors, or remove the selector."
        )
    return scores


def facts(config: XTFConfig) -> dict[str, dict[str, Any]]:
    """What to tell about each selector: its scorer, that scorer's version and package."""
    return {
        name: {
            "scorer": scorer.name,
            "version": scorer.version,
            "package": registry.package_of(scorer.name),
            "evolves": scorer.evolves,
        }
        for name, scorer in scorers(config).items()
    }
