"""Which trainers, models, collators and rows can be masked. What cannot be is refused by its name, with the next step.

Everything asked here is asked before the first optimizer step; nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import XTFUserError

_UNSLOTHS_COPY = re.compile(r"_?Unsloth(\w+Trainer)")  # of a trainer of TRL's, written anew under TRL's base class
_NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_NOT_TEXT = ("pixel_values", "pixel_values_videos", "image", "images", "input_features", "inputs_embeds")


def check_host(trainer: Any) -> None:
    """Refuse what is no transformers Trainer, and trainers and models whose labels are no tokens of their input.

    Raises:
        XTFUserError: naming the trainer or the model.
    """
    from transformers import Trainer

    kind = type(trainer)
    if not isinstance(trainer, Trainer):
        raise XTFUserError(
            f"attach() needs a transformers Trainer (TRL's SFTTrainer, for one), got {kind.__module__}."
            f"{kind.__name__}: xtf does not know where labels pass by in it. Use transformers' Trainer, TRL's "
            "SFTTrainer, or a subclass of one."
        )
    nearest = _of_trl(kind)
    if nearest not in (None, "SFTTrainer"):
        raise XTFUserError(
            f"xtf: {kind.__name__} is not supported: nothing says that TRL's {nearest} trains on the `labels` of its "
            "rows, and these are what xtf masks. It works in SFTTrainer; remove the block here."
        )
    derived = next((base.__name__ for base in kind.__mro__ if base.__module__.split(".")[0] == "axolotl"), None)
    if derived not in (None, "AxolotlTrainer"):
        raise XTFUserError(
            f"xtf: {kind.__name__} is not supported: nothing says that the loss of Axolotl's {derived} is over the "
            "`labels` that xtf masks. It works in AxolotlTrainer, of which supervised fine-tuning is made; remove the "
            "block here, or what chooses this trainer (the model type, `rl`, a plugin)."
        )
    if trainer.model_init is not None:
        raise XTFUserError(
            f"xtf: {kind.__name__} was given model_init, so train() makes a new model that xtf has never seen. "
            "Pass the model itself: model=model_init()."
        )
    _check_model(kind.__name__, trainer.model)


def _of_trl(kind: type) -> str | None:
    """The trainer of TRL's that a class is, or is a copy of, by name; None: it has nothing of TRL's."""
    for base in kind.__mro__:
        if copied := _UNSLOTHS_COPY.fullmatch(base.__name__):
            return copied[1]
        if base.__module__.split(".")[0] == "trl" and base.__name__.endswith("Trainer"):
            return base.__name__
    return None


def _check_model(trainer: str, model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise XTFUserError(
            f"xtf: {trainer} trains {name}, an encoder-decoder model: its labels are not tokens of its input. xtf "
            "works with causal language models (AutoModelForCausalLM); remove the block here."
        )
    headless = hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is None
    if headless or any(part in name for part in _NO_CAUSAL_LM):
        raise XTFUserError(
            f"xtf: {trainer} trains {name}, which predicts no next tokens (a causal language model has an LM head), so "
            "its labels are none that xtf can mask. Load it with AutoModelForCausalLM, or remove the block here."
        )


def check_collator(collator: Any) -> None:
    """Refuse collators that make labels out of input ids, whatever labels the rows had.

    Raises:
        XTFUserError: naming the collator.
    """
    from transformers import DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling

    if isinstance(collator, (DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling)):
        raise XTFUserError(
            f"xtf: the data collator {type(collator).__name__} makes labels of its own out of input_ids, so none can "
            "be masked. Give the rows a `labels` column (-100 outside the completion) and use "
            "DataCollatorForSeq2Seq(tokenizer), which pads it (Unsloth's train_on_responses_only does both: attach xtf "
            "after it)."
        )


def check_columns(names: Iterable[str]) -> None:
    """Refuse rows whose tokens mean something only together with an image or a sound.

    Raises:
        XTFUserError: naming the columns.
    """
    found = sorted(set(names) & set(_NOT_TEXT))
    if found:
        raise XTFUserError(
            f"xtf: the training rows have {', '.join(found)}: a reference that reads text alone would score their "
            "tokens wrongly. Only text can be scored; remove the columns, or the block."
        )


def text_tokenizer(trainer: Any) -> Any:
    """The text tokenizer of a trainer: its processing class, the one inside a processor, or its collator's.

    Raises:
        XTFUserError: there is none.
    """
    processing = trainer.processing_class
    if processing is None:
        processing = getattr(trainer.data_collator, "tokenizer", None)
    if processing is None:
        raise XTFUserError(
            f"xtf: {type(trainer).__name__} has no tokenizer, which xtf needs for special tokens, patterns and the "
            "report. Pass processing_class=tokenizer to it."
        )
    return getattr(processing, "tokenizer", processing)
