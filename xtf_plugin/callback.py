"""Attach XTF to a finished trainer: score at the start of training, mask every batch, refuse to be a silent no-op."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from . import report
from .collator import XTFDataCollator
from .config import ReferenceConfig, XTFConfig
from .documents import IGNORE_INDEX, collect
from .epochs import EpochSelection, evolving
from .errors import XTFDryRun, XTFError, XTFUserError
from .hosts._compat import is_on
from .hosts.trainer import TrainerHooks, check_trainer, rows, visible_columns
from .pipeline import Plan, ReferenceProvider, make_plan
from .providers import BorrowedReference, SeparateReference
from .ranks import Ranks

logger = logging.getLogger(__name__)


class XTFCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Scores the training data when training begins and hands the masks to the collator.

    Equals: collect the documents of `trainer.train_dataset`, score them with the reference, apply the thresholds, and
    let `XTFDataCollator` write -100 over the labels of dropped tokens, in training batches only. `attach` is the short
    way.

    Args:
        trainer: a finished transformers Trainer, usually TRL's SFTTrainer.
        config: the `xtf:` block.

    Raises:
        XTFUserError: the trainer's data cannot be masked (streaming, images, none), or processes that split one model
            between them otherwise than by FSDP.
        XTFError: from scoring; or the first batch is not the planned one.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=dataset, peft_config=peft_config)
        >>> trainer.add_callback(XTFCallback(trainer, XTFConfig(preset="paper")))
        >>> trainer.train()
    """

    def __init__(self, trainer: Any, config: XTFConfig) -> None:
        check_trainer(trainer)
        self.trainer = trainer
        self.config = config
        self.plan: Plan | None = None
        self.collator = XTFDataCollator(trainer.data_collator)
        self.ranks = Ranks.of(trainer.accelerator)
        self._borrowed = None if config.reference.model else BorrowedReference(trainer, self.ranks)
        epochs = None
        if evolving(config):  # before anything of the trainer is changed: it may refuse
            epochs = EpochSelection(trainer, config, _tokenizer(trainer), lambda: self.plan, self._adopt, self.ranks)
        self._hooks = TrainerHooks(trainer, self.collator, self._on_batch, self._metrics)
        self._verified = False
        self._constant_metrics: dict[str, float] = {}
        self._labels = torch.zeros((), dtype=torch.int64)
        self._steps = 0
        if epochs is not None:
            trainer.add_callback(epochs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score, decide, write the summary; in a dry run, end here."""
        documents = collect(rows(self.trainer.train_dataset, visible_columns(self.trainer)))
        tokenizer = _tokenizer(self.trainer)

        def separate(reference: ReferenceConfig) -> ReferenceProvider:
            return SeparateReference(reference, tokenizer, documents, self.trainer.accelerator.device)

        provider: ReferenceProvider = self._borrowed or separate(self.config.reference)
        progress = not args.disable_tqdm and state.is_world_process_zero
        plan = make_plan(
            self.config, documents, provider, tokenizer, references=separate, progress=progress, ranks=self.ranks
        )
        self._adopt(plan)

    def _adopt(self, plan: Plan, epoch: int = 0) -> None:
        """Train by this plan from here on: masks, metrics, report, and a first batch to hold against it."""
        args = self.trainer.args
        self.plan = plan
        self.collator.masks = plan.masks()
        self._constant_metrics = report.metrics(plan)
        self._verified = False
        self.ranks.from_main(lambda: self._report(Path(args.output_dir), epoch))
        if not epoch and (self.config.dry_run or is_on(os.environ.get("XTF_DRY_RUN"))):
            raise XTFDryRun
        if not (self.plan.selection.keep & (self.plan.scores.positions > 0)).any():
            raise XTFUserError(
                f"the rules drop every one of {len(self.plan.selection.keep)} completion tokens: there is nothing to "
                "train on. Loosen a rule, or set min_kept above 0; `dry_run: true` shows what each rule drops."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell in how many batches a label had to be given back because the batch had none left."""
        batches, _, revived = self.collator.counters.sum(0).tolist()
        if revived:
            logger.warning(
                "xtf: %d of %d batches had no label left and got one back; min_kept: 1 keeps one in every document.",
                revived,
                batches,
            )

    def _report(self, output_dir: Path, epoch: int) -> bytes:
        """Write and show what the plan amounts to; nothing of it is for other ranks."""
        assert self.plan is not None
        written, tokenizer = [], _tokenizer(self.trainer)
        if self.config.report is not False:
            folder = output_dir / "xtf" if self.config.report is True else Path(self.config.report).expanduser()
            folder = folder / f"epoch-{epoch + 1}" if epoch else folder
            written = report.write(self.plan, tokenizer, folder)
        extra = os.environ.get("XTF_SCORES_OUTPUT")
        if extra and not epoch and Path(extra) not in written:
            try:
                written.append(report.write_table(self.plan, tokenizer, Path(extra)))
            except OSError as error:
                raise XTFUserError(
                    f"xtf: the score table {extra} cannot be written ({error}); name another path."
                ) from error
        report.show(self.plan, written)
        return b""

    def _on_batch(self, inputs: Mapping[str, Any]) -> None:
        """Hold the first batch that reaches the model against the plan; count labels from then on."""
        if self.plan is None:
            raise XTFError("xtf is attached but scored nothing: XTFCallback was removed from the trainer's callbacks.")
        labels = inputs.get("labels")
        if labels is None:
            raise XTFError("the training batch has no `labels`; xtf masks labels and cannot mask this trainer's loss.")
        if not self._verified:
            verify_batch(self.plan, inputs)
            self._verified = True
        self._labels = self._labels.to(labels.device) + (labels[..., 1:] != IGNORE_INDEX).sum()
        self._steps += 1

    def _metrics(self) -> dict[str, float]:
        """What goes to the host's trackers with each training log."""
        if self.plan is None:
            return {}
        metrics = dict(self._constant_metrics)
        if self._steps:
            metrics["xtf/kept_tokens_per_batch"] = float(self._labels) / self._steps
            self._labels, self._steps = torch.zeros_like(self._labels), 0
        return metrics


def verify_batch(plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Check that a batch carries exactly the planned labels, by looking its documents up by their tokens.

    Independent of the collator: it sees what reaches the model, after every other piece of the host's pipeline.

    Raises:
        XTFError: a document's labels are not the planned ones, or no document of the plan is in the batch.
    """
    found = 0
    revived = 0
    padded = "attention_mask" not in inputs and "position_ids" not in inputs
    for ids, labels in _pieces(inputs):
        verdict = _matches(plan, ids, labels)
        if verdict is None and padded:
            verdict = _matches_prefix(plan, ids, labels)
        if verdict is None:
            if (labels != IGNORE_INDEX).any():
                raise XTFError(
                    f"the first training batch holds a document of {len(ids)} tokens that xtf did not plan (token ids "
                    f"{ids[:8].tolist()}…). Something changes the rows between the dataset and the model; xtf will "
                    "not guess."
                )
            continue
        found += 1
        revived += int(verdict == "one more")
        if verdict == "differs" or revived > 1:
            raise XTFError(
                f"the first training batch does not carry the planned labels: a document of {len(ids)} tokens arrived "
                f"with {int((labels != IGNORE_INDEX).sum())} labels. A collator or a callback rebuilds labels; "
                "remove it, or train without the `xtf:` block."
            )
    if not found:
        raise XTFError("the first training batch holds no planned document: no sign that the masks are applied.")


def _pieces(inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Token ids and labels of every document in a batch, padding removed."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arrays = {name: inputs[name].cpu().numpy() for name in names if inputs.get(name) is not None}
    pieces = []
    for row in range(len(arrays["input_ids"])):
        ids, labels = arrays["input_ids"][row], arrays["labels"][row]
        real = np.ones(len(ids), dtype=bool)
        if "attention_mask" in arrays and arrays["attention_mask"].ndim == 2:
            real = arrays["attention_mask"][row].astype(bool)
        cuts = [0]
        if "position_ids" in arrays and arrays["position_ids"].ndim == 2:
            cuts = np.flatnonzero(arrays["position_ids"][row][real] == 0).tolist()
        ids, labels = ids[real], labels[real]
        pieces += [(ids[a:b], labels[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    return pieces


def _matches(plan: Plan, ids: Any, labels: Any) -> str | None:
    """None: no planned document has these tokens; else `equal`, `one more` (a label given back) or `differs`."""
    documents, verdict = plan.documents, None
    for index in np.flatnonzero(documents.lengths == len(ids)):
        tokens, completion = documents.document(int(index))
        if not np.array_equal(tokens, ids):
            continue
        where = slice(plan.scores.offsets[index], plan.scores.offsets[index + 1])
        planned = np.zeros(len(ids), dtype=bool)
        planned[np.flatnonzero(completion)[plan.selection.keep[where]]] = True
        kept = labels != IGNORE_INDEX
        if np.array_equal(kept[1:], planned[1:]):
            return "equal"
        more = kept[1:] & ~planned[1:]
        if more.sum() == 1 and not (planned[1:] & ~kept[1:]).any() and completion[1:][more].all():
            verdict = "one more"
        verdict = verdict or "differs"
    return verdict


def _matches_prefix(plan: Plan, ids: Any, labels: Any) -> str | None:
    """`_matches` for a row whose padding no mask tells: the longest document that it begins with."""
    for length in np.unique(plan.documents.lengths)[::-1]:
        if length < len(ids) and (labels[length:] == IGNORE_INDEX).all():
            verdict = _matches(plan, ids[:length], labels[:length])
            if verdict is not None:
                return verdict
    return None


def _tokenizer(trainer: Any) -> Any:
    """The text tokenizer of a trainer, also inside a processor."""
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def attach(trainer: Any, config: XTFConfig | Mapping[str, Any] | bool | str | None) -> Any:
    """Attach XTF to a finished trainer and return it.

    Equals `trainer.add_callback(XTFCallback(trainer, XTFConfig.parse(config)))`. None or False attach nothing.

    Args:
        trainer: a transformers Trainer with a map-style train dataset that carries `labels`.
        config: what would stand under `xtf:` in a recipe.

    Raises:
        XTFUserError: the block is wrong, or the trainer cannot be masked; see `XTFCallback`.

    Example:
        >>> attach(trainer, {"preset": "paper", "min_kept": 1}).train()
    """
    parsed = XTFConfig.parse(config)
    if parsed is not None:
        callback = XTFCallback(trainer, parsed)  # refuses what is no trainer before anything is called on it
        trainer.add_callback(callback)
    return trainer
