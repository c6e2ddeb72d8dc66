"""The three attributes of XTF as plain eager torch: the definition every faster path is held to.

Written to be read next to the paper (arXiv 2602.14536), not to be fast: full attention maps and full logits are built.
`kernels.py` holds twins with the same names and signatures; parity tests and benchmarks compare the two.

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head or hidden size, V vocabulary, N picked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def visible(T: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Causal (and sliding-window) visibility: `visible[q, k]` is True where query `q` may attend to key `k`, (T, T)."""
    q = torch.arange(T, device=device)[:, None]
    k = torch.arange(T, device=device)[None, :]
    mask = k <= q
    return mask if window is None else mask & (k > q - window)


def attention_map(
    query: Tensor, key: Tensor, *, scaling: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal softmax attention in float32.

    Args:
        query: (B, H, T, D); key: (B, K, T, D) with K a divisor of H (grouped-query attention).
        scaling: factor on the scores before the soft cap, usually `D ** -0.5`.
        window: a query sees this many last keys, itself included; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)`; None: unchanged.

    Returns:
        Probabilities, (B, H, T, T) float32; rows sum to 1.
    """
    H, T = query.shape[1:3]
    key = key.float().repeat_interleave(H // key.shape[1], dim=1)
    scores = query.float() @ key.transpose(-1, -2) * scaling  # (B, H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible(T, window, query.device), float("-inf")).softmax(-1)


def attention_received(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    logsumexp: Tensor | None = None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Reasoning importance of one layer: the attention each token receives from later tokens, 1.0 = uniform.

    Equals, for a document of `length` tokens with attention map `A` averaged over heads,

        r[k] = mean over q in k+1 .. length-1 of (q + 1) * A[q, k]

    Eq. (2) of the paper with two choices made explicit: what counts is the attention a token *receives* (averaging the
    softmax rows over keys gives the constant 1/T), and the factor `q + 1` divides by what uniform attention would give,
    so that 0.1 reads "a tenth of uniform" at any length and position. A token's attention to itself is left out.

    Args:
        query, key, scaling, window, softcap: see `attention_map`.
        lengths: (B,) tokens per document; what lies behind (right padding) is ignored.
        start: columns before it are not wanted.
        logsumexp: (B, H, T) row log-sum-exps if the caller has them; unused here, saves a pass in the fast twin.
        offsets: (n + 1,) integers, from 0 up to at most T, if the tokens are those of n documents packed one behind the
            other: document i has the tokens from `offsets[i]` to `offsets[i + 1]`, sees no other, and counts its own
            positions from 0. B is 1 then, and `lengths` is not looked at.
        starts: (n,) a `start` for each packed document, counted within it; None: `start` for all.

    Returns:
        (B, T) float32, >= 0; NaN where undefined: k < start, the last token of a document, and padding.

    Raises:
        ValueError: documents are packed, and B is not 1.
    """
    if offsets is not None:
        return _packed_received(
            query, key, offsets, starts, scaling=scaling, start=start, window=window, softcap=softcap
        )
    B, _, T, _ = query.shape
    A = attention_map(query, key, scaling=scaling, window=window, softcap=softcap).mean(1)  # (B, T, T)
    q = torch.arange(T, device=query.device)
    received = torch.full((B, T), float("nan"), device=query.device)
    for b in range(B):
        length = int(lengths[b])
        for k in range(start, length - 1):
            received[b, k] = ((q[k + 1 : length] + 1) * A[b, k + 1 : length, k]).mean()
    return received


def attention_and_received(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *, scaling: float, start: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """What a layer whose attention is recorded needs: its output, and what each token receives.

    Equals `(attention_map(...) @ value, attention_received(...))`, of rows; the output of packed documents is each
    document's own.

    Args:
        value: (B, K, T, D'). The others: see `attention_received`.

    Returns:
        output (B, H, T, D') float32, received (B, T).
    """
    value = value.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    seen = {name: given for name, given in options.items() if name in ("window", "softcap")}
    received = attention_received(query, key, lengths, scaling=scaling, start=start, **options)
    offsets = options.get("offsets")
    output = torch.zeros(*query.shape[:3], value.shape[-1], device=query.device)
    ends = [0, query.shape[2]] if offsets is None else offsets.tolist()
    for low, high in zip(ends, ends[1:], strict=False):
        one = [x[:, :, low:high] for x in (query, key, value)]
        output[:, :, low:high] = attention_map(*one[:2], scaling=scaling, **seen) @ one[2]
    return output, received


def _packed_received(
    query: Tensor, key: Tensor, offsets: Tensor, starts: Tensor | None, *, start: int, **options: Any
) -> Tensor:
    one_row(query)
    received = torch.full((1, query.shape[2]), float("nan"), device=query.device)
    for i in range(len(offsets) - 1):
        document = slice(int(offsets[i]), int(offsets[i + 1]))
        received[:, document] = attention_received(
            query[:, :, document],
            key[:, :, document],
            offsets[i + 1 : i + 2] - offsets[i],
            start=start if starts is None else int(starts[i]),
            **options,
        )
    return received


def one_row(query: Tensor) -> None:
    """Refuse packed documents in more than one row, whose offsets would be anyone's guess."""
    if len(query) != 1:
        raise ValueError(f"documents given by `offsets` are packed in one row; these tensors have {len(query)}")


def predictions(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What the LM head predicts before each target token: the target's log-probability, and what was to be expected.

    With `logp = softcap(head(hidden) * scale).float().log_softmax(-1)` and `p = exp(logp)`, the rows are

        0. logp at the target; knowledge novelty, Eq. (3), is 1 - exp of it
        1. H = -sum p logp: the entropy, which is the mean surprisal of a token drawn from p
        2. sqrt(sum p (logp)^2 - H^2): the standard deviation of that surprisal (its square is known as varentropy)

    Rows 1 and 2 tell a target that was improbable although the model was sure from one where anything could come.

    Args:
        hidden: (N, D) last hidden states at the positions that predict the targets.
        head: the LM head, (n, D) -> (n, V).
        targets: (N,) token ids in [0, V).
        scale: factor on the logits (Cohere, Granite, Falcon-H1).
        softcap: final logit soft cap (Gemma 2).

    Returns:
        (3, N) float32, in nats: <= 0, 0 to log V, >= 0. NaN in all three where the softmax is undefined (a logit NaN or
        positively infinite). A logit of minus infinity is a token that cannot come: it adds nothing to rows 1 and 2.
    """
    logits = head(hidden).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)  # (N, V)
    p = logp.exp()
    logp_or_0 = torch.where(p == 0, 0.0, logp)  # 0 * log 0 is 0 in the limit, and NaN in floating point
    entropy = -(p * logp_or_0).sum(-1)
    variance = (p * (logp_or_0 + entropy[:, None]) ** 2).sum(-1)  # centred: the formula's difference would cancel
    return torch.stack([logp.gather(-1, targets[:, None])[:, 0], entropy, variance.sqrt()])


def task_relevance(vectors: Tensor, domain: Tensor, among: Tensor | None = None) -> Tensor:
    """Task relevance of each distinct completion token, Eq. (4): one minus its min-max normalised cosine distance.

    Equals `1 - (d - d.min()) / (d.max() - d.min())` with `d = 1 - cos(vectors, domain)`.

    Args:
        vectors: (N, D) context-free embeddings of the distinct completion tokens.
        domain: (D,) domain vector.
        among: cosine distances of other tokens, whose smallest and largest take the place of d.min() and d.max(): a
            token outside them gets a relevance below 0 or above 1.

    Returns:
        (N,) float32 in [0, 1]; NaN throughout where all distances are equal (nothing can be told apart), and for a
        token whose vector is zero.
    """
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
