"""Selectors that evolve: scored again at the start of every epoch from the second on, with the model as it then is.

The scores of an epoch follow from weights that are gone by its second step. So every checkpoint inside such an epoch
carries them, and a run that is resumed there takes them from it or stops: masks made with later weights would differ.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from .batches import ScoringStats
from .config import XTFConfig
from .documents import DocumentSet
from .errors import XTFError, XTFUserError
from .files import write_whole
from .marks import segment_starts
from .pipeline import Plan, replan
from .providers import as_it_stands
from .ranks import ALONE, Ranks
from .records import Records
from .reference import Reference
from .scorer import score
from .selectors import Floats, score_selectors, scorers

logger = logging.getLogger(__name__)

FILE = "xtf_selectors.npz"  # in a checkpoint's folder
FORMAT = 1


def evolving(config: XTFConfig) -> list[str]:
    """Names of the selectors whose scores depend on the model being trained as it stands."""
    return [name for name, scorer in scorers(config).items() if scorer.evolves]


class EpochSelection(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Makes a new plan at the start of every epoch from the second on.

    Equals, at the start of an epoch: score the selectors that evolve, select, hand the plan on. The dataloader starts
    its workers after that, so they get the new masks; workers that outlive an epoch would not, and are refused.

    Args:
        trainer: a finished trainer.
        config: the block, with a selector that evolves.
        tokenizer: the training tokenizer.
        plan: gives the plan in use.
        adopt: takes the new plan and the number of the epoch, 1 for the second.
        ranks: of the run.

    Raises:
        XTFUserError: persistent dataloader workers.
    """

    def __init__(
        self,
        trainer: Any,
        config: XTFConfig,
        tokenizer: Any,
        plan: Callable[[], Plan | None],
        adopt: Callable[[Plan, int], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.trainer, self.config, self.tokenizer = trainer, config, tokenizer
        self.plan, self.adopt, self.ranks = plan, adopt, ranks
        self.names = evolving(config)
        self.epoch: int | None = None
        self._stats = ScoringStats()
        told = f"xtf: the selector {self.names[0]} selects anew in every epoch, which"
        if trainer.args.dataloader_persistent_workers and trainer.args.dataloader_num_workers:
            raise XTFUserError(
                f"{told} dataloader workers that outlive an epoch never hear of. Set dataloader_persistent_workers: "
                "false."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a run that would end before the selectors select anything."""
        self.epoch = None
        if state.num_train_epochs < 2:
            raise XTFUserError(
                f"xtf: the selector {self.names[0]} selects from the second epoch on, but this run has "
                f"{state.num_train_epochs} (num_train_epochs, or max_steps over the steps of one epoch). Train for "
                "more epochs, or remove the selector."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Score, select and hand the plan on; in the middle of a resumed epoch, with the scores of the checkpoint."""
        inside = 0
        if self.epoch is None:  # the first epoch of this process, which a checkpoint may have begun before
            steps = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
            self.epoch, inside = divmod(state.global_step, steps)
        else:
            self.epoch += 1
        plan = self.plan()
        if self.epoch == 0 or plan is None:
            return
        self._stats = ScoringStats()
        if inside:
            found: Mapping[str, Floats | None] = self._restored(plan, args, state.global_step)
        else:
            assert plan.source is not None
            marks = plan.marked(self.tokenizer)
            found = score_selectors(
                self.config,
                self.tokenizer,
                plan.source,
                lambda: self._current(plan.documents, args.disable_tqdm),
                partial(segment_starts, plan.documents, self.tokenizer),
                marks.protected,
                marks.forced,
            )
        self.adopt(replan(plan, self.tokenizer, found, self._stats, self.ranks), self.epoch)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put this epoch's scores beside the checkpoint that was just written."""
        plan = self.plan()
        if not self.epoch or plan is None or not self.trainer.args.should_save:
            return
        arrays: dict[str, NDArray[Any]] = {
            "about": np.asarray(self._about(self.epoch, state.global_step)),
            "keys": plan.documents.keys,
            "offsets": plan.scores.offsets,
        }
        for name in self.names:
            values = plan.scores.selectors[name]
            assert values is not None
            arrays[f"scores_{name}"] = values
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stubs mix the arrays up with allow_pickle
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            if not folder.is_dir():  # one of ours alone would pass for the last checkpoint
                raise FileNotFoundError(f"there is no {folder}")
            write_whole(folder / FILE, buffer.getbuffer())
        except OSError as error:
            logger.warning(
                "xtf: no run can resume from checkpoint %d: its selectors' scores cannot be written (%s)",
                state.global_step,
                error,
            )

    def _about(self, epoch: int, step: int) -> str:
        """What the scores of a checkpoint must agree in with the run that takes them."""
        plan = self.plan()
        assert plan is not None
        parts = {name: plan.selectors["scorers"][name] for name in self.names}
        block = self.config.to_dict()["selectors"]
        return json.dumps(
            {
                "format": FORMAT,
                "epoch": epoch,
                "step": step,
                "reference": plan.reference["fingerprint"],
                "selectors": {name: [block[name], parts[name]["version"]] for name in self.names},
            },
            sort_keys=True,
        )

    def _restored(self, plan: Plan, args: Any, step: int) -> dict[str, Floats]:
        """This epoch's scores as the checkpoint has them."""
        places = [Path(args.output_dir) / f"checkpoint-{step}"]
        if isinstance(args.resume_from_checkpoint, str):
            places.insert(0, Path(args.resume_from_checkpoint))
        path = next((place / FILE for place in places if (place / FILE).is_file()), places[-1] / FILE)
        assert self.epoch is not None
        why = (
            f"this run resumes in the middle of epoch {self.epoch + 1}, whose tokens the selector {self.names[0]} "
            "chose with the weights at the start of that epoch. Resume from a checkpoint at the end of an epoch, or "
            "start again."
        )
        try:
            with np.load(io.BytesIO(self.ranks.from_main(path.read_bytes))) as stored:  # refuses pickled arrays
                about, keys, offsets = str(stored["about"]), stored["keys"], stored["offsets"]
                found = {name: stored[f"scores_{name}"] for name in self.names}
        except FileNotFoundError:
            raise XTFUserError(f"xtf: {path} is not there, but {why}") from None
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise XTFUserError(f"xtf: {path} cannot be read ({error}), but {why}") from error
        same = np.array_equal(keys, plan.documents.keys) and np.array_equal(offsets, plan.scores.offsets)
        if not same or about != self._about(self.epoch, step):
            other = "other data" if not same else "another block, reference or step"
            raise XTFUserError(f"xtf: {path} belongs to {other}, but {why}")
        return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in found.items()}

    def _current(self, documents: DocumentSet, quiet: bool) -> Floats:
        """Log-probabilities of all completion tokens under the model being trained, adapters on, (M,)."""
        budget = None if self.config.batch_tokens == "auto" else int(self.config.batch_tokens)
        reference, progress = as_it_stands(self.trainer, self.ranks), self.ranks.main and not quiet
        found, self._stats = log_probabilities(documents, reference, budget, progress=progress, ranks=self.ranks)
        return found


def log_probabilities(
    documents: DocumentSet, reference: Reference, budget: int | None, *, progress: bool, ranks: Ranks = ALONE
) -> tuple[Floats, ScoringStats]:
    """Log-probabilities of all completion tokens, (M,) float32, without the store: the weights are gone tomorrow.

    Equals what the store gives back after `scorer.score`, log-probabilities alone.
    """
    offsets = documents.completion_offsets
    place = {key.tobytes(): index for index, key in enumerate(documents.keys)}
    found = np.full(int(offsets[-1]), np.nan, dtype=np.float32)

    def sink(records: Records) -> None:
        for row, key in enumerate(records.keys):
            index = place[key.tobytes()]
            part = slice(records.offsets[row], records.offsets[row + 1])
            found[offsets[index] : offsets[index + 1]] = records.logprobs[part]

    wanted = np.flatnonzero(np.diff(offsets) > 0)
    stats = score(documents, wanted, reference, (), sink, batch_tokens=budget, progress=progress, ranks=ranks)
    found = ranks.broadcast_if_different(found)
    if np.isnan(found[documents.completion_positions > 0]).all():
        raise XTFError("the model being trained gives NaN for every completion token: training has diverged.")
    return found, stats
