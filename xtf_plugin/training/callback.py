"""Attach XTF to a finished trainer: score when training begins, mask every batch, and check that batches are masked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..config.block import XTFConfig
from ..data.documents import IGNORE_INDEX, DocumentSet, collect
from ..environment import RECIPE, is_on, return_freed_memory
from ..errors import XTFDryRun, XTFError, XTFUserError
from ..fields import ReferenceConfig
from ..plan import Plan, make_plan
from ..report import summary, writer
from ..scoring.cached_scores import ReferenceProvider
from ..scoring.distributed import Ranks
from ..scoring.providers import BorrowedReference, SeparateReference, loading_all_weights
from .boundaries import Boundaries
from .collator import XTFDataCollator
from .columns import columns_of
from .streaming import Stream, check_base
from .trainer import check_trainer, log_report, rows, rows_in_flight, streamed, text_tokenizer, visible_part
from .verification import CHECKED, LabelVerifier, PlannedDocuments

logger = logging.getLogger(__name__)


class XTFCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Scores the training data when training begins and passes the masks to the collator.

    Equals: collect the documents of `trainer.train_dataset`, score them with the reference, apply the rules, and let
    `XTFDataCollator` set the labels of dropped tokens to -100, in training batches only. `attach` creates and adds it.
    `collator` is that collator; a custom training loop can use it after a `dry_run`.

    Args:
        trainer: a finished transformers Trainer, usually TRL's SFTTrainer.
        config: the `xtf:` block.

    Raises:
        XTFUserError: the trainer, its model or its data is not supported (see `trainer.check_trainer`), or several
            processes share one model other than by FSDP.
        XTFError: raised during training: scoring failed, or a batch does not carry the planned labels.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=dataset, peft_config=peft_config)
        >>> trainer.add_callback(XTFCallback(trainer, XTFConfig(preset="default")))
        >>> trainer.train()
    """

    def __init__(self, trainer: Any, config: XTFConfig) -> None:
        check_trainer(trainer)
        if getattr(trainer, "_xtf_hooks", None) is not None:
            raise XTFError("xtf is attached to this trainer already; attach it once.")
        self.trainer, self.config = trainer, config
        self.plan: Plan | None = None
        self.collator = XTFDataCollator(trainer.data_collator)
        self.ranks = Ranks.of(trainer.accelerator)
        self._borrowed = None if config.reference.model else BorrowedReference(trainer, self.ranks)
        self._stream = self._streaming()
        self._verifier: LabelVerifier | None = None
        self._constant_metrics: dict[str, float] = {}
        self._labels, self._steps = torch.zeros((), dtype=torch.int64), 0
        trainer._xtf_hooks = self
        trainer.get_train_dataloader = partial(self._train_dataloader, trainer.get_train_dataloader)
        trainer.training_step = partial(self._training_step, trainer.training_step)
        trainer.log, trainer.train = partial(self._log, trainer.log), partial(self._train, trainer.train)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the data, plan the masks and write the report; a dry run ends here."""
        progress = not args.disable_tqdm and state.is_world_process_zero
        if self._stream is not None:
            self._begin_streaming(self._stream, progress, resumed=state.global_step > 0)
            return
        columns = columns_of(self.trainer, self.config)
        documents = collect(rows(self.trainer, self._read_as_collated()))
        separate = partial(self._separate, documents)
        provider = self._borrowed or self.ranks.run_with_heartbeat(lambda: separate(self.config.reference))
        tokenizer = text_tokenizer(self.trainer)
        options: dict[str, Any] = {"references": separate, "progress": progress, "ranks": self.ranks}
        options |= columns._asdict()
        with loading_all_weights():  # on the main thread: `make_plan` may load references on another one
            plan = make_plan(self.config, documents, provider, tokenizer, **options)
        self._adopt(plan)
        return_freed_memory()

    def _read_as_collated(self) -> Boundaries:
        """Find the columns that the trainer's collator ignores, and make our collator ignore them too."""
        found = Boundaries(self.trainer.data_collator)
        self.collator.ignored = found.ignored
        return found

    def _separate(self, documents: DocumentSet, reference: ReferenceConfig) -> ReferenceProvider:
        return SeparateReference(reference, text_tokenizer(self.trainer), documents, self.trainer.accelerator.device)

    def _streaming(self) -> Stream | None:
        """The scorer of a streamed dataset; None for a dataset that is scored before training."""
        if streamed(self.trainer.train_dataset):
            stream = Stream(self.config, text_tokenizer(self.trainer))
            if self._borrowed is not None:
                check_base(self._borrowed.reference.model)
            return stream
        if self.config.calibration != XTFConfig.model_fields["calibration"].default:
            logger.warning(
                "xtf: calibration: %d is for streamed data and has no effect: this dataset is scored completely.",
                self.config.calibration,
            )
        return None

    def _begin_streaming(self, stream: Stream, progress: bool, *, resumed: bool) -> None:
        """Score the calibration sample and take thresholds from it; later rows are scored as they are read."""
        trainer = self.trainer
        plan = stream.calibrate(
            trainer.train_dataset,
            visible_part(trainer, self._read_as_collated()),
            lambda documents: self._borrowed or self._separate(documents, self.config.reference),
            progress=progress,
        )
        self._adopt(plan)
        summary.print_lines(stream.begin(plan, rows_in_flight(trainer), resumed=resumed))
        assert stream.masks is not None
        self.collator.masks, self._verifier = stream.masks, LabelVerifier(stream.masks)

    def _adopt(self, plan: Plan) -> None:
        """Apply a plan from now on: set masks, metrics and verifier, and write the report."""
        plan = self.plan = replace(plan, recipe=getattr(self.trainer, RECIPE, {}))
        self.collator.masks = plan.masks()
        self._verifier = LabelVerifier(PlannedDocuments(plan.documents, plan.selection.keep))
        self._constant_metrics = summary.metrics(plan)
        self.ranks.from_main(lambda: self._report(Path(self.trainer.args.output_dir)))
        dry_run = self.config.dry_run or is_on(os.environ.get("XTF_DRY_RUN"))
        self.ranks.agree(str(dry_run).encode(), "XTF_DRY_RUN")  # else a rank would wait for one that has ended
        if dry_run:
            raise XTFDryRun
        if not (plan.selection.keep & (plan.scores.positions > 0)).any():
            raise XTFUserError(
                f"the rules drop every one of {len(plan.selection.keep)} completion tokens, so there is nothing "
                "to train on. Loosen a rule, or set min_kept above 0; `dry_run: true` shows what each rule drops."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise XTFError if no batch has passed through our hook: the trainer or somebody else replaced the step."""
        if self._borrowed is not None:
            self._borrowed.note_step()
        if self._verifier is None or not self._verifier.batches:
            raise XTFError(
                f"a step was made with a batch that xtf has not seen: {type(self.trainer).__name__} does not train "
                "through its own training_step, or it was replaced after xtf was attached. Attach xtf last."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn of batches in which one label was restored, and if no batch has shown that masks are applied."""
        batches, restored = self.collator.counters.sum(0).tolist()
        if restored:
            logger.warning(
                "xtf: %d of %d batches had no label left, and one was restored; min_kept: 1 keeps one per document.",
                restored,
                batches,
            )
        verifier = self._verifier
        if verifier is not None and verifier.batches and not verifier.proven and (dropped := self._dropped()):
            logger.warning(
                "xtf: the plan drops %d tokens, but no checked batch (the first %d of %d, then every %dth) had one of "
                "them: nothing has shown that the model received the masks.",
                dropped,
                min(CHECKED, verifier.batches),
                verifier.batches,
                CHECKED,
            )
        if self._stream is not None:
            summary.print_lines([self._stream.summary()])
            self._stream.close()

    def _dropped(self) -> int:
        """The number of dropped tokens that would train: of the rows read from a stream, else of the plan."""
        if self._stream is not None and self._stream.dropped:  # 0 also if a dataloader bypasses our dataset
            return self._stream.dropped
        assert self.plan is not None
        return int((~self.plan.selection.keep & (self.plan.scores.positions > 0)).sum())

    def _report(self, output_dir: Path) -> bytes:
        """Write the report and print the summary; returns no bytes for other ranks."""
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
                raise XTFUserError(f"xtf: the score table {extra} cannot be written: {error}. Name another.") from error
        summary.show(self.plan, written)
        return b""

    def _train_dataloader(self, get_train_dataloader: Callable[[], Any]) -> Any:
        """The train dataloader with our collator; the trainer's is restored, since evaluation uses it too."""
        trainer = self.trainer
        inner, dataset = trainer.data_collator, trainer.train_dataset
        self.collator.inner, trainer.data_collator = inner, self.collator
        if self._stream is not None:
            trainer.train_dataset = self._stream.around(dataset)
        try:
            return get_train_dataloader()
        finally:
            trainer.data_collator, trainer.train_dataset = inner, dataset

    def _training_step(self, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.on_batch(inputs)
        return step(model, inputs, *args, **kwargs)

    def on_batch(self, inputs: Mapping[str, Any]) -> None:
        """Check a batch against the plan and count its labels."""
        if self.plan is None or self._verifier is None:
            raise XTFError("xtf is attached but scored nothing: XTFCallback was removed from the trainer's callbacks.")
        labels = inputs.get("labels")
        if labels is None:
            raise XTFError("the training batch has no `labels`: xtf masks labels and cannot mask this trainer's loss.")
        self._verifier.check(inputs)
        self._labels = self._labels.to(labels.device) + (labels[..., 1:] != IGNORE_INDEX).sum()
        self._steps += 1

    def _train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train; raise XTFError after a custom `train` that called no callback."""
        result = train(*args, **kwargs)
        if self.plan is None:
            raise XTFError(
                f"{type(self.trainer).__name__}.train() has trained without calling its callbacks, so xtf scored and "
                "masked nothing: the result is plain SFT. Use a trainer that calls its callbacks."
            )
        return result

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add our metrics to training logs, not to evaluation logs."""
        if "loss" in logs and self.plan is not None:
            logs.update(self._constant_metrics)
            if self._stream is not None:
                logs.update(self._stream.metrics())
            if self._steps:
                logs["xtf/kept_tokens_per_batch"] = float(self._labels) / self._steps
                self._labels, self._steps = torch.zeros_like(self._labels), 0
        log(logs, *args, **kwargs)


def attach(trainer: Any, config: XTFConfig | Mapping[str, Any] | bool | str | None) -> Any:
    """Attach XTF to a finished trainer and return it.

    Equals `trainer.add_callback(XTFCallback(trainer, XTFConfig.parse(config)))`. None and False attach nothing. Attach
    after everything else that changes the trainer. The rows are read when training begins, so they may get their labels
    after this call, as with Unsloth. docs/other-hosts.md lists what works with which trainer.

    Args:
        trainer: a transformers Trainer, or TRL's SFTTrainer, of a causal language model; a subclass may have its own
            training step and loss. Its train dataset, map-style or iterable, has `labels` when training begins.
        config: the value of `xtf:` in a recipe: a mapping, true, false, its text, or an `XTFConfig`.

    Raises:
        XTFUserError: the block is wrong, or the trainer is not supported; see `XTFCallback`.
        XTFError: XTF is attached already. `trainer.train()` raises what only rows, batches or the reference show.

    Example:
        >>> attach(trainer, {"preset": "default"}).train()
    """
    parsed = XTFConfig.parse(config)
    if parsed is not None:
        callback = XTFCallback(trainer, parsed)  # first: `trainer` may have no `add_callback`
        trainer.add_callback(callback)
    return trainer
