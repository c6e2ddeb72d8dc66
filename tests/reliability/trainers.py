"""What the tests of training share: trainers of every kind, all state around a model as facts, processes and ranks.

A process of its own is forked from the server of `scoring`, so that it costs no imports; in the long form ranks are
started by torchrun instead. As a program, this module is one such rank.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from tests import tiny
from tests.made_scores import DEFAULT, odd_sentences
from tests.reliability import LONG, scoring
from tests.training.test_callback import trainer
from xtf_plugin import attach
from xtf_plugin.plan import Plan
from xtf_plugin.scoring.attention_capture import _recorder
from xtf_plugin.selection.select import rule_bits

KINDS = ("full", "lora", "qlora")
# every part of scoring: attention, log-probabilities, embeddings and splices
EVERYTHING = {
    **DEFAULT,
    "selectors": {
        **odd_sentences()["selectors"],
        "looked_at": {"scorer": "attention_received", "drop": {"quantile": 0.2}},
        "new": {"scorer": "novelty", "drop": {"quantile": 0.1}},
        "close": {"scorer": "embedding_similarity", "embedding": "output", "drop": {"quantile": 0.1}},
    },
}
ROOT = Path(__file__).parents[2]
BAND = 1e-4  # how far scores may lie from a threshold and be judged otherwise; docs promise it for float32

_processes = scoring._processes
_processes.set_forkserver_preload([__name__])


def model(kind: str, folder: Path, **shape: Any) -> Any:
    """A tiny model to be trained; in 4 bits for `qlora`. Dropout wherever the kind has some."""
    if kind != "qlora":
        return tiny.model(attention_dropout=0.1, **shape)
    tiny.save_base(folder / "base", **shape)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantization, dtype="float32")


def made(kind: str, folder: Path, block: Any, **options: Any) -> Any:
    """A trainer with `block` attached; None: the stock trainer."""
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    torch.manual_seed(0)
    given = {"model": model(kind, folder), "peft_config": None if kind == "full" else adapter, **options}
    result = trainer(folder, gradient_checkpointing=kind != "full", **given)
    if block is not None:
        attach(result, {"cache_dir": str(folder / "cache"), **block})
    return result


def callback(attached: Any) -> Any:
    """The XTFCallback of a trainer."""
    return attached._xtf_hooks


def around_scoring(attached: Any, look: Callable[[], Any]) -> list[Any]:
    """What `look` gives just before and just after a trainer is scored, also if that fails."""
    own, found = callback(attached).on_train_begin, []

    def on_train_begin(*args: Any, **kwargs: Any) -> None:
        found.append(look())
        try:
            own(*args, **kwargs)
        finally:
            found.append(look())

    callback(attached).on_train_begin = on_train_begin
    return found


class State:
    """Everything about a trainer's model and the process that training depends on, as facts by their place.

    An opaque object is recorded by its id, and kept alive so that no other object gets the id.
    """

    def __init__(self, watched: Any) -> None:
        self.facts: dict[str, Any] = {}
        self._alive: list[Any] = []
        self._seen: dict[int, str] = {}
        for name, module in watched.model.named_modules():
            self.facts[f"{name}: class"] = type(module)
            for key, value in vars(module).items():
                self._record(f"{name}.{key}", value)
        others = ("model", "model_wrapped", "callback_handler", "_xtf_hooks")
        for key, value in vars(watched).items():
            if key not in others:
                self._record(f"trainer {key}", value)
        self._process()

    def differences(self, other: State) -> list[str]:
        names = sorted(self.facts.keys() | other.facts.keys())
        pairs = {name: (self.facts.get(name), other.facts.get(name)) for name in names}
        return [f"{name}: {one} -> {two}"[:300] for name, (one, two) in pairs.items() if one != two]

    def _record(self, place: str, value: Any) -> None:
        self._alive.append(value)
        plain = (str, bytes, int, float, torch.dtype, torch.device, type, type(None))
        if isinstance(value, plain):
            self.facts[place] = value
        elif isinstance(value, torch.Tensor):
            data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            kind = (value.dtype, tuple(value.shape), value.device, value.requires_grad, value.grad is None)
            self.facts[place] = (id(value), *kind, hash(data))
            self._each(place, vars(value))
        elif id(value) in self._seen:
            self.facts[place] = f"see {self._seen[id(value)]}"
        else:
            self._seen[id(value)] = place
            self._object(place, value)

    def _object(self, place: str, value: Any) -> None:
        self.facts[place] = (type(value), id(value))
        if isinstance(value, dict):
            self.facts[place] = [type(value), *map(str, value)]
            self._each(place, value)
        elif isinstance(value, (list, tuple, set)):
            self._each(place, dict(enumerate(value)))
        elif isinstance(value, PretrainedConfig) or (hasattr(value, "__dict__") and not callable(value)):
            self._each(place, vars(value))

    def _each(self, place: str, parts: dict[Any, Any]) -> None:
        for name, value in parts.items():
            self._record(f"{place}.{name}", value)

    def _process(self) -> None:
        hooks = {name: dict(value) for name, value in vars(torch.nn.modules.module).items() if name.endswith("_hooks")}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        facts = {
            "RNG of torch": hash(torch.get_rng_state().numpy().tobytes()),
            "RNG of CUDA": [hash(state.numpy().tobytes()) for state in cuda],
            "RNG of numpy": repr(np.random.get_state()),
            "RNG of python": hash(random.getstate()),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
            "recorder": _recorder.get(),
            "environment": dict(os.environ),
            "warnings": list(warnings.filters),
            "threads": sorted({thread.name for thread in threading.enumerate()} - {"tqdm_monitor"}),  # one for all bars
            "hooks of all modules": hooks,
        }
        self.facts |= {f"process {name}": value for name, value in facts.items()}


@dataclass(frozen=True)
class Part:
    """One document of a plan: what is kept, and of every rule the scores and where it fired."""

    keep: np.ndarray
    scores: dict[str, np.ndarray]
    fired: dict[str, np.ndarray]

    @classmethod
    def of(cls, plan: Plan, index: int) -> Part:
        where = slice(plan.scores.offsets[index], plan.scores.offsets[index + 1])
        scores = {name: seen[where].astype(np.float64) for name, seen in plan.selection.seen.items()}
        reasons = plan.selection.reasons[where]
        fired = {name: (reasons & bit) > 0 for name, bit in rule_bits(plan.config).items()}
        return cls(plan.selection.keep[where], scores, fired)


def moved(one: Plan, two: Plan) -> tuple[dict[str, float], int, list[tuple[int, int]]]:
    """How far two plans of the same documents are apart.

    Returns:
        the largest difference of each score; how many tokens are decided otherwise; and those of them, as document and
        token, in whose document no score that a rule judges otherwise lies in the band around where the rule cuts.
    """
    place = {key.tobytes(): index for index, key in enumerate(two.scores.keys)}
    largest, changed, unexplained = dict.fromkeys(one.config.scores, 0.0), 0, []
    for index, key in enumerate(one.scores.keys):
        a, b = Part.of(one, index), Part.of(two, place[key.tobytes()])
        for name in largest:
            assert np.array_equal(np.isnan(a.scores[name]), np.isnan(b.scores[name])), name
            gaps = np.abs(a.scores[name] - b.scores[name])
            largest[name] = max(largest[name], float(np.nanmax(gaps, initial=0.0)))
        others = np.flatnonzero(a.keep != b.keep)
        changed += len(others)
        if len(others) and not any(near(a, b, name, one.selection.thresholds[name]["drops"]) for name in largest):
            unexplained += [(index, int(token)) for token in others]
    return largest, changed, unexplained


def near(a: Part, b: Part, name: str, drops: dict[str, Any]) -> bool:
    """Whether a rule judges some token of a document otherwise whose score lies in the band around where it cuts."""
    scores, fired = a.scores[name], a.fired[name]
    for token in np.flatnonzero(fired != b.fired[name]):
        cuts = [limit for limit in drops.values() if isinstance(limit, float)]
        if not cuts:  # a share of the document: it cuts between its last token on one side and the first on the other
            cuts = scores[fired != fired[token]]
        if np.nanmin(np.abs(np.asarray(cuts) - scores[token]), initial=np.inf) <= 2 * BAND:
            return True
    return False


def in_band(plan: Plan) -> int:
    """How many tokens could be decided otherwise by scores as far from these as docs allow, floor and caps apart."""
    found = 0
    for index in range(len(plan.scores.keys)):
        part = Part.of(plan, index)
        close = np.zeros(len(part.keep), dtype=bool)
        for name, scores in part.scores.items():
            drops, fired = plan.selection.thresholds[name]["drops"], part.fired[name]
            limits = [limit for limit in drops.values() if isinstance(limit, float)]
            cuts = [(limits, slice(None))] if limits else [(scores[~fired], fired), (scores[fired], ~fired)]
            for across, side in cuts:  # those of a share of the document are the tokens on the other side
                gaps = np.abs(scores[side, None] - np.asarray(across)[None])
                close[side] |= np.nanmin(gaps, axis=1, initial=np.inf) <= BAND
        found += int(close.sum())
    return found


def alone(function: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """What a function of this package's tests returns, as JSON, when it runs in a process of its own."""
    process = _processes.Process(target=_answer, args=(function, folder, options))
    process.start()
    process.join(600)
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"
    return json.loads((folder / "answer.json").read_text())


def _answer(function: Callable[..., Any], folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of a dataloader's workers; else they would need a server too
    gc.freeze()  # objects of the server are not searched again
    folder.mkdir(parents=True, exist_ok=True)
    answer = json.dumps(function(folder, **options))
    (folder / "answer.json").write_text(answer)


def ranks(function: Callable[..., Any], folder: Path, size: int, **options: Any) -> list[Any]:
    """What a function returns, as JSON, on each of several ranks that are connected as a stock launcher does it."""
    if LONG:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(size)]
        words = ["-m", __name__, function.__module__, function.__name__, str(folder), json.dumps(options)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*torchrun, *words], env=environment, check=True, timeout=600)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [(rank, size, port, function, folder, options) for rank in range(size)]
        started = [_processes.Process(target=_forked_rank, args=args) for args in given]
        for process in started:
            process.start()
        for process in started:
            process.join(600)
        assert [process.exitcode for process in started] == [0] * size
    return [json.loads((folder / f"rank-{rank}" / "answer.json").read_text()) for rank in range(size)]


def _forked_rank(
    rank: int, size: int, port: int, function: Callable[..., Any], folder: Path, options: dict[str, Any]
) -> None:
    """As torchrun starts one."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {**{name: str(value) for name, value in known.items()}, "MASTER_ADDR": "127.0.0.1"}
    _rank(function, folder, options)


def _rank(function: Callable[..., Any], folder: Path, options: dict[str, Any]) -> None:
    _answer(function, folder / f"rank-{os.environ['RANK']}", options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import importlib

    _rank(getattr(importlib.import_module(sys.argv[1]), sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
