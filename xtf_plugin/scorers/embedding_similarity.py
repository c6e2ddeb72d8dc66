"""Task relevance as in the paper: how close a token's embedding is to the domain's, Eq. (4).

The domain vector is the mean embedding of the dataset's own tokens, or of expert words. The score depends on the token
alone, so a table over the vocabulary is computed and stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import XTFUserError
from ..fields import Domain, Drop, read_words
from ..files import digest
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..data.documents import DocumentSet
    from ..data.ragged import Floats, Ints
    from .base import Score

VOCABULARY_CHUNK = 4_096


class EmbeddingSimilarityConfig(ScoreConfig):
    """Scorer `embedding_similarity`: closeness of the token's embedding to the domain's, 0 to 1."""

    domain: Domain = Field(
        default="dataset",
        description="What the domain is: the dataset's own tokens, expert words, or a file with one word per line.",
    )
    embedding: Literal["input", "output"] = Field(
        default="input",
        description="Vectors compared: the embedding layer's, or the last hidden state of the token alone.",
    )
    drop: Drop = Field(default=Drop(cluster=2), description="Which tokens are dropped: exactly one rule.")


def _frozen(context: ScoringContext, config: EmbeddingSimilarityConfig) -> Score:
    """The score of later documents: relevance of the whole vocabulary, on the scale of the sample's tokens."""
    domain = _Domain(context, config)
    key = digest({"over the vocabulary": domain.key})
    table = context.vocabulary_table(key, domain.over_vocabulary)
    return lambda context, config: table[context.token_ids]


@scorer("embedding_similarity", EmbeddingSimilarityConfig, frozen=_frozen)
def embedding_similarity(context: ScoringContext, config: EmbeddingSimilarityConfig) -> Floats:
    """One minus the min-max normalised cosine distance to the domain, (M,) float32 in [0, 1].

    The default rule drops the second lowest of five classes.
    """
    domain = _Domain(context, config)
    table = context.vocabulary_table(domain.key, domain.relevance)
    scores: Floats = table[_places(domain.scored_ids, context.token_ids)]
    return scores


def _word_pieces(tokenizer: Any, domain: str | Sequence[str]) -> list[list[int]]:
    """Token ids of expert words, with and without a leading space; two entries per word.

    Raises:
        XTFUserError: the tokenizer has no token for a word, or the file of words changed since the block was read.
    """
    try:
        words = read_words(Path(domain)) if isinstance(domain, str) else domain
    except ValueError as error:
        raise XTFUserError(f"domain: {domain} {error}") from error
    pieces = [tokenizer(form, add_special_tokens=False)["input_ids"] for word in words for form in (word, " " + word)]
    for index, ids in enumerate(pieces):
        if not ids:
            raise XTFUserError(f"domain: the tokenizer has no token for {words[index // 2]!r}; remove it.")
    return [list(ids) for ids in pieces]


class _Domain:
    """The domain of a dataset, and the relevance of its completion tokens to it."""

    def __init__(self, context: ScoringContext, config: EmbeddingSimilarityConfig) -> None:
        import numpy as np

        from ..data.token_text import distinct_ids

        self.context, self.embedding = context, config.embedding
        self.ids: NDArray[Any]
        self.scored_ids = distinct_ids(context.token_ids)
        self.pieces: list[list[int]] | None = None
        self.weights: Ints | None = None
        if config.domain == "dataset":
            self.ids = distinct_ids(context.documents.input_ids)
            self.weights = _occurrences(self.ids, context.documents)
        else:
            self.pieces = _word_pieces(context.tokenizer, config.domain)
            self.ids = np.unique(np.concatenate([np.asarray(piece, dtype=np.int64) for piece in self.pieces]))

    @property
    def key(self) -> str:
        """Hex digest of everything that the table depends on besides the reference."""
        import xxhash

        parts = [self.scored_ids, self.ids, *([] if self.weights is None else [self.weights])]
        hashes = [xxhash.xxh3_128_hexdigest(part.astype("<i8").tobytes()) for part in parts]
        return digest({"embedding": self.embedding, "pieces": self.pieces, "arrays": hashes})

    def relevance(self) -> Floats:
        """Relevance of each of `scored_ids`, in [0, 1]."""
        return task_relevance(*self._vectors()).numpy()

    def over_vocabulary(self) -> Floats:
        """Relevance of every token of the vocabulary, (V,): `relevance` for the scored ids, the others on their scale.

        Tokens closer to the domain than all scored ones get values above 1, tokens farther away values below 0.
        """
        import numpy as np
        import torch

        scored, domain = self._vectors()
        among = cosine_distance(scored, domain)
        found = np.empty(self.context.vocabulary_size, dtype=np.float32)
        for low in range(0, len(found), VOCABULARY_CHUNK):  # all vectors at once would take gigabytes
            ids = np.arange(low, min(len(found), low + VOCABULARY_CHUNK))
            vectors = torch.from_numpy(self.context.embeddings(ids, self.embedding))
            found[ids] = task_relevance(vectors, domain, among).numpy()
        found[self.scored_ids] = task_relevance(scored, domain).numpy()  # exactly as in `relevance`
        return found

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the scored ids (n, D), and the domain vector (D,)."""
        import numpy as np
        import torch

        ids = np.union1d(self.scored_ids, self.ids)
        vectors = torch.from_numpy(self.context.embeddings(ids, self.embedding))
        domain = self._vector(vectors[torch.from_numpy(np.searchsorted(ids, self.ids))])
        return vectors[torch.from_numpy(np.searchsorted(ids, self.scored_ids))], domain

    def _vector(self, vectors: Tensor) -> Tensor:
        """Mean over the dataset's tokens, or over words of each word's mean piece embedding, (D,) float64."""
        import torch

        if self.pieces is None:
            assert self.weights is not None
            weights = torch.from_numpy(self.weights.astype("float64"))
            return (weights @ vectors.double()) / weights.sum()
        at = {int(token): index for index, token in enumerate(self.ids)}
        forms = [vectors[[at[t] for t in piece]].double().mean(0) for piece in self.pieces]
        return torch.stack(forms).mean(0)


def task_relevance(vectors: Tensor, domain: Tensor, among: Tensor | None = None) -> Tensor:
    """Task relevance, Eq. (4): `1 - (d - d.min()) / (d.max() - d.min())` with `d = 1 - cos(vectors, domain)`.

    Args:
        vectors: (N, D) context-free embeddings of the distinct completion tokens.
        domain: (D,) domain vector.
        among: distances whose minimum and maximum replace those of d; the relevance may then lie outside [0, 1].

    Returns:
        (N,) float32 in [0, 1]; NaN throughout where all distances are equal, and for a token whose vector is zero.
    """
    import torch

    distance = cosine_distance(vectors, domain)
    among = distance if among is None else among
    defined = among[~among.isnan()]
    if defined.numel() == 0 or not bool(defined.max() > defined.min()):
        return torch.full_like(distance, float("nan"))
    low, high = defined.min(), defined.max()
    relevance: Tensor = 1 - (distance - low) / (high - low)
    return relevance


def cosine_distance(vectors: Tensor, domain: Tensor) -> Tensor:
    """`1 - cos(vectors, domain)` of vectors (N, D) from a domain (D,), (N,) float32; NaN for a zero vector."""
    vectors, domain = vectors.float(), domain.float()
    norms = vectors.norm(dim=-1) * domain.norm()
    distance: Tensor = 1 - (vectors @ domain) / norms  # 0/0 -> NaN: a zero vector has no direction
    return distance


def _occurrences(distinct: Ints, documents: DocumentSet) -> Ints:
    """How often each of the distinct ids occurs in the dataset, (n,)."""
    import numpy as np

    from ..data.ragged import Layout

    number = np.zeros(len(distinct), dtype=np.int64)
    for tokens, _, part in Layout(documents.offsets, documents.counts).chunks():
        places = _places(distinct, documents.input_ids[tokens])
        number += np.bincount(places, part.spread(part.counts), len(distinct)).astype(np.int64)
    return number


def _places(distinct: NDArray[Any], token_ids: NDArray[Any]) -> Ints:
    """`np.searchsorted(distinct, token_ids)` by table; `distinct` holds all of the ids."""
    import numpy as np

    places = np.zeros(int(distinct.max(initial=-1)) + 1, dtype=np.int32)
    places[distinct] = np.arange(len(distinct))
    found: Ints = places[token_ids]
    return found
