"""The fingerprint of a reference: a hex digest under which its scores are stored.

It covers the weights, the config, the quantisation, the numeric precision, the device type and the version of the
scoring code. A local model is identified by its content, so a renamed folder keeps its scores; one of the hub by id,
revision and commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import XTFUserError
from ..files import digest

_WEIGHTS = (".safetensors", ".safetensors.index.json")
SAMPLED = 1_024  # values of a weight
SCORER_VERSION = 1  # raise it when scores of the same model and document change
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures"}


def model_facts(model: Any) -> dict[str, Any]:
    """Digests of config and base weights of a loaded model: the same with and without adapters."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    return {"config": digest(config), "weights": weights_hash(model), "scorer": SCORER_VERSION}


def weights_hash(model: nn.Module) -> str:
    """xxh3-128 of name, dtype, shape and bytes of every base parameter and persistent buffer.

    Raises:
        XTFUserError: this process does not hold the weights (meta device, DeepSpeed ZeRO-3).
    """
    state = xxhash.xxh3_128()
    for name, tensor in sorted(base_tensors(model), key=lambda item: item[0]):
        if tensor.is_meta or hasattr(tensor, "ds_status"):
            raise XTFUserError(
                f"xtf: the weight {name} is not held by this process (meta device or DeepSpeed ZeRO-3), so the "
                "reference cannot be identified. Use DDP or ZeRO-2, or name a `reference.model`."
            )
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()


def weights_sample(model: nn.Module) -> bytes:
    """Hash of name, dtype, shape and first values of every unquantised parameter.

    A cheap check that a model's weights are loaded. Quantised weights may differ between types of devices.
    """
    state = xxhash.xxh3_128()
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point():
            state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor.is_meta}|".encode())
            if not tensor.is_meta:
                state.update(tensor.detach().flatten()[:SAMPLED].view(torch.uint8).cpu().numpy().data)
    return state.digest()


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter and persistent buffer outside adapters, and of 4-bit and 8-bit scales."""
    adapters = _adapter_names(model)
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        parts = name.split(".")
        if adapters.intersection(parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        yield plain, tensor
        quant_state = getattr(tensor, "quant_state", None)  # scales of 4-bit weights
        if quant_state is not None:
            for key, value in quant_state.as_dict().items():
                if isinstance(value, Tensor):
                    yield f"{plain}.{key}", value
        scales = getattr(tensor, "SCB", None)  # scales of 8-bit weights
        if isinstance(scales, Tensor):
            yield f"{plain}.SCB", scales


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; others, such as rotary frequencies, follow from the config and may change."""
    for prefix, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", tensor


def _adapter_names(model: nn.Module) -> set[str]:
    names = {"modules_to_save", "token_adapter"}
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            names.update(module.adapter_layer_names, module.other_param_names)
    return names


def files_facts(model: str, revision: str | None, commit: str | None) -> dict[str, Any]:
    """Facts that identify a model without loading it: the hub commit, or hashes of the files of a local folder.

    Raises:
        XTFUserError: a folder without config or weights, or with weights elsewhere; a hub model of unknown commit.
    """
    folder = Path(model)
    if not folder.is_dir():
        if commit is None:
            raise XTFUserError(
                f"xtf.reference.model: the commit of {model!r} is unknown, so its scores cannot be stored. Set "
                "`revision`, or give the folder of a download."
            )
        return {"hub": model, "revision": revision, "commit": commit, "scorer": SCORER_VERSION}
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".py") and p.is_file())
    if not (folder / "config.json").is_file() or not any(p.suffix == ".safetensors" for p in files):
        raise XTFUserError(
            f"xtf.reference.model: {model} is a folder without config.json and weights (*.safetensors). Give the "
            "folder that `save_pretrained` wrote, or a hub id."
        )
    _check_named(folder)
    hashes = {}
    for path in files:
        state = xxhash.xxh3_128()
        with path.open("rb") as handle:
            while block := handle.read(1 << 24):
                state.update(block)
        hashes[path.name] = state.hexdigest()
    return {"files": hashes, "scorer": SCORER_VERSION}


def _check_named(folder: Path) -> None:
    """Refuse a config or index that names weights outside the folder or in the pickle format: they are not hashed."""
    named = [(folder / "config.json", _read(folder / "config.json").get("transformers_weights"))]
    for path in sorted(folder.glob("*.safetensors.index.json")):
        weights = _read(path).get("weight_map")
        if not isinstance(weights, dict):
            raise XTFUserError(f"xtf.reference.model: {path} is not an index of weights. Download it again.")
        named += [(path, name) for name in weights.values()]
    for path, name in named:
        plain = os.path.normpath(str(name))
        if name is not None and (Path(plain).name != plain or not plain.endswith(_WEIGHTS)):
            raise XTFUserError(
                f"xtf.reference.model: {path} names {name!r}; only safetensors in its folder are read. Save the model "
                "again with `save_pretrained`."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise XTFUserError(f"xtf.reference.model: {path} cannot be read: {error}. Download it again.") from error
    return value if isinstance(value, dict) else {}
