"""What scorers ask of a reference, each worked out once: from the cache where it is stored, else from a scoring pass.

`run_scorers` runs the scorers of a block and checks what they return before anything is decided with it: a wrong shape
or nothing but NaN would read as "keep everything".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.documents import DocumentSet
from ..data.excerpts import Excerpted, predictions_without
from ..data.sentences import line_breaks
from ..errors import XTFError, XTFUserError
from ..fields import ReferenceConfig
from ..scorers import ScoreConfig, Scorer, ScoringContext, registry
from ..selection.text_rules import TextRules, segment_starts
from ..store.admin import warn_of_unused_scores
from ..store.records import Records, StoredScores
from ..store.store import Index, ScoreStore, cached_table, reference_folder, store_table, table_name
from .batching import ScoringStats
from .distributed import ALONE, Ranks, open_on_all, pool
from .engine import gather_vectors, score
from .reference import Reference, resolve_layers

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ..config.block import XTFConfig

Floats = NDArray[np.float32]
MAIN_KEY = "xtf.reference.model"  # how messages about a separate reference begin


class ReferenceProvider(Protocol):
    """A reference that may not be loaded yet."""

    def fingerprint(self) -> str:
        """Hex key of everything its scores depend on."""

    def description(self) -> dict[str, Any]:
        """What to report of it: name, quantisation, dtype."""

    def text_config(self) -> Any:
        """Config of its language model."""

    def open(self) -> AbstractContextManager[Reference]:
        """The reference, ready to score; a separate one is freed on exit."""


class ScoreSource:
    """Implements `scorers.base.ScoreSource`: predictions, attention and embeddings of any reference, on all ranks.

    A context manager: the reference that was asked last stays open until the end, so that several rounds load it once.
    One at a time is held in memory.

    Args:
        config: the block.
        documents: of the dataset.
        tokenizer: the training tokenizer.
        main: the provider of the run's own reference.
        references: makes the provider of another one; None: there can be no other.
        progress: show a bar.
        ranks: of the run.

    Attributes:
        known: what the run's own reference predicts, once it was asked.
        stats, reused: what scoring with it took, and how many documents came from the store.
        passes: the same about other references, for the summary.
        excerpts, stored_excerpts: the same about other documents than the dataset's.
        warnings: about the references.
    """

    whole = True  # the documents are a whole dataset, in which some score has to be defined

    def __init__(
        self,
        config: XTFConfig,
        documents: DocumentSet,
        tokenizer: Any,
        main: ReferenceProvider,
        references: Callable[[ReferenceConfig], ReferenceProvider] | None = None,
        *,
        progress: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.documents, self.tokenizer = config, documents, tokenizer
        self.progress, self.ranks = progress, ranks
        self.known: StoredScores | None = None
        self.stats, self.reused = ScoringStats(), 0
        self.excerpts, self.stored_excerpts = ScoringStats(), 0
        self.passes: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._main, self._references = main, references
        self._attention: dict[tuple[int, ...], Floats] = {}
        self._others: dict[ReferenceConfig, StoredScores] = {}
        self._providers: dict[ReferenceConfig, ReferenceProvider] = {}
        self._fingerprints: dict[int, str] = {}  # providers live as long as this does
        self._index: Index = {}
        self._stores: dict[tuple[str, str | None], ScoreStore] = {}
        self._stack = ExitStack()
        self._open: tuple[ReferenceProvider, Reference] | None = None
        self._breaks: NDArray[np.bool_] | None = None

    def __enter__(self) -> ScoreSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the reference that is open."""
        self._stack.close()
        self._open = None

    def predictions(self, reference: ReferenceConfig | None = None) -> StoredScores:
        """See `ScoringContext.predictions`; None: the run's own reference."""
        if reference is None:
            if self.known is None:
                self._score_main(())
            assert self.known is not None
            return self.known
        if reference not in self._others:
            scores, about, stats, reused = self._scored(self._provider(reference), self.documents, ())
            self._check(scores, about, f"{about.get('name')}: ")
            self._others[reference] = scores
            self.passes.append({**about, **asdict(stats), "stored_documents": reused})
        return self._others[reference]

    def attention_received(self, layers: Any) -> Floats:
        """See `ScoringContext.attention_received`."""
        chosen = resolve_layers(layers if isinstance(layers, str) else list(layers), self._main.text_config())
        if chosen not in self._attention:
            found = self._score_main(chosen).attention
            assert found is not None
            self._attention[chosen] = found
        return self._attention[chosen]

    def predictions_without(
        self, hidden: Any, starts: Any, wanted: Any, reference: ReferenceConfig | None = None
    ) -> Excerpted:
        """See `ScoringContext.predictions_without`."""
        if self._breaks is None:  # one read of the vocabulary for all scores and rounds
            ids = self.documents.input_ids[self.documents.completion]
            self._breaks = line_breaks(self.tokenizer, ids)
        predict = partial(self._elsewhere, reference)
        return predictions_without(self.documents, hidden, starts, wanted, self._breaks, predict)

    def segments(self, unit: str) -> NDArray[np.int64]:
        """See `ScoringContext.segments`."""
        return segment_starts(self.documents, self.tokenizer, unit)

    def embeddings(self, token_ids: NDArray[np.int64], kind: str) -> Floats:
        """See `ScoringContext.embeddings`."""
        vectors: Floats = gather_vectors(self._main_reference(), token_ids, kind).numpy()
        return vectors

    def vocabulary_size(self) -> int:
        """See `ScoringContext.vocabulary_size`."""
        return int(self._main_reference().model.get_input_embeddings().weight.shape[0])

    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """See `ScoringContext.vocabulary_table`."""
        fingerprint = self.fingerprint(self._main)
        path = reference_folder(self.config.resolved_cache_dir(), fingerprint) / table_name(key)
        stored = cached_table(path, fingerprint)
        sent = self.ranks.first(None if stored is None else stored.tobytes())
        known = compute() if sent is None else np.frombuffer(sent, dtype=np.float32)
        if stored is None and (sent is not None or self.ranks.main):
            store_table(path, fingerprint, known)
        return self.ranks.broadcast_if_different(known)

    def fingerprint(self, provider: ReferenceProvider) -> str:
        """Of a provider, once: it may have to read all files of a model for it; the same on every rank."""
        if id(provider) not in self._fingerprints:
            found = self._fingerprints[id(provider)] = self.ranks.run_with_heartbeat(provider.fingerprint)
            self.ranks.agree(found.encode(), "reference")
        return self._fingerprints[id(provider)]

    def about_excerpts(self) -> dict[str, Any]:
        """For the summary; nothing if there were none."""
        facts = {**asdict(self.excerpts), "stored_documents": self.stored_excerpts}
        return {"excerpts": facts} if self.excerpts.documents or self.stored_excerpts else {}

    def _score_main(self, layers: tuple[int, ...]) -> StoredScores:
        """A pass of the run's own reference over the dataset."""
        scores, about, stats, reused = self._scored(self._main, self.documents, layers)
        self.stats.add(stats)
        self.reused = reused
        if self.known is None:
            self._check(scores, about)
            self.known = scores
        return scores

    def _elsewhere(self, reference: ReferenceConfig | None, documents: DocumentSet) -> StoredScores:
        """What a reference predicts in other documents; looked up and scored on every call."""
        scores, _, stats, reused = self._scored(self._provider(reference), documents, ())
        self.excerpts.add(stats)
        self.stored_excerpts += reused
        return scores

    def _main_reference(self) -> Reference:
        return open_on_all(self.ranks, partial(self._reference, self._main))

    def _reference(self, provider: ReferenceProvider) -> Reference:
        if self._open is None or self._open[0] is not provider:
            self.close()
            self._open = provider, self._stack.enter_context(provider.open())
        return self._open[1]

    def _provider(self, reference: ReferenceConfig | None) -> ReferenceProvider:
        if reference is None:
            return self._main
        if reference not in self._providers:  # it reads its tokenizer and files once
            if self._references is None:
                raise XTFError(f"the reference {reference.model} cannot be loaded here: only the run's own is known.")
            self._providers[reference] = self.ranks.run_with_heartbeat(partial(self._references, reference))
        return self._providers[reference]

    def _check(self, scores: StoredScores, about: dict[str, Any], prefix: str = "") -> None:
        found = check_finite(scores.logprobs, self.documents.completion_positions, about)
        self.warnings += [f"{prefix}{warning}" for warning in found]

    def _scored(
        self, provider: ReferenceProvider, documents: DocumentSet, layers: tuple[int, ...]
    ) -> tuple[StoredScores, dict[str, Any], ScoringStats, int]:
        """Stored scores as they are, missing ones from one opening of the reference; and what that took."""
        fingerprint, tag = self.fingerprint(provider), ",".join(map(str, layers)) or None
        description = {**provider.description(), "fingerprint": fingerprint}
        if (fingerprint, tag) not in self._stores:
            root = self.config.resolved_cache_dir()
            made = ScoreStore(root, fingerprint, tag, description=description, index=self._index)
            self._stores[fingerprint, tag] = made
        with self._stores[fingerprint, tag] as store:
            stored, stats, reused = stored_scores(
                store,
                documents,
                partial(self._reference, provider),
                layers,
                batch_tokens=None if self.config.batch_tokens == "auto" else int(self.config.batch_tokens),
                progress=self.progress,
                label="scoring" if documents is self.documents else "rescoring",
                ranks=self.ranks,
            )
        return stored, description, stats, reused


def check_finite(logprobs: Floats, positions: NDArray[np.int32], reference: dict[str, Any]) -> list[str]:
    """Refuse a reference that gives no finite log-probability; warn how many of a sound one's are undefined."""
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


def run_scorers(
    config: XTFConfig,
    source: ScoreSource,
    text: TextRules,
    frozen: dict[str, Callable[[ScoringContext, Any], Floats]] | None = None,
) -> dict[str, Floats]:
    """Scores of the source's documents, (M,) float32 by name of the score, in the block's order.

    Args:
        config: the block.
        source: of the documents.
        text: what their text protects and forces out.
        frozen: functions that take the place of some scorers', by name of the score; see `Scorer.frozen`.

    Raises:
        XTFUserError: a reference cannot be used, or a value of the score's part; names its key.
        XTFError: a scorer returns something else than (M,) float32, or NaN alone; names score and package.
    """
    context = ScoringContext(source.documents, source.tokenizer, source, text.protected, text.forced)
    chosen = {name: (registry.find(part.scorer), part) for name, part in config.scores.items()}
    found = {}
    for name, (scorer, part) in sorted(chosen.items(), key=lambda item: not item[1][0].first):
        score = (frozen or {}).get(name, scorer.score)
        try:
            scores = score(context, part)
            some = source.whole and name in config.selectors
            found[name] = _checked(name, scorer, scores, len(context.token_ids), some)
        except XTFUserError as error:
            path = f"xtf.selectors.{name}" if name in config.selectors else f"xtf.{name}"
            raise XTFUserError(_named(str(error), path, part)) from error
        source.warnings += [f"{name}: {warning}" for warning in context.warnings]
        context.warnings.clear()
    return {name: found[name] for name in chosen}


def frozen_scorers(config: XTFConfig, source: ScoreSource) -> dict[str, Callable[[ScoringContext, Any], Floats]]:
    """Scorers for the later documents of a stream, by name of the score, with what the source's documents decide."""
    context = ScoringContext(source.documents, source.tokenizer, source)
    scorers = {name: (registry.find(part.scorer), part) for name, part in config.scores.items()}
    return {
        name: scorer.frozen(context, part) for name, (scorer, part) in scorers.items() if scorer.frozen is not None
    }


def _named(message: str, path: str, part: ScoreConfig) -> str:
    """A message that begins with a key of a score's part, with the part's place in the block before it."""
    if any(isinstance(value, ReferenceConfig) and value.model for _, value in part):
        message = message.removeprefix("xtf.") if message.startswith(MAIN_KEY) else message
    key = message.partition(":")[0].partition(".")[0]
    return f"{path}.{message}" if key in type(part).model_fields else message


def _checked(name: str, scorer: Scorer, scores: Any, size: int, some: bool) -> Floats:
    """The scores themselves, once they are what selection can work with; `some` has to be defined."""
    owner = f"{name}: the scorer {scorer.name} of {registry.package_of(scorer.name)}"
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (size,):
        given = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        raise XTFError(f"{owner} returned {given} where float32 ({size},) is needed, one score per completion token.")
    if some and size and np.isnan(scores).all():
        raise XTFError(
            f"{owner} returned NaN for all {size} completion tokens, so it could drop nothing. Its data or its "
            "reference does not fit; ask that package's authors, or remove it."
        )
    return scores


def about_scorers(scores: dict[str, ScoreConfig]) -> dict[str, dict[str, Any]]:
    """What to report of each score: its scorer, that scorer's version and package."""
    scorers = {name: registry.find(part.scorer) for name, part in scores.items()}
    return {
        name: {"scorer": scorer.name, "version": scorer.version, "package": registry.package_of(scorer.name)}
        for name, scorer in scorers.items()
    }


def stored_scores(
    store: ScoreStore,
    documents: DocumentSet,
    reference: Callable[[], Reference],
    layers: tuple[int, ...],
    *,
    batch_tokens: int | None = None,
    progress: bool = True,
    label: str = "scoring",
    ranks: Ranks = ALONE,
) -> tuple[StoredScores, ScoringStats, int]:
    """Scores of all documents, the cost of the missing ones, and how many were stored. A collective of `ranks`.

    Args:
        store: where scores are found and kept; each rank has its own view of it, on a shared disk or not.
        documents: the same on every rank.
        reference: opens the reference; called only if some document's scores are known to no rank.
        layers, batch_tokens, progress, label: see `scorer.score`.

    Raises:
        XTFError: from `scorer.score`.
    """
    sizes = np.diff(documents.completion_offsets)
    found = store.lookup(documents.keys, sizes)
    pool(ranks, found)
    missing = np.flatnonzero(~found.found & (sizes > 0))
    stats = ScoringStats()
    if len(missing):
        of_dataset = label == "scoring"  # second looks come in rounds; one warning is enough
        if of_dataset and ranks.main and store.description is not None and not found.found.any():
            warn_of_unused_scores(store.root, store.reference, store.description)

        def sink(records: Records) -> None:
            found.take(records)
            store.add(records)

        stats = score(
            documents,
            missing,
            open_on_all(ranks, reference),
            layers,
            sink,
            batch_tokens=batch_tokens,
            progress=progress,
            label=label,
            ranks=ranks,
            others=found.take,
        )
        store.flush()
    # ranks may have stored different scores of a document, and a plan must not differ by so much as a rounding
    columns = {name: ranks.broadcast_if_different(values) for name, values in found.columns.items()}
    return StoredScores(found.found, **columns), stats, int((sizes > 0).sum()) - stats.documents
