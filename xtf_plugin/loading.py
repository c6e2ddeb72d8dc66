"""A separate reference comes into memory and goes again: quantised as the block says, freed before the first step."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .errors import XTFUserError
from .reference import Reference

if TYPE_CHECKING:
    from .fields import ReferenceConfig

_LOADED_ON_ONE_RANK = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def compute_dtype(config: ReferenceConfig, device: torch.device) -> torch.dtype:
    """The precision in which a 4-bit reference multiplies: as configured, else bfloat16 where the device has it."""
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load(config: ReferenceConfig, device: torch.device) -> Reference:
    """Load the separate reference that `reference.model` names.

    Raises:
        XTFUserError: it cannot be loaded; the message carries the loader's own.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    quantization: Any = None
    if config.quantization in ("nf4", "fp4"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_compute_dtype=compute_dtype(config, device),
        )
    elif config.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        with _whole_on_every_rank():
            model = AutoModelForCausalLM.from_pretrained(
                config.model,
                revision=config.revision or "main",
                trust_remote_code=config.trust_remote_code,
                quantization_config=quantization,
                dtype=dtype or "auto",
                device_map={"": device},
                use_safetensors=True,  # the other format is a pickle
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise XTFUserError(
            f"xtf.reference.model: {config.model!r} could not be loaded: {error}\n"
            "Give a folder written by save_pretrained or the hub id of a causal language model."
        ) from error
    return Reference(model, str(config.model))


@contextmanager
def _whole_on_every_rank() -> Iterator[None]:
    """Under FSDP transformers can leave weights empty on all ranks but one, for FSDP to hand them out: it never wraps
    this model.
    """
    before = os.environ.get(_LOADED_ON_ONE_RANK)
    os.environ[_LOADED_ON_ONE_RANK] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOADED_ON_ONE_RANK]
        else:
            os.environ[_LOADED_ON_ONE_RANK] = before


def free(reference: Reference) -> None:
    """Drop a separate reference and hand its memory back before the first training step."""
    del reference.model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
