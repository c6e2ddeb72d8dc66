"""Definitions in plain eager PyTorch, against which the optimised implementations in `dispatch.py` are tested.

They follow the paper (arXiv 2602.14536) and are not fast: full attention maps and full logits are built. Of documents
that are packed in one row, each has the values that it has alone.

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head or hidden size, V vocabulary, N picked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """The form of a causal attention layer, and the documents and columns to compute.

    Args:
        scaling: factor on the scores before the soft cap, usually `D ** -0.5`.
        window: a query sees the last `window` keys up to its own; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)`; None: unchanged.
        start: attention received is not computed for columns before it.
        offsets: (n + 1,) integers, ascending from 0 to at most T, if n documents are packed in one row: document i is
            the tokens from `offsets[i]` to `offsets[i + 1]`, attends to itself alone, and its positions count from 0.
            B is 1 then, and `lengths` is not used.
        starts: (n,) `start` of each packed document, counted within it; None: `start` for all.
        longest: tokens of the longest packed document, if known on the CPU; avoids a wait for the device.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    start: int = 0
    offsets: Tensor | None = None
    starts: Tensor | None = None
    longest: int | None = None

    def unpacked(self, start: int = 0) -> AttentionSpec:
        """This layer for documents that are not packed."""
        return replace(self, start=start, offsets=None, starts=None, longest=None)


def visible(T: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Causal and sliding-window mask, (T, T): True where query `q` may attend to key `k`."""
    q = torch.arange(T, device=device)[:, None]
    k = torch.arange(T, device=device)[None, :]
    mask = k <= q
    return mask if window is None else mask & (k > q - window)


def attention_map(query: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal softmax attention of unpacked rows, in float32.

    Args:
        query: (B, H, T, D); key: (B, K, T, D) with K a divisor of H (grouped-query attention).

    Returns:
        Probabilities, (B, H, T, T) float32; rows sum to 1.
    """
    H, T = query.shape[1:3]
    key = key.float().repeat_interleave(H // key.shape[1], dim=1)
    scores = query.float() @ key.transpose(-1, -2) * spec.scaling  # (B, H, T, T)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores.masked_fill(~visible(T, spec.window, query.device), float("-inf")).softmax(-1)


def attention_received(query: Tensor, key: Tensor, lengths: Tensor, spec: AttentionSpec) -> Tensor:
    """Reasoning importance of one layer: the attention each token receives from later tokens, 1.0 = uniform.

    Equals, for a document of `length` tokens with attention map `A` averaged over heads,

        r[k] = mean over q in k+1 .. length-1 of (q + 1) * A[q, k]

    This is Eq. (2) of the paper with two choices: columns are averaged, because the average of a softmax row is the
    constant 1/T; and the factor `q + 1` divides by uniform attention, so that 0.1 means a tenth of uniform at any
    length and position. A token's attention to itself is left out.

    Args:
        query: (B, H, T, D); key: (B, K, T, D).
        lengths: (B,) tokens per document; right padding is ignored.

    Returns:
        (B, T) float32, >= 0; NaN before `start`, at the last token of a document, and on padding.
    """
    B, T = len(query), query.shape[2]
    received = torch.full((B, T), float("nan"), device=query.device)
    A = attention_map(query, key, spec).mean(1)  # (B, T, T)
    q = torch.arange(T, device=query.device)
    for b, length in enumerate(lengths.tolist()):
        for k in range(spec.start, length - 1):
            received[b, k] = ((q[k + 1 : length] + 1) * A[b, k + 1 : length, k]).mean()
    return received


def attention_and_received(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`(attention_map(query, key, spec) @ value, attention_received(query, key, lengths, spec))`.

    Args:
        value: (B, K, T, D'). The others: see `attention_received`.

    Returns:
        output (B, H, T, D') float32, received (B, T).
    """
    value = value.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return attention_map(query, key, spec) @ value, attention_received(query, key, lengths, spec)


def predictions(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target token, and entropy and deviation of the distribution it is drawn from.

    With `logp = softcap(head(hidden) * scale).float().log_softmax(-1)` and `p = exp(logp)`, the rows are

        0. logp at the target; knowledge novelty, Eq. (3), is 1 - exp of it
        1. H = -sum p logp: the entropy, the mean surprisal of a token drawn from p
        2. sqrt(sum p (logp)^2 - H^2): the standard deviation of that surprisal (the square root of the varentropy)

    Args:
        hidden: (N, D) last hidden states at the positions that predict the targets.
        head: the LM head, (n, D) -> (n, V).
        targets: (N,) token ids in [0, V).
        scale: factor on the logits (Cohere, Granite, Falcon-H1).
        softcap: final logit soft cap (Gemma 2).

    Returns:
        (3, N) float32, in nats: <= 0, 0 to log V, >= 0. NaN in all three where a logit is NaN or +inf. A logit of -inf
        has probability 0 and adds nothing to rows 1 and 2.
    """
    logits = head(hidden).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)  # (N, V)
    p = logp.exp()
    logp_or_0 = torch.where(p == 0, 0.0, logp)  # 0 * log 0 would be NaN
    entropy = -(p * logp_or_0).sum(-1)
    variance = (p * (logp_or_0 + entropy[:, None]) ** 2).sum(-1)  # centred, to avoid cancellation
    return torch.stack([logp.gather(-1, targets[:, None])[:, 0], entropy, variance.sqrt()])
