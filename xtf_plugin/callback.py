"""Attach XTF to a finished trainer: score at the start of training, mask every batch, refuse to be a silent no-op."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


from .cached_scores import ReferenceProvider
from .collator import XTFDataCollator
from .config.block import XTFConfig
from .fields import ReferenceConfig
from .data.documents import IGNORE_INDEX, DocumentSet, collect
from .environment import is_on
from .errors import XTFDryRun, XTFError, XTFUserError
from .hosts.supported import text_tokenizer
from .hosts.trainer import (
    TrainerHooks,
    check_trainer,
    log_report,
    rows,
    rows_under_way,
    streamed,
    visible_columns,
    visible_part,
)
from .plan import Plan, make_plan
from .providers import BorrowedReference, SeparateReference, loading_all_weights
from .ranks import Ranks
from .report import summary, writer
from .streaming import Stream, check_base
from .verification import CHECKED, LabelVerifier, PlannedDocuments

logger = logging.getLogger(__name__)


class XTFCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Scores the training data when training begins and hands the masks to the collator.

    Equals: collect the documents of `trainer.train_dataset`, score them with the reference, apply the thresholds, and
    let `XTFDataCollator` write -100 over the labels of dropped tokens, in training batches only. `attach` is the short
    way. `collator` is that collator; a training loop of one's own can use it after a `dry_run`.

    Args:
        trainer: a finished transformers Trainer, usually TRL's SFTTrainer.
        config: the `xtf:` block.

    Raises:
        XTFUserError: the host is not known, its model or data cannot be masked (images, none), it is streamed in a way
            that cannot be scored, or processes split one model between them otherwise than by FSDP.
        XTFError: from scoring; or a batch is not the planned one, or did not come by.

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
        self._stream = self._streaming()
        around = self._stream.around if self._stream else None
        self._hooks = TrainerHooks(trainer, self.collator, self._on_batch, self._on_trained, self._metrics, around)
        self._verifier: LabelVerifier | None = None
        self._constant_metrics: dict[str, float] = {}
        self._labels = torch.zeros((), dtype=torch.int64)
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score, decide, write the summary; in a dry run, end here."""
        progress = not args.disable_tqdm and state.is_world_process_zero
        if self._stream is not None:
            self._begin_streaming(self._stream, progress, resumed=state.global_step > 0)
            return
        documents = collect(rows(self.trainer.train_dataset, visible_columns(self.trainer)))
        separate = partial(self._separate, documents)
        provider = self._borrowed or self.ranks.run_with_heartbeat(lambda: separate(self.config.reference))
        tokenizer = text_tokenizer(self.trainer)
        with loading_all_weights():  # here, since it may be another thread that loads
            plan = make_plan(
                self.config, documents, provider, tokenizer, references=separate, progress=progress, ranks=self.ranks
            )
        self._adopt(plan)

    def _separate(self, documents: DocumentSet, reference: ReferenceConfig) -> ReferenceProvider:
        return SeparateReference(reference, text_tokenizer(self.trainer), documents, self.trainer.accelerator.device)

    def _streaming(self) -> Stream | None:
        """What scores streamed data while it is trained on; None for a dataset that can be scored beforehand."""
        if streamed(self.trainer.train_dataset):
            stream = Stream(self.config, text_tokenizer(self.trainer))
            if self._borrowed is not None:
                check_base(self._borrowed.reference.model)
            return stream
        usual = XTFConfig.model_fields["calibration"].default
        if self.config.calibration != usual:
            logger.warning(
                "xtf: calibration: %d is for streamed data; this dataset is scored as a whole.", self.config.calibration
            )
        return None

    def _begin_streaming(self, stream: Stream, progress: bool, *, resumed: bool) -> None:
        """Score the first documents, take thresholds from them; the others are scored as they come."""
        trainer, chosen = self.trainer, self.config.reference

        def provider(documents: DocumentSet) -> ReferenceProvider:
            return self._borrowed or self._separate(documents, chosen)

        plan = stream.calibrate(trainer.train_dataset, visible_part(trainer), provider, progress=progress)
        self._adopt(plan)
        summary.print_lines(stream.begin(plan, rows_under_way(trainer), resumed=resumed))
        assert stream.masks is not None
        self.collator.masks, self._verifier = stream.masks, LabelVerifier(stream.masks)

    def _adopt(self, plan: Plan) -> None:
        """Train by this plan from here on: masks, metrics, report, and a first batch to hold against it."""
        args = self.trainer.args
        self.plan = plan
        self.collator.masks = plan.masks()
        self._verifier = LabelVerifier(PlannedDocuments(plan.documents, plan.selection.keep))
        self._constant_metrics = summary.metrics(plan)
        self.ranks.from_main(lambda: self._report(Path(args.output_dir)))
        dry_run = self.config.dry_run or is_on(os.environ.get("XTF_DRY_RUN"))
        self.ranks.agree(str(dry_run).encode(), "XTF_DRY_RUN")  # or one would wait for another that has ended
        if dry_run:
            raise XTFDryRun
        if not (self.plan.selection.keep & (self.plan.scores.positions > 0)).any():
            raise XTFUserError(
                f"the rules drop every one of {len(self.plan.selection.keep)} completion tokens: there is nothing to "
                "train on. Loosen a rule, or set min_kept above 0; `dry_run: true` shows what each rule drops."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a training whose batches do not come by: a loop of its own, or a step that somebody put back."""
        if self._borrowed is not None:
            self._borrowed.note_step()
        if self._verifier is None or not self._verifier.batches:
            raise XTFError(
                f"a step was made with a batch that xtf has not seen: {type(self.trainer).__name__} does not train "
                "through its own training_step (or somebody replaced it after xtf was attached). Attach xtf last."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell in how many batches a label had to be given back because the batch had none left, and if no batch has
        shown that masks are applied.
        """
        batches, _, revived = self.collator.counters.sum(0).tolist()
        if revived:
            logger.warning(
                "xtf: %d of %d batches had no label left and got one back; min_kept: 1 keeps one in every document.",
                revived,
                batches,
            )
        dropped = self._dropped()
        if dropped and self._verifier is not None and self._verifier.batches and not self._verifier.proven:
            logger.warning(
                "xtf: %d tokens were to be dropped, but none of them was in a batch that was held against the plan "
                "(the first %d of %d, then every %dth): nothing has shown that the model was given the masks.",
                dropped,
                min(CHECKED, self._verifier.batches),
                self._verifier.batches,
                CHECKED,
            )
        if self._stream is not None:
            summary.print_lines([self._stream.summary()])
            self._stream.close()

    def _dropped(self) -> int:
        """How many tokens that would train are dropped: of what was read of a stream, else by the plan."""
        if self._stream is not None and self._stream.dropped:  # 0 also if a loader goes past us
            return self._stream.dropped
        if self.plan is None:
            return 0
        return int((~self.plan.selection.keep & (self.plan.scores.positions > 0)).sum())

    def _report(self, output_dir: Path) -> bytes:
        """Write and show what the plan amounts to; nothing of it is for other ranks."""
        assert self.plan is not None
        written, tokenizer = [], text_tokenizer(self.trainer)
        extra = os.environ.get("XTF_SCORES_OUTPUT")
        if self.config.report is not False:
            folder = output_dir / "xtf" if self.config.report is True else Path(os.path.expanduser(self.config.report))
            written = writer.write(self.plan, tokenizer, folder, whole=bool(extra))
            if folder / writer.PAGE in written:
                log_report(self.trainer.args.report_to, folder / writer.PAGE)
        if extra and Path(extra).resolve() not in [path.resolve() for path in written]:
            try:
                written.append(writer.write_again(self.plan, tokenizer, written, Path(extra)))
            except OSError as error:
                raise XTFUserError(
                    f"xtf: the score table {extra} cannot be written ({error}); name another path."
                ) from error
        summary.show(self.plan, written)
        return b""

    def _on_batch(self, inputs: Mapping[str, Any]) -> None:
        """Hold batches against the plan until one has shown that labels are dropped; count labels in all of them."""
        if self.plan is None or self._verifier is None:
            raise XTFError("xtf is attached but scored nothing: XTFCallback was removed from the trainer's callbacks.")
        labels = inputs.get("labels")
        if labels is None:
            raise XTFError("the training batch has no `labels`; xtf masks labels and cannot mask this trainer's loss.")
        self._verifier.check(inputs)
        self._labels = self._labels.to(labels.device) + (labels[..., 1:] != IGNORE_INDEX).sum()
        self._steps += 1

    def _on_trained(self) -> None:
        """Refuse, when it is over, a training that went past all the rest: a `train` of the trainer's own."""
        if self.plan is None:
            raise XTFError(
                f"{type(self.trainer).__name__}.train() has trained without asking its callbacks: xtf scored nothing, "
                "and no label was masked. What was trained is plain SFT; use a trainer that trains with its callbacks."
            )

    def _metrics(self) -> dict[str, float]:
        """What goes to the host's trackers with each training log."""
        if self.plan is None:
            return {}
        metrics = {**self._constant_metrics, **(self._stream.metrics() if self._stream is not None else {})}
        if self._steps:
            metrics["xtf/kept_tokens_per_batch"] = float(self._labels) / self._steps
            self._labels, self._steps = torch.zeros_like(self._labels), 0
        return metrics


def attach(trainer: Any, config: XTFConfig | Mapping[str, Any] | bool | str | None) -> Any:
    """Attach XTF to a finished trainer and return it.

    Equals `trainer.add_callback(XTFCallback(trainer, XTFConfig.parse(config)))`. None or False attach nothing. Attach
    after all else that changes the trainer. Its rows are read when training begins: they may get their labels later
    than this, as in Unsloth. docs/other-hosts.md has what works in which host.

    Args:
        trainer: a transformers Trainer, or TRL's SFTTrainer, of a causal language model; a subclass may take its own
            training step and loss. Its train dataset, map-style or iterable, carries `labels` when training begins.
        config: what would stand under `xtf:` in a recipe: a mapping, true, false, or an `XTFConfig`.

    Raises:
        XTFUserError: the block is wrong, or the trainer is of a kind that cannot be masked; see `XTFCallback`.
        XTFError: it is attached already. What only rows, batches or the reference show, `trainer.train()` raises.

    Example:
        >>> attach(trainer, {"preset": "paper", "min_kept": 1}).train()
    """
    parsed = XTFConfig.parse(config)
    if parsed is not None:
        callback = XTFCallback(trainer, parsed)  # refuses what is no trainer before anything is called on it
        trainer.add_callback(callback)
    return trainer
