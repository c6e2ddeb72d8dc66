"""What a trainer's steps are given, read by the recorder that knows nothing of the package."""

from __future__ import annotations

from typing import Any

from tests.recorder.sitecustomize import documents


def watched(trainer: Any, method: str = "training_step") -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A list that fills up with (token ids, positions with a label) of every document, in order of steps."""
    found, step = [], getattr(trainer, method)

    def spy(model, inputs, *args, **kwargs):
        found.extend((tuple(d["ids"]), tuple(d["kept"])) for d in documents(inputs))
        return step(model, inputs, *args, **kwargs)

    setattr(trainer, method, spy)
    return found
