"""What a reference predicts; imports neither NumPy nor torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ragged import Floats


@dataclass(frozen=True)
class Predictions:
    """What a reference predicts at every completion token, (M,) float32 each, in nats; NaN where undefined.

    Args:
        logprobs: natural-log probability of the token.
        entropy: mean surprisal of a token drawn from the reference's own distribution there.
        deviation: standard deviation of that surprisal.
    """

    logprobs: Floats
    entropy: Floats
    deviation: Floats


PREDICTED = tuple(field.name for field in fields(Predictions))
