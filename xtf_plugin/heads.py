"""A chunk of logits, and what it says about the targets, with as little fresh memory as can be.

On a CPU memory of megabytes goes back to the system whenever it is freed, and has to be mapped page by page again. For
a chunk of logits that takes up to a fifth of the product's time, and a copy of it longer than sums over it. So products
go into one buffer, and sums are taken in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOMENT_ELEMENTS = 1 << 19  # logits that a CPU's cache holds through several passes
ELEMENTS = 8 << 20  # elsewhere
LOG2E = 1.4426950408889634  # on a CPU exp2 takes a third of exp's time; on a GPU exp is made of it
IMPOSSIBLE = -1e4  # nats below the most probable token: exp of it is 0 in float32

Head = Callable[[Tensor], Tensor]


def reusing(head: Head, hidden: Tensor) -> Head:
    """A head that gives what `head(rows)` gives, until it is called again: its results share one buffer.

    Only a linear layer on a CPU that is nothing else is taken over: no bias, no hooks, no forward of someone else's
    (accelerate, PEFT and quantisation have theirs), no autocast. Any other head comes back as it is.

    Args:
        head: (n, D) -> (n, V); hidden: (N, D), what it will be given parts of.
    """
    if not (isinstance(head, nn.Linear) and type(head) is nn.Linear and _untouched(head)):
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


def _untouched(head: nn.Linear) -> bool:
    hooks = (head._forward_hooks, head._forward_pre_hooks)
    return head.bias is None and "forward" not in vars(head) and not any(hooks)


def moments(logits: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """What rows of logits (n, V) say about the targets (n,): `attributes.predictions` behind the head; (3, n) float32.

    Logits in float32 are used up. Triton's twin of the same name is in `triton_moments`.
    """
    elements = MOMENT_ELEMENTS if logits.device.type == "cpu" else ELEMENTS
    rows, parts = max(1, elements // logits.shape[-1]), []
    for low in range(0, len(targets), rows):
        exact = logits[low : low + rows].float()
        if scale != 1.0:
            exact.mul_(scale)
        if softcap is not None:
            exact.div_(softcap).tanh_().mul_(softcap)
        parts.append(_moments(exact, targets[low : low + rows]))
    return torch.cat(parts, 1)


def _moments(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of the targets, entropies and deviations of rows of logits, (n, V) -> (3, n) float32.

    With x a logit's distance to the row's maximum and Z = sum e^x, log p = x - log Z; so the entropy is log Z - mean x,
    and the variance mean x^2 - (mean x)^2, where "mean" weighs with e^x / Z. Distances to the maximum, and not log p,
    because one exponential then gives all; and the mean of -x is at most the entropy, so that little cancels in the
    variance, and all of it in float32. The logits, float32, are used up: memory for another copy would take longer to
    come by than the sums.
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
