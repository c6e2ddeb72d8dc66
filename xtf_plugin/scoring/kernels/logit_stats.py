"""Statistics of a chunk of logits with few allocations.

On a CPU, allocating a chunk of logits takes up to a fifth of the time of the product. So products share one buffer, and
sums are taken in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...data.ragged import chunks

MOMENT_ELEMENTS = 1 << 19  # logits that fit a CPU's cache
ELEMENTS = 8 << 20  # on other devices
LOG2E = 1.4426950408889634  # on a CPU exp2 takes a third of the time of exp
IMPOSSIBLE = -1e4  # nats below the most probable token; exp of it is 0 in float32

Head = Callable[[Tensor], Tensor]


def reusing(head: Head, hidden: Tensor) -> Head:
    """The same head with one result buffer, which each call overwrites.

    Replaces a plain linear layer on a CPU alone: no bias, no hooks, no forward on the instance (accelerate, PEFT and
    quantisation set theirs), no autocast. Any other head is returned unchanged.

    Args:
        head: (n, D) -> (n, V).
        hidden: (N, D); the head will be called with parts of it.
    """
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return head
    # private: PyTorch has no public access to hooks; tests/scoring/test_predictions.py fails if this changes
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
    """`eager.predictions` of rows of logits (n, V), (3, n) float32. Overwrites logits in float32."""
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
    """`moments` of float32 logits, which are overwritten.

    With x a logit minus the row's maximum and Z = sum e^x, log p is x - log Z. So the entropy is log Z - mean x and
    the variance mean x^2 - (mean x)^2, with weights e^x / Z. The mean of -x is at most the entropy, so little cancels.
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
    impossible = mean.isnan()  # from 0 * -inf at tokens of probability 0, or an undefined row
    if bool(impossible.any()) and bool(x.isneginf().any()):
        rest = x[impossible].clamp_(min=IMPOSSIBLE)  # e^x is still 0, and 0 * x is 0
        moments[1:, impossible] = _moments(rest, targets[impossible])[1:]
    return moments
