"""Where the reference comes from: the model being trained, or a separate model that is freed before the first step.

A provider computes the fingerprint without running the reference, so a start with all scores stored runs no model.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..data.documents import DocumentSet
from ..errors import XTFError, XTFUserError
from ..files import digest
from .distributed import ALONE, Ranks
from .fingerprint import base_tensors, files_facts, model_facts, weights_hash
from .reference import Reference, ShardedReference, borrow

if TYPE_CHECKING:
    from ..fields import ReferenceConfig

logger = logging.getLogger(__name__)
_LOADED_ON_ONE_RANK = "FSDP_CPU_RAM_EFFICIENT_LOADING"
SAMPLE_DOCUMENTS = 32  # tokenised by both tokenizers to compare them


class BorrowedReference:
    """The model being trained, with its adapters off; it must still have the weights of the base model.

    Args:
        trainer: the trainer, before its first step.

    Raises:
        XTFUserError: the weights or the adapters cannot be used; see `borrow` and `weights_hash`.
    """

    def __init__(self, trainer: Any, ranks: Ranks = ALONE) -> None:
        self.trainer = trainer
        self.reference = borrow(trainer.model, trainer.accelerator.autocast)
        self.has_adapters = self.reference.model is not trainer.model
        self.sharded = ranks.size > 1 and bool(getattr(trainer, "is_fsdp_enabled", False))
        if self.sharded:  # other ranks may hold empty weights until FSDP distributes rank 0's
            facts = ranks.from_main(lambda: json.dumps(model_facts(self.reference.model)).encode())
            self._facts = json.loads(facts)
        else:
            self._facts = model_facts(self.reference.model)
        self._precision = str(trainer.accelerator.mixed_precision)
        self._stepped = False

    def fingerprint(self) -> str:
        """Hash of the base weights when XTF was attached, the run's mixed precision and the device type."""
        return digest({**self._facts, "autocast": self._precision, "device": self._device()})

    def note_step(self) -> None:
        """Note that an optimizer step was made: a second training resets `global_step`."""
        self._stepped = True

    def _device(self) -> str:
        """Device type; kernels and 4-bit products round differently by device."""
        return str(self.trainer.accelerator.device.type if self.sharded else self.reference.device.type)

    def description(self) -> dict[str, Any]:
        """Name and precision, for reports."""
        loaded = {bits: getattr(self.reference.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)}
        return {
            "name": self.reference.name,
            "source": "the model being trained, adapters off" if self.has_adapters else "the model being trained",
            "quantization": "int8" if loaded[8] else "nf4/fp4" if loaded[4] else "none",
            "autocast": self._precision,
            "device": self._device(),
            "weights": self._facts["weights"][:12],
        }

    def text_config(self) -> Any:
        """Config of the language model."""
        return self.reference.text_config

    @contextmanager
    def open(self) -> Iterator[Reference]:
        """The reference.

        Raises:
            XTFError: training has changed its weights (full fine-tuning, or adapters with `bias`).
        """
        changed = False
        if not self.sharded:
            changed = weights_hash(self.reference.model) != self._facts["weights"]
        elif self._stepped or self.trainer.state.global_step:  # no rank holds all weights
            changed = any(tensor.requires_grad for _, tensor in base_tensors(self.reference.model))
        if changed:
            raise XTFError(
                "some documents have no stored scores, and the model's weights are no longer those of the base model "
                "(resumed or second training), so they would give other masks. Restore the score cache of the first "
                "run (xtf `cache_dir`) and its block, or name the base model under xtf `reference.model`."
            )
        found = self.reference
        if self.sharded:
            parts = found.model, found.name, found.adapters_off, found.autocast
            found = ShardedReference(*parts, root=self.trainer.model_wrapped)
        yield found


class SeparateReference:
    """A separate model with the training model's vocabulary, usually smaller or more strongly quantised.

    Args:
        config: the `reference` part of the block, with `model` set.
        tokenizer: the training tokenizer.
        documents: the training documents; both tokenizers tokenise a sample.
        device: on which to score.

    Raises:
        XTFUserError: config or tokenizer cannot be loaded, or the tokenizers differ.
    """

    def __init__(self, config: ReferenceConfig, tokenizer: Any, documents: DocumentSet, device: torch.device) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.config, self.device = config, device
        options = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
        try:
            self._model_config = AutoConfig.from_pretrained(config.model, **options)
            theirs = AutoTokenizer.from_pretrained(config.model, **options)
        except (OSError, ValueError, ImportError) as error:
            raise XTFUserError(
                f"xtf.reference.model: config and tokenizer of {config.model!r} could not be loaded: {error}\n"
                "Give a folder written by save_pretrained (with its tokenizer) or a hub id."
            ) from error
        check_tokenizers(tokenizer, theirs, documents, str(config.model))

    def fingerprint(self) -> str:
        """Hash of the model's files or hub commit, its quantisation, precision and device type."""
        commit = getattr(self._model_config, "_commit_hash", None)
        compute = str(compute_dtype(self.config, self.device))
        precision = {"dtype": self.config.dtype, "device": self.device.type, "compute": compute}
        facts = files_facts(str(self.config.model), self.config.revision, commit)
        return digest({**facts, **precision, "quantization": self.config.quantization})

    def description(self) -> dict[str, Any]:
        """Name and precision, for reports."""
        return {
            "name": str(self.config.model),
            "source": "a separate model",
            "quantization": self.config.quantization,
            "dtype": self.config.dtype,
            "compute": str(compute_dtype(self.config, self.device)).removeprefix("torch."),
            "device": self.device.type,
        }

    def text_config(self) -> Any:
        """Config of the language model."""
        return self._model_config.get_text_config()

    @contextmanager
    def open(self) -> Iterator[Reference]:
        """Load the model, and free its memory on exit."""
        reference = load(self.config, self.device)
        try:
            yield reference
        finally:
            del reference.model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def check_tokenizers(ours: Any, theirs: Any, documents: DocumentSet, name: str) -> None:
    """Check that two tokenizers agree: their vocabularies, special tokens, and token ids of a sample of the data.

    Raises:
        XTFUserError: with the first difference.
    """
    hint = "Use a reference of the same model family, with the same tokenizer (and the same added chat tokens)."
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    if vocabulary != other:
        differing = sorted(set(vocabulary.items()) ^ set(other.items()), key=lambda item: item[1])
        raise XTFUserError(
            f"xtf.reference.model: the tokenizer of {name} has another vocabulary: {len(other)} entries against "
            f"{len(vocabulary)} of the training tokenizer, first difference {differing[0]!r}. {hint}"
        )
    for special in ("bos_token_id", "eos_token_id", "unk_token_id"):
        if getattr(ours, special) != getattr(theirs, special):
            raise XTFUserError(
                f"xtf.reference.model: {special} is {getattr(theirs, special)} in {name} and {getattr(ours, special)} "
                f"in the training tokenizer. {hint}"
            )
    step = max(1, len(documents) // SAMPLE_DOCUMENTS)
    for index in range(0, len(documents), step):
        text = ours.decode(documents.document(index)[0], skip_special_tokens=True)
        if ours(text, add_special_tokens=False)["input_ids"] != theirs(text, add_special_tokens=False)["input_ids"]:
            raise XTFUserError(
                f"xtf.reference.model: the tokenizer of {name} cuts the training text differently, for example "
                f"{text[:80]!r}. {hint}"
            )


def compute_dtype(config: ReferenceConfig, device: torch.device) -> torch.dtype:
    """The dtype in which a 4-bit reference computes: as configured, else bfloat16 on GPUs that support it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load(config: ReferenceConfig, device: torch.device) -> Reference:
    """Load the separate reference that `reference.model` names.

    Raises:
        XTFUserError: it cannot be loaded; the message includes the loader's.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if config.quantization in ("nf4", "fp4"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_compute_dtype=compute_dtype(config, device),
        )
    elif config.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantization,
            dtype=config.dtype,
            device_map={"": device},
            use_safetensors=True,  # the other format is pickle
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise XTFUserError(
            f"xtf.reference.model: {config.model!r} could not be loaded: {error}\n"
            "Give a folder written by save_pretrained or the hub id of a causal language model."
        ) from error
    return Reference(model, str(config.model))


@contextmanager
def loading_all_weights() -> Iterator[None]:
    """Load models with all weights on every rank within this context.

    With FSDP's cpu_ram_efficient_loading, transformers loads weights on one rank only, and FSDP, which does not wrap a
    separate reference, distributes them. transformers reads this setting from the environment, which all threads share:
    enter this context on the main thread, before starting others that load.
    """
    before = os.environ.get(_LOADED_ON_ONE_RANK)
    if before is not None:
        os.environ[_LOADED_ON_ONE_RANK] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[_LOADED_ON_ONE_RANK] = before
