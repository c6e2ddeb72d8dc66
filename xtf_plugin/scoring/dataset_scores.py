"""Scores of a large dataset stored as a whole, so that a start with the same rows and settings looks up no sentence.

Predictions are stored by document and by sentence, and nothing is scored twice. But finding the sentences of a million
documents again takes longer than all the rest of a start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from .. import __version__
from ..data.ragged import Floats
from ..data.token_text import distinct_ids, token_bytes
from ..files import digest
from ..scorers import ScoreConfig, Scorer, ScoringContext
from ..store.store import cached_table, store_table, table_name
from .distributed import Ranks

LARGE = 1 << 20  # completion tokens; with fewer, all sentences are found in about a second


class Source(Protocol):
    """What is needed of a `cached_scores.ScoreSource`."""

    ranks: Ranks
    whole: bool

    def folder(self) -> tuple[Path, str]: ...  # noqa: D102


def is_stored(source: Source, context: ScoringContext, scorer: Scorer, part: ScoreConfig) -> bool:
    """Whether the scores of a part of the block are stored as a whole."""
    reference = getattr(part, "reference", None)
    own = reference is None or not reference.model
    return own and scorer.stored and source.whole and len(context.token_ids) >= LARGE


def dataset_scores(
    source: Source, context: ScoringContext, scorer: Scorer, part: ScoreConfig, function: Callable[..., Floats]
) -> Floats:
    """`function(context, part)`, or what it returned for the same input before. A collective.

    Scores with warnings are not stored, so that each start warns.
    """
    size, key = len(context.token_ids), input_key(context, scorer, part)
    return stored_or(source, key, size, lambda: function(context, part), lambda: not context.warnings)[0]


def stored_or(
    source: Source, key: str, size: int, compute: Callable[[], Floats], lasting: Callable[[], bool] = lambda: True
) -> tuple[Floats, bool]:
    """The table of `size` numbers that is stored under a key, else `compute()`, which is stored if it is `lasting`.

    A collective: the first rank's disk decides for all. Returns the table, and whether it was stored.
    """
    folder, fingerprint = source.folder()
    path = folder / table_name(key, "scores")
    found = cached_table(path, fingerprint)
    if source.ranks.gather(b"" if found is None else b"stored")[0]:
        mine = np.full(size, np.nan, dtype=np.float32) if found is None else found
        return source.ranks.broadcast_if_different(mine), True
    found = compute()
    if source.ranks.main and lasting():
        store_table(path, fingerprint, found)
    return found, False


def input_key(context: ScoringContext, scorer: Scorer, part: ScoreConfig) -> str:
    """Hex digest of all that the scores of a scorer with `stored` depend on besides the reference."""
    documents, tokenizer = context.documents, context.tokenizer
    arrays: list[Any] = [documents.keys, documents.counts, context.protected, context.forced]
    read = sorted(context.scores) if scorer.reads_scores else []
    arrays += [context.scores[name] for name in read]
    arrays += [] if part.unit == "token" else [context.segments(part.unit)]
    spelt = b"".join(
        len(piece).to_bytes(4, "little") + piece
        for piece in token_bytes(tokenizer, distinct_ids(documents.input_ids).tolist())
    )
    return digest(
        {
            "version": [__version__, scorer.name, scorer.version],
            "block": [each.model_dump(mode="json") for each in (part, *(context.parts[name] for name in read))],
            "read": read,
            "marks": [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")],
            "arrays": [xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data) for array in arrays],
            "tokens": xxhash.xxh3_128_hexdigest(spelt),
        }
    )
