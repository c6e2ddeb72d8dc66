"""The interface of what a reference predicts; imports neither NumPy nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .ragged import Floats


class Predictions(Protocol):
    """What a reference predicts at every completion token, (M,) float32 each, in nats; NaN where undefined.

    Attributes:
        logprobs: log-probability of the token.
        entropy: mean surprisal of a token drawn from the reference's own distribution there.
        deviation: standard deviation of that surprisal.
    """

    @property
    def logprobs(self) -> Floats: ...  # noqa: D102
    @property
    def entropy(self) -> Floats: ...  # noqa: D102
    @property
    def deviation(self) -> Floats: ...  # noqa: D102
