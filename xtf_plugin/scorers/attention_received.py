"""Reasoning importance as in the paper: the attention that a token receives from later tokens, Eq. (2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..fields import Drop, Layers
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class AttentionReceivedConfig(ScoreConfig):
    """Scorer `attention_received`: the mean attention from later tokens; 1.0 is uniform attention."""

    layers: Layers = Field(
        default="all", description="Layers whose attention is averaged; numbers count from 0, negative from the last."
    )
    drop: Drop = Field(default=Drop(quantile=0.05), description="Which tokens are dropped: exactly one rule.")
    scope: Literal["document", "dataset"] = Field(
        default="document", description="Whose quantiles a fence or a quantile uses: the document's, or the dataset's."
    )


@scorer("attention_received", AttentionReceivedConfig, per_document=True, reads_attention=True)
def attention_received(context: ScoringContext, config: AttentionReceivedConfig) -> Floats:
    """Attention received from later tokens, averaged over heads and layers, (M,) float32; low is dropped.

    1.0 is uniform attention. NaN for the last token of a document, which no token attends to.
    """
    return context.attention_received(config.layers)
