"""Packed documents, and their conversion to padded batches and back for code that does not take packed rows.

Documents of similar length share a batch; a single batch would be as wide as the longest document.

Dimensions: n documents, L tokens of the longest, H heads, T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .eager import AttentionSpec


@dataclass(frozen=True)
class Packed:
    """Documents packed in one row.

    Args:
        offsets: (n + 1,) int64, as in `AttentionSpec`, on the row's device.
        starts: (n,) int64, as in `AttentionSpec`.
        bounds: `offsets` on the CPU.
        whole: refuse attention that would split the row into batches.
    """

    offsets: Tensor
    starts: Tensor
    bounds: NDArray[np.int64]
    whole: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.bounds).max())

    def positions(self, T: int) -> Tensor:
        """Position of every token within its document, (1, T); T tokens in all."""
        begins = self.offsets[:-1].repeat_interleave(self.offsets.diff(), output_size=T)
        return (torch.arange(T, device=begins.device) - begins)[None]


@dataclass(frozen=True)
class Group:
    """Some documents of a row: their indices (n,), lengths (n,), token positions (n, L), and which are real (n, L)."""

    members: Tensor
    lengths: Tensor
    index: Tensor
    inside: Tensor

    def gather(self, row: Tensor) -> Tensor:
        """This group of a row (1, H, T, ...), as (n, H, L, ...); 0 on padding."""
        padded = row[0][:, self.index].transpose(0, 1)
        return padded.masked_fill(~self.inside.view(len(padded), 1, -1, *[1] * (row.dim() - 3)), 0)

    def scatter(self, padded: Tensor, row: Tensor) -> None:
        """Write (n, H, L, ...) without padding to this group's positions in a row (1, H, T, ...)."""
        row[0][:, self.index[self.inside]] = padded.transpose(0, 1)[:, self.inside]


def groups(offsets: Tensor) -> list[Group]:
    """Groups of documents of similar length; less than half of each group is padding."""
    lengths = offsets.diff()
    by_size: dict[int, list[int]] = {}
    for i, length in enumerate(lengths.tolist()):
        if length:
            by_size.setdefault((length - 1).bit_length(), []).append(i)
    found = []
    for ids in by_size.values():
        members = torch.tensor(ids, device=offsets.device)
        own = lengths[members]
        position = torch.arange(int(own.max()), device=offsets.device)
        inside = position < own[:, None]
        found.append(Group(members, own, torch.where(inside, offsets[members][:, None] + position, 0), inside))
    return found


def attention(
    padded: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key: Tensor, value: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps of packed documents, from `padded(query, key, value)` for a padded batch."""
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    logsumexp = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for group in groups(offsets):
        part, rows = padded(*(group.gather(x) for x in (query, key, value)))
        group.scatter(part, output)
        group.scatter(rows, logsumexp)
    return output, logsumexp


def received(
    padded: Callable[..., Tensor], query: Tensor, key: Tensor, logsumexp: Tensor, spec: AttentionSpec
) -> Tensor:
    """Attention received of packed documents, from `padded(query, key, lengths, spec, logsumexp)` for a batch."""
    assert spec.offsets is not None
    starts = torch.full_like(spec.offsets[1:], spec.start) if spec.starts is None else spec.starts
    found = torch.full((1, 1, query.shape[2]), float("nan"), device=query.device)
    for group in groups(spec.offsets):
        own = starts[group.members]
        start = min(int(own.min()), group.inside.shape[1])
        rows = [group.gather(x) for x in (query, key, logsumexp)]
        part = padded(*rows[:2], group.lengths, spec.unpacked(start), rows[2])
        early = torch.arange(part.shape[1], device=part.device) < own[:, None]
        group.scatter(part.masked_fill(early, float("nan"))[:, None], found)
    return found[:, 0]
