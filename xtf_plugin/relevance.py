"""Task relevance: one number per vocabulary entry and dataset.

The domain vector is the mean embedding of the dataset's own tokens, or of expert words. The finished table is kept
beside the scores, so that a second run needs no model for it; it is keyed by everything that it depends on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from . import attributes
from .config_rules import read_words
from .documents import DocumentSet
from .errors import XTFUserError
from .files import for_arrow, set_aside, write_whole
from .fingerprint import digest
from .reference import Reference
from .scorer import gather_vectors
from .segments import chunks

if TYPE_CHECKING:
    from .config import TaskRelevanceConfig

logger = logging.getLogger(__name__)

DENSE = 1 << 22  # token ids below it may index an array; no vocabulary is that large, but a broken dataset may be
VOCABULARY_CHUNK = 4_096


def domain_words(domain: str | Sequence[str]) -> list[str] | None:
    """Expert words of a `domain` setting: None for `dataset`, else the list, or the lines of the file it names.

    Raises:
        XTFUserError: the file that the block was validated with is gone or has changed for the worse.
    """
    if not isinstance(domain, str):
        return list(domain)
    if domain == "dataset":
        return None
    try:
        return read_words(Path(domain))
    except ValueError as error:
        raise XTFUserError(f"xtf.task_relevance.domain: {domain} {error}") from error


def word_pieces(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word, with and without a leading space, as two entries per word.

    Raises:
        XTFUserError: a word that the tokenizer turns into nothing.
    """
    pieces = []
    for word in words:
        for form in (word, " " + word):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if not ids:
                raise XTFUserError(f"xtf.task_relevance.domain: the tokenizer has no token for {word!r}; remove it.")
            pieces.append(list(ids))
    return pieces


class RelevanceTable:
    """Task relevance by token id: built from embeddings, or read back from an earlier run.

    Args:
        config: the `task_relevance` part of the block.
        documents: every training document; its tokens weigh the `dataset` domain and its completion tokens are scored.
        tokenizer: the training tokenizer; only used with expert words.
    """

    def __init__(self, config: TaskRelevanceConfig, documents: DocumentSet, tokenizer: Any) -> None:
        self.embedding = config.embedding
        self.domain_weights: NDArray[np.int64] | None = None
        words = domain_words(config.domain)
        self.pieces = None if words is None else word_pieces(tokenizer, words)
        self.scored_ids = distinct(documents.input_ids[documents.completion])
        if self.pieces is None:
            weights = np.repeat(documents.counts, documents.lengths)
            self.domain_ids = distinct(documents.input_ids)
            dense = self.domain_ids[-1] < DENSE
            places = documents.input_ids if dense else np.searchsorted(self.domain_ids, documents.input_ids)
            totals = np.bincount(places, weights=weights).astype(np.int64)
            self.domain_weights = totals[totals > 0]
        else:
            self.domain_ids = np.unique(np.concatenate([np.asarray(p, dtype=np.int64) for p in self.pieces]))

    def key(self) -> str:
        """Hash of everything the table depends on besides the reference, as hex."""
        parts = [self.scored_ids.astype("<i8"), self.domain_ids.astype("<i8")]
        if self.domain_weights is not None:
            parts.append(self.domain_weights.astype("<i8"))
        hashes = [xxhash.xxh3_128_hexdigest(part.tobytes()) for part in parts]
        return digest({"embedding": self.embedding, "pieces": self.pieces, "arrays": hashes})

    def compute(self, reference: Reference) -> NDArray[np.float32]:
        """Relevance of each of `scored_ids`, in [0, 1]; see `attributes.task_relevance`."""
        return attributes.task_relevance(*self._vectors(reference)).numpy()

    def over_vocabulary(self, reference: Reference) -> NDArray[np.float32]:
        """Relevance of every token of the vocabulary, (V,): `compute` for the scored ids, the others on their scale.

        For a stream, whose later documents hold tokens that these do not. A token that is closer to the domain than
        every scored one, or farther, gets a relevance above 1, or below 0.
        """
        scored, domain = self._vectors(reference)
        among = attributes.cosine_distance(scored, domain)
        size = int(reference.embeddings.weight.shape[0])
        found = np.empty(size, dtype=np.float32)
        for part in chunks(size, VOCABULARY_CHUNK):  # all vectors of a large vocabulary would take gigabytes
            ids = np.arange(part.start, part.stop)
            vectors = gather_vectors(reference, ids, self.embedding)
            found[ids] = attributes.task_relevance(vectors, domain, among).numpy()
        found[self.scored_ids] = attributes.task_relevance(scored, domain).numpy()  # to the last bit as in `compute`
        return found

    def _vectors(self, reference: Reference) -> tuple[Tensor, Tensor]:
        """Embeddings of the scored ids (n, D), and the domain vector (D,)."""
        ids = np.union1d(self.scored_ids, self.domain_ids)
        vectors = gather_vectors(reference, ids, self.embedding)
        domain = self._domain_vector(vectors[torch.from_numpy(np.searchsorted(ids, self.domain_ids))])
        return vectors[torch.from_numpy(np.searchsorted(ids, self.scored_ids))], domain

    def _domain_vector(self, vectors: Tensor) -> Tensor:
        """Mean over the dataset's token occurrences, or over words of each word's mean piece embedding, (D,)
        float64.
        """
        if self.pieces is None:
            weights = torch.from_numpy(np.asarray(self.domain_weights, dtype=np.float64))
            return (weights @ vectors.double()) / weights.sum()
        at = {int(token): index for index, token in enumerate(self.domain_ids)}
        forms = [vectors[[at[t] for t in piece]].double().mean(0) for piece in self.pieces]
        return torch.stack(forms).mean(0)

    def gather(self, table: NDArray[np.float32], token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Look up occurrences, (M,)."""
        if self.scored_ids[-1] >= DENSE:
            return table[np.searchsorted(self.scored_ids, token_ids)]
        by_id = np.empty(int(self.scored_ids[-1]) + 1, dtype=np.float32)
        by_id[self.scored_ids] = table
        return by_id[token_ids]


def distinct(token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """`np.unique(token_ids)` by counting, which takes a tenth of the time for ids that are a vocabulary's."""
    if not len(token_ids) or int(token_ids.max()) >= DENSE:
        return np.unique(token_ids)
    return np.flatnonzero(np.bincount(token_ids)).astype(np.int32)


def cached_table(path: Path, reference: str, size: int) -> NDArray[np.float32] | None:
    """A table stored by `store_table` for this reference and name; None, with a warning, if damaged or foreign."""
    try:
        if not path.is_file():
            if os.path.lexists(path):
                logger.warning("xtf: %s: no regular file; %s; task relevance is computed again", path, set_aside(path))
            return None
        table = pq.read_table(for_arrow(path), memory_map=False)
        values: NDArray[np.float32] = table.column("relevance").to_numpy().astype(np.float32)
        checksum = (table.schema.metadata or {}).get(b"checksum", b"").decode()
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        logger.warning("xtf: %s cannot be read (%s); task relevance is computed again", path, error)
        return None
    if len(values) != size or checksum != _checksum(path, reference, values):
        logger.warning("xtf: %s does not match its checksum; task relevance is computed again", path)
        return None
    return values


def store_table(path: Path, reference: str, values: NDArray[np.float32]) -> None:
    """Store a table for the next run; logs a warning if it cannot be written."""
    metadata = {"checksum": _checksum(path, reference, values)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"relevance": values}).replace_schema_metadata(metadata), buffer)
    try:
        write_whole(path, memoryview(buffer.getvalue()))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); task relevance will be computed again next time", path, error)


def _checksum(path: Path, reference: str, values: NDArray[np.float32]) -> str:
    """Covers name and reference too, so that a table copied from elsewhere is not accepted."""
    return digest({"table": path.name, "reference": reference, "values": xxhash.xxh3_128_hexdigest(values.tobytes())})


def table_name(key: str) -> str:
    """File name of a stored table; `key` is hex."""
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise ValueError(f"not a table key: {key!r}")
    return f"relevance-{key}.parquet"
