"""What scorers ask of a reference, computed once each: from the cache if stored, otherwise by a scoring pass.

`run_scorers` runs the scorers of a block and checks what they return: scores of a wrong shape, or all NaN, would keep
every token without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from ..config.scores import SLOTS
from ..data.column_marks import AllMarks
from ..data.documents import DocumentSet, beside
from ..data.predictions import PREDICTED, Predictions
from ..data.ragged import Floats, Ints, offsets_of
from ..data.splices import Splices, predictions_of, spread
from ..errors import XTFError, XTFUserError
from ..fields import ReferenceConfig
from ..files import digest
from ..scorers import ScoreConfig, Scorer, ScoringContext, registry
from ..selection.text_rules import TextRules, segment_starts
from ..store.admin import warn_of_unused_scores
from ..store.records import Lookup, Records, StoredScores
from ..store.store import Index, ScoreStore, cached_table, reference_folder, store_table, table_name
from .batching import ScoringStats
from .dataset_scores import dataset_scores, is_stored, stored_or
from .distributed import ALONE, Ranks, pool
from .engine import gather_vectors, score
from .fingerprint import weights_sample
from .reference import Reference, resolve_layers

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ..config.block import XTFConfig

ScoreFunction = Callable[[ScoringContext, Any], Floats]
AGAIN = 0.1  # share of the dataset's tokens that one pass must save
MAIN_KEY = "xtf.reference.model"  # messages about a separate reference begin with it


class ReferenceProvider(Protocol):
    """A reference that is loaded only when needed."""

    def fingerprint(self) -> str:
        """Hex key of everything that its scores depend on."""

    def description(self) -> dict[str, Any]:
        """Name, quantisation and dtype, for reports."""

    def text_config(self) -> Any:
        """Config of its language model."""

    def open(self) -> AbstractContextManager[Reference]:
        """The reference, ready to score; a separate one is freed on exit."""


class ScoreSource:
    """Implements `scorers.base.ScoreSource`: predictions, attention and embeddings of references, on all ranks.

    A context manager that holds at most one reference in memory: the last one used, so that several rounds of
    `explained` load it once.

    Args:
        tokenizer: the training tokenizer.
        main: the provider of the run's own reference.
        references: makes the provider of another reference; None: no other reference is available.
        marks: of columns of the dataset, by column, format and text.

    Attributes:
        known: predictions of the run's own reference; None until they are needed.
        logprobs: its log-probabilities; None until they are needed.
        stats: statistics of its passes over the dataset.
        passes: the same for other references, for the summary.
        excerpts: the same for documents outside the dataset.
        warnings: about the references.
        units: first tokens of sentences and lines, by unit, as far as they are known.
    """

    whole = True  # the documents are a complete dataset, in which at least one score must be defined

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
        marks: AllMarks | None = None,
    ) -> None:
        self.config, self.documents, self.tokenizer = config, documents, tokenizer
        self.progress, self.ranks = progress, ranks
        self.known: StoredScores | None = None
        self.logprobs: Floats | None = None
        self.stats, self.excerpts = ScoringStats(), ScoringStats()
        self.passes: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.units: dict[str, Ints] = {}
        self._main, self._references, self._marks = main, references, marks or {}
        self._attention: dict[tuple[int, ...], Floats] = {}
        self._others: dict[ReferenceConfig, StoredScores] = {}
        self._providers: dict[ReferenceConfig, ReferenceProvider] = {}
        self._fingerprints: dict[int, str] = {}  # by id: providers live as long as this object
        self._index: Index = {}
        self._stores: dict[tuple[str, str | None], ScoreStore] = {}
        self._stack = ExitStack()
        self._open: tuple[ReferenceProvider, Reference] | None = None

    def __enter__(self) -> ScoreSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open = None
        self._others, self._attention, self.known = {}, {}, None  # as large as the dataset, and read by scorers alone

    def predictions(self, reference: ReferenceConfig | None = None) -> StoredScores:
        """See `ScoringContext.predictions`; None: the run's own reference."""
        if reference is None:
            return self.known or self._score_main(())
        if reference not in self._others:
            scores, about, stats, _ = self._scored(self._provider(reference), self.documents, ())
            self._check(scores.logprobs, about, f"{about.get('name')}: ")
            self._others[reference] = scores
            self.passes.append({**about, **asdict(stats)})
        return self._others[reference]

    def attention_received(self, layers: Any) -> Floats:
        """See `ScoringContext.attention_received`."""
        chosen = resolve_layers(layers if isinstance(layers, str) else list(layers), self._main.text_config())
        if chosen not in self._attention:
            found = self._score_main(chosen).attention
            assert found is not None
            self._attention[chosen] = found
        return self._attention[chosen]

    def predictions_of(self, splices: Splices, reference: ReferenceConfig | None = None) -> Predictions:
        """See `ScoringContext.predictions_of`."""
        provider = self._provider(reference)
        known = self._stored(provider, splices)
        if known is not None:
            return known
        return predictions_of(self.documents, splices, partial(self._of_excerpts, provider))

    def _stored(self, provider: ReferenceProvider, splices: Splices) -> Predictions | None:
        """Predictions of splices that are all stored, which need not be laid out; None: some are to be scored."""
        wanted, (store, _) = splices.distinct(self.documents), self._store(provider, ())
        with store:
            found = store.lookup(wanted.keys, wanted.trained)
            pool(self.ranks, found)
        if not found.found.all():
            return None
        self.excerpts.add(ScoringStats(stored_documents=len(wanted.keys)))
        columns = {name: self.ranks.broadcast_if_different(found.columns.pop(name)) for name in PREDICTED}
        del found
        return spread(columns, offsets_of(wanted.trained), wanted.which)

    def _of_excerpts(self, provider: ReferenceProvider, documents: DocumentSet) -> StoredScores:
        if provider is self._main and self.known is None and self._reads_again(documents):
            return self._with_dataset(documents)
        scores, _, stats, _ = self._scored(provider, documents, ())
        self.excerpts.add(stats)
        return scores

    def _reads_again(self, documents: DocumentSet) -> bool:
        """Whether these documents share beginnings with the dataset's that are a good part of its tokens.

        One pass over both then reads these tokens once instead of twice. Otherwise the dataset gets a pass of its own,
        which is faster on a GPU: its rows are packed, and those of a pass that shares beginnings are padded.
        """
        if documents.branches is None:
            return False
        longest = np.zeros(len(self.documents), dtype=np.int64)
        inside = documents.branches.groups >= 0
        np.maximum.at(longest, documents.branches.groups[inside], documents.branches.lengths[inside])
        return int(longest.sum()) >= AGAIN * int(self.documents.lengths.sum())

    def _with_dataset(self, documents: DocumentSet) -> StoredScores:
        """Scores of documents that begin like those of the dataset, which is scored in the same pass."""
        size, total = len(self.documents), int(self.documents.completion.sum())
        both = beside(self.documents, documents)
        scores, about, stats, scored = self._scored(self._main, both, ())
        own = scored[scored < size]
        stored = int((np.diff(self.documents.completion_offsets) > 0).sum()) - len(own)
        self.stats.add(stats.part(len(own), int(self.documents.lengths[own].sum()), stored))
        self.excerpts.add(stats)
        self._know(StoredScores(**{name: getattr(scores, name)[:total] for name in PREDICTED}), about)
        return StoredScores(**{name: getattr(scores, name)[total:] for name in PREDICTED})

    def segments(self, unit: str) -> NDArray[np.int64]:
        """See `ScoringContext.segments`."""
        if unit not in self.units:
            self.units[unit] = segment_starts(self.documents, self.tokenizer, unit)
        return self.units[unit]

    def embeddings(self, token_ids: NDArray[np.int64], kind: str) -> Floats:
        """See `ScoringContext.embeddings`."""
        vectors: Floats = gather_vectors(self._on_all(self._main), token_ids, kind).numpy()
        return vectors

    def vocabulary_size(self) -> int:
        """See `ScoringContext.vocabulary_size`."""
        return int(self._on_all(self._main).embeddings.weight.shape[0])

    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """See `ScoringContext.vocabulary_table`."""
        folder, fingerprint = self.folder()
        path = folder / table_name(key)
        stored = cached_table(path, fingerprint)
        sent = max(self.ranks.gather(b"" if stored is None else stored.tobytes()))  # all have to take the same branch
        table = np.frombuffer(sent, dtype=np.float32) if sent else compute()
        if stored is None and (sent or self.ranks.main):
            store_table(path, fingerprint, table)
        return self.ranks.broadcast_if_different(table)

    def marks(self, column: str, form: str, text: str | None) -> NDArray[np.bool_]:
        """See `ScoringContext.marks`."""
        found = self._marks.get((column, form, text))
        if found is None:
            raise XTFUserError(f"column: {column!r} was not read: this plan was made without the rows of a dataset.")
        self.warnings += found.notes()
        return found.of(self.documents)

    def fingerprint(self, provider: ReferenceProvider) -> str:
        """A provider's fingerprint, computed once, since it may read all files of a model; the same on every rank."""
        if id(provider) not in self._fingerprints:
            found = self._fingerprints[id(provider)] = self.ranks.run_with_heartbeat(provider.fingerprint)
            self.ranks.agree(found.encode(), "reference")
        return self._fingerprints[id(provider)]

    def folder(self) -> tuple[Path, str]:
        """Where tables of the run's own reference are stored, and its fingerprint."""
        fingerprint = self.fingerprint(self._main)
        return reference_folder(self.config.resolved_cache_dir(), fingerprint), fingerprint

    def about_excerpts(self) -> dict[str, Any]:
        """Statistics of documents outside the dataset, for the summary; empty if there were none."""
        some = self.excerpts.documents + self.excerpts.stored_documents
        return {"excerpts": asdict(self.excerpts)} if some else {}

    def _score_main(self, layers: tuple[int, ...]) -> StoredScores:
        scores, about, stats, _ = self._scored(self._main, self.documents, layers)
        self.stats.add(stats)
        if self.known is None:
            self._know(scores, about)
        return scores

    def recall(self) -> None:
        """Find all log-probabilities of a large dataset at once, or store them for the next start. A collective."""
        sizes = np.diff(self.documents.completion_offsets)
        key = digest({"log-probabilities": xxh3_128_hexdigest(self.documents.keys.data)})
        found, stored = stored_or(self, key, int(sizes.sum()), lambda: self.predictions().logprobs)
        if stored and self.known is None:
            self._check(found, self._main.description())
            self.logprobs = found
            self.stats.add(ScoringStats(stored_documents=int((sizes > 0).sum())))

    def _know(self, scores: StoredScores, about: dict[str, Any]) -> None:
        self._check(scores.logprobs, about)
        self.known, self.logprobs = scores, scores.logprobs

    def _on_all(self, provider: ReferenceProvider) -> Reference:
        """Open a reference on every rank, and check that its weights agree. A collective."""
        opened = self.ranks.run_with_heartbeat(partial(self._reference, provider))
        if self.ranks.size > 1 and not opened.lockstep:  # in lockstep, each rank holds other weights
            self.ranks.agree(weights_sample(opened.model), "weights of the reference")
        return opened

    def _reference(self, provider: ReferenceProvider) -> Reference:
        if self._open is None or self._open[0] is not provider:
            self._stack.close()
            self._open = None
            self._open = provider, self._stack.enter_context(provider.open())
        return self._open[1]

    def _provider(self, reference: ReferenceConfig | None) -> ReferenceProvider:
        if reference is None:
            return self._main
        if reference not in self._providers:
            if self._references is None:
                raise XTFError(f"the reference {reference.model} cannot be loaded here; use the run's own reference.")
            self._providers[reference] = self.ranks.run_with_heartbeat(partial(self._references, reference))
        return self._providers[reference]

    def _check(self, logprobs: Floats, about: dict[str, Any], prefix: str = "") -> None:
        """Warn of undefined log-probabilities; raise XTFError if all are undefined."""
        expected = self.documents.completion_positions > 0  # a document's first token has no prediction
        undefined, total = np.count_nonzero(~np.isfinite(logprobs) & expected), np.count_nonzero(expected)
        if total and undefined == total:
            raise XTFError(
                f"the reference {about.get('name')} gives NaN or infinite log-probabilities for all {total} completion "
                "tokens: its weights or its precision are broken. Try `reference.dtype: float32`, or another reference."
            )
        if undefined:
            self.warnings.append(
                f"{prefix}{undefined} of {total} completion tokens have a NaN or infinite log-probability under the "
                "reference; an undefined score never drops a token"
            )

    def _scored(
        self, provider: ReferenceProvider, documents: DocumentSet, layers: tuple[int, ...]
    ) -> tuple[StoredScores, dict[str, Any], ScoringStats, Ints]:
        """Look up the scores of some documents, and compute and store the missing ones. A collective.

        Returns:
            the scores, facts about the reference, statistics of the pass, and indices of the documents that it scored.
        """
        store, about = self._store(provider, layers)
        sizes = np.diff(documents.completion_offsets)
        with store:
            found = store.lookup(documents.keys, sizes)
            pool(self.ranks, found)
            missing = np.flatnonzero(~found.found & (sizes > 0))
            stats = self._fill(store, found, provider, documents, missing, layers) if len(missing) else ScoringStats()
        stats.stored_documents = int((sizes > 0).sum()) - stats.documents
        # ranks may have stored different scores of a document, and all plans must have the same bits
        columns = {name: self.ranks.broadcast_if_different(values) for name, values in found.columns.items()}
        return StoredScores(**columns), about, stats, missing

    def _store(self, provider: ReferenceProvider, layers: tuple[int, ...]) -> tuple[ScoreStore, dict[str, Any]]:
        """The store of a reference's scores, and facts about the reference."""
        fingerprint, tag = self.fingerprint(provider), ",".join(map(str, layers)) or None
        about = {**provider.description(), "fingerprint": fingerprint}
        if (fingerprint, tag) not in self._stores:
            root = self.config.resolved_cache_dir()
            made = ScoreStore(root, fingerprint, tag, description=about, index=self._index)
            self._stores[fingerprint, tag] = made
        return self._stores[fingerprint, tag], about

    def _fill(
        self,
        store: ScoreStore,
        found: Lookup,
        provider: ReferenceProvider,
        documents: DocumentSet,
        missing: NDArray[np.int64],
        layers: tuple[int, ...],
    ) -> ScoringStats:
        """Score the `missing` documents; add the scores to `found`, and this rank's to the store."""
        of_dataset = np.array_equal(documents.keys[: len(self.documents)], self.documents.keys)
        if of_dataset and self.ranks.main and not found.found.any():
            assert store.description is not None
            warn_of_unused_scores(store.root, store.reference, store.description)

        def sink(records: Records) -> None:
            found.take(records)
            store.add(records)

        opened = self._on_all(provider)
        stats = score(
            documents,
            missing,
            opened,
            layers,
            sink,
            batch_tokens=None if self.config.batch_tokens == "auto" else int(self.config.batch_tokens),
            progress=self.progress,
            label="scoring" if of_dataset else "scoring sentences",
            ranks=self.ranks,
            others=found.take,
        )
        self.warnings += opened.take_warnings()
        store.flush()
        return stats


def run_scorers(
    config: XTFConfig, source: ScoreSource, text: TextRules, frozen: dict[str, ScoreFunction] | None = None
) -> dict[str, Floats]:
    """Run the scorers of a block on the source's documents.

    Args:
        text: which tokens are protected or forced out.
        frozen: functions that replace those of some scorers, by name of the score; see `Scorer.frozen`.

    Returns:
        scores by name, (M,) float32 each, in the block's order.

    Raises:
        XTFUserError: a reference or a value in the score's part of the block cannot be used; names the key.
        XTFError: a scorer returns anything but (M,) float32, or (the scorers of the paper aside) only NaN;
            names the score and the package.
    """
    context = ScoringContext(source.documents, source.tokenizer, source, text.protected, text.forced)
    context.parts, chosen = config.scores, _scorers(config.scores)
    source.units.update(text.segments)
    found, kept = {}, {name: is_stored(source, context, *each) for name, each in chosen.items()}
    # scorers that read attention come first, those that read other scores last
    for name in sorted(chosen, key=lambda each: (not chosen[each][0].reads_attention, chosen[each][0].reads_scores)):
        scorer, part = chosen[name]
        function = (frozen or {}).get(name, scorer.score)
        try:
            # NaN for all tokens is not an error where the rule warns of it, or where clean data has nothing to find
            needed = source.whole and scorer.name not in SLOTS.values() and not scorer.finds_nothing
            compute = partial(dataset_scores, source, context, scorer, part, function)
            values = compute() if kept[name] else function(context, part)
            found[name] = _checked(name, scorer, values, len(context.token_ids), needed)
        except XTFUserError as error:
            path = f"xtf.selectors.{name}" if name in config.selectors else f"xtf.{name}"
            raise XTFUserError(_named(str(error), path, part)) from error
        context.scores[name] = found[name]
        source.warnings += [f"{name}: {warning}" for warning in context.warnings]
        context.warnings.clear()
    if any(kept.values()):
        source.recall()  # reports show them, though no scorer asked for them
    return {name: found[name] for name in chosen}


def frozen_scorers(
    config: XTFConfig, source: ScoreSource, text: TextRules, values: Mapping[str, Floats]
) -> dict[str, ScoreFunction]:
    """Score functions for later documents of a stream, by name, with what the source's documents determine.

    Args:
        config, source, text: of the calibration sample, as in `run_scorers`.
        values: the sample's scores.
    """
    context = ScoringContext(source.documents, source.tokenizer, source, text.protected, text.forced)
    context.scores.update(values)
    context.parts = config.scores
    chosen = _scorers(config.scores).items()
    return {name: scorer.frozen(context, part) for name, (scorer, part) in chosen if scorer.frozen is not None}


def about_scorers(scores: dict[str, ScoreConfig]) -> dict[str, dict[str, Any]]:
    """Scorer, version and package of each score, for reports."""
    return {
        name: {"scorer": scorer.name, "version": scorer.version, "package": registry.package_of(scorer.name)}
        for name, (scorer, _) in _scorers(scores).items()
    }


def _scorers(scores: dict[str, ScoreConfig]) -> dict[str, tuple[Scorer, ScoreConfig]]:
    return {name: (registry.find(part.scorer), part) for name, part in scores.items()}


def _named(message: str, path: str, part: ScoreConfig) -> str:
    """A message that begins with a key of a score's part, prefixed with the part's path in the block."""
    if any(isinstance(value, ReferenceConfig) and value.model for _, value in part):
        message = message.removeprefix("xtf.") if message.startswith(MAIN_KEY) else message
    key = message.partition(":")[0].partition(".")[0]
    return f"{path}.{message}" if key in type(part).model_fields else message


def _checked(name: str, scorer: Scorer, scores: Any, size: int, needed: bool) -> Floats:
    """The scores, after a check of shape and dtype and, if `needed`, that at least one is defined."""
    owner = f"{name}: the scorer {scorer.name} of {registry.package_of(scorer.name)}"
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (size,):
        given = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        raise XTFError(f"{owner} returned {given} where float32 ({size},) is needed, one score per completion token.")
    if needed and size and np.isnan(scores).all():
        raise XTFError(
            f"{owner} returned NaN for all {size} completion tokens, so it cannot drop any. Its data or its reference "
            "does not fit; ask that package's authors, or remove it."
        )
    return scores
