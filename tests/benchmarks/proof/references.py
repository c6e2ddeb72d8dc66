"""Reference models that peers need: the base model fine-tuned on a little clean text, or on part of the noisy set.

Excess-loss selection (Rho-1, arXiv 2404.07965) assumes a reference trained on clean data; fixed Token Cleaning (arXiv
2502.01968) trains its own on a part of the data at hand.
"""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import Encoder, Row
    from .runs import Job, Scale


def clean_rows(world: str, scale: Scale, encoder: Encoder) -> list[Row]:
    """What the reference `clean` is trained on; no held-out problem may be among it."""
    from .data import make_rows

    return make_rows(world, scale.clean_reference_rows, 0.0, 10_000, encoder)


def reference_path(name: str, job: Job, folder: Path, scale: Scale, encoder: Encoder) -> Path:
    """Folder of the reference `clean` or `warm_up` for a job, trained now unless it is there."""
    from . import finetune
    from .data import make_rows

    noise = (job.rate, job.kinds, job.forms, job.seed) if name == "warm_up" else ()
    code = hashlib.sha1(repr((name, job.world, job.base, noise, scale)).encode()).hexdigest()[:12]
    target = folder / "references" / code
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{code}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may ask for the same one at once
        if not (target / "config.json").exists():
            if name == "clean":
                rows = clean_rows(job.world, scale, encoder)
            else:
                rows = make_rows(job.world, scale.rows, job.rate, job.seed, encoder, kinds=job.kinds, forms=job.forms)
                rows = rows[: len(rows) // 2]
            settings = finetune.TuneSettings(
                epochs=scale.epochs, batch=scale.batch, learning_rate=scale.learning_rates[job.world]
            )
            _, model, _ = finetune.tune(folder / f"base-{job.base}", rows, 10_000, settings)
            encoder.tokenizer.save_pretrained(target)
            model.save_pretrained(target)
    return target
