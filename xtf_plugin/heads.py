"""Statistics of a chunk of logits, with as few allocations as possible.

On a CPU a freed block of megabytes goes back to the system, and a new one is mapped page by page. For a chunk of logits
that takes up to a fifth of the product's time. So products go into one buffer, and sums are taken in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data.ragged import chunks

MOMENT_ELEMENTS = 1 << 19  # logits that a CPU's cache holds through several passes
ELEMENTS = 8 << 20  # elsewhere
LOG2E = 1.4426950408889634  # on a CPU exp2 takes a third of exp's time; on a GPU exp is made of it
IMPOSSIBLE = -1e4  # nats below the most probable token: exp of it is 0 in float32

Head = Callable[[Tensor], Tensor]


def reusing(head: Head, hidden: Tensor) -> Head:
    """The same head, but its results share one buffer: each call overwrites the last result.

    Replaces only a plain linear layer on a CPU: no bias, no hooks, no forward on the instance (accelerate, PEFT and
    quantisation set theirs), no autocast. Any other head is returned unchanged.

    Args:
        head: (n, D) -> (n, V); hidden: (N, D), whose parts it will be called with.
    """
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return head
    # private, as PyTorch has no public way to ask for hooks; without them this raises, and tests/test_predictions.py
    if head._forward_hooks or head._forward_pre_hooks:
        return head
    weight = head.weight
    if hidden.device.type != "cpu" or weight.device.type != "cpu" or hidden.dtype != weight.dtype:
        return head
    if type(weight) is not nn.Parameter or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return head
    columns, buffer = weight.t(), hidden.new_empty(0, weight.shape[0])

    def product(rows: Tensor) -> Tensor:
        nonlocal buffer
        if len(buffer) < len(rows):
            buffer = rows.new_empty(len(rows), weight.shape[0])
        return torch.mm(rows, columns, out=buffer[: len(rows)])

    return product


def moments(logits: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """`attributes.predictions` from rows of logits (n, V) instead of hidden states; (3, n) float32.

    Overwrites logits in float32. The implementation in Triton is `triton_moments.moments`.
    """
    elements, parts = MOMENT_ELEMENTS if logits.device.type == "cpu" else ELEMENTS, []
    for part in chunks(len(targets), max(1, elements // logits.shape[-1])):
        exact = logits[part].float()
        if scale != 1.0:
            exact.mul_(scale)
        if softcap is not None:
            exact.div_(softcap).tanh_().mul_(softcap)
        parts.append(_moments(exact, targets[part]))
    return torch.cat(parts, 1)


def _moments(logits: Tensor, targets: Tensor) -> Tensor:
    """`moments` of float32 logits, which are overwritten: allocating a copy would take longer than the sums.

    With x a logit's distance to the row's maximum and Z = sum e^x, log p = x - log Z; so the entropy is log Z - mean x,
    and the variance mean x^2 - (mean x)^2, where "mean" weighs with e^x / Z. With distances to the maximum one
    exponential gives all three; and the mean of -x is at most the entropy, so that little cancels in the variance.
    """
    peak = logits.amax(-1, keepdim=True)
    picked = logits.gather(-1, targets[:, None])[:, 0] - peak[:, 0]
    x = logits.sub_(peak)
    p = (x * LOG2E).exp2_()
    total = p.sum(-1)
    log_total = total.log()
    mean = p.mul_(x).sum(-1) / total
    deviation = (p.mul_(x).sum(-1) / total - mean * mean).clamp_(min=0).sqrt_()
    moments = torch.stack([picked - log_total, log_total - mean, deviation])
    impossible = mean.isnan()  # 0 * -inf where a token cannot come, or a row that is undefined
    if bool(impossible.any()) and bool(x.isneginf().any()):
        rest = x[impossible].clamp_(min=IMPOSSIBLE)  # e^x is 0 all the same, and 0 * x stays 0
        moments[1:, impossible] = _moments(rest, targets[impossible])[1:]
    return moments
