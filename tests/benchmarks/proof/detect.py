"""What the filter finds with one real model on one text: AUC of every score, what the rules drop, and the cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import real
from tests.benchmarks.stats import auc
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.plan import Plan, make_plan
from xtf_plugin.scoring.reference import Reference, borrow
from xtf_plugin.selection.text_rules import segment_starts

from .noise import plant, spoil
from .texts import GOOD, LABELLED, Example, sample

LONGEST = 1_400  # completion tokens; web pages are cut there
UNITS = {"web pages": "line", "wrong steps": "line"}
# Scores that are compared with the default's. Their rules play no part here.
OTHERS: dict[str, dict[str, Any]] = {
    "mean_log_probability": {"scorer": "log_probability", "unit": "sentence"},
    "typicality": {"scorer": "typicality", "unit": "sentence"},
    "attention_received": {"scorer": "attention_received", "layers": "all", "unit": "sentence"},
    "embedding_similarity": {"scorer": "embedding_similarity", "unit": "sentence"},
    "influence_of_all": {"scorer": "influence", "among": None, "unit": "sentence"},
}
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "official": {"preset": "official"},
    "P < 0.1": {"preset": "none", "knowledge_novelty": {"drop": {"unknown_below": 0.1}}},
}


@dataclass(frozen=True)
class Setting:
    """One measurement: a model, a text, how much noise and how many examples."""

    model: str
    text: str
    rate: float
    number: int
    precision: str = "bf16"
    phrases: str = "known"
    seed: int = 0
    shape: str = "spans"
    compared: bool = False  # with the paper's rules, other scores and the influence of every unit, which takes passes

    @property
    def key(self) -> str:
        """The name of its results."""
        return "-".join(str(value) for value in asdict(self).values()).replace(" ", "_")


@dataclass(frozen=True)
class Form:
    """One measurement of `running_text`, which reads the form of lines: it needs a tokenizer, and no model."""

    text: str
    number: int
    model: str = real.SMOLLM2

    @property
    def key(self) -> str:
        """The name of its results."""
        return f"form-{self.text}-{self.number}".replace(" ", "_")


@dataclass
class Provider:
    """A loaded model as the run's own reference; implements `ReferenceProvider`."""

    name: str
    precision: str
    model: Any

    def fingerprint(self) -> str:
        """By name; scores of the laboratory go into a cache of their own."""
        return f"{self.name} {self.precision}".encode().hex()

    def description(self) -> dict[str, Any]:
        """For reports."""
        return {"name": self.name, "quantization": "none", "dtype": self.precision}

    def text_config(self) -> Any:
        """Its config."""
        return self.model.config.get_text_config()

    def open(self) -> AbstractContextManager[Reference]:
        """The reference."""
        return nullcontext(borrow(self.model))


def examples(setting: Setting, data: Path) -> list[Example]:
    """The examples of a setting, noise included."""
    chosen, others = sample(setting.text, data, setting.number, setting.seed)
    if setting.text in LABELLED:
        return chosen
    rng = random.Random(setting.key)
    if setting.shape == "tokens":
        return [spoil(example, setting.rate, rng) for example in chosen]
    return [plant(example, others, setting.rate, rng, phrases=setting.phrases) for example in chosen]


def tokenized(chosen: Sequence[Example], tokenizer: Any) -> tuple[DocumentSet, NDArray[Any]]:
    """The examples as documents, and the kind of every completion token; EOS is good."""
    rows, kinds = [], []
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for example in chosen:
        prompt = _prompt(example, opening, tokenizer)
        text = example.completion
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = found["input_ids"][:LONGEST], found["offset_mapping"][:LONGEST]
        bounds = np.cumsum([len(piece) for piece, _ in example.pieces])
        # a token belongs to the piece of its first character that is no space
        first = [low + (high - low > 1 and text[low] == " ") for low, high in places]
        of = np.minimum(np.searchsorted(bounds, first, side="right"), len(bounds) - 1)
        completion = [*ids, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        kinds.append(np.asarray([*(example.pieces[piece][1] for piece in of), GOOD], dtype=object))
    documents = collect(rows)
    firsts = np.unique(documents.row_documents, return_index=True)[1]
    return documents, np.concatenate([kinds[row] for row in firsts])


def _prompt(example: Example, opening: list[int], tokenizer: Any) -> list[int]:
    """Token ids of a prompt: a question goes through the chat template, if there is one."""
    if not example.chat or not tokenizer.chat_template:
        found: list[int] = opening + tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        return found
    messages = [{"role": "user", "content": example.prompt}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(given)


def measure(setting: Setting, data: Path, cache: Path) -> dict[str, Any]:
    """Everything about one setting, as JSON."""
    tokenizer = real.tokenizer(setting.model)
    documents, kinds = tokenized(examples(setting, data), tokenizer)
    provider = Provider(setting.model, setting.precision, real.load(setting.model, setting.precision))
    unit = UNITS.get(setting.text, "sentence")
    result: dict[str, Any] = {
        **asdict(setting),
        "tokens": len(kinds),
        "noise": float((kinds != GOOD).mean()),
        "rules": {},
    }

    def plan(block: dict[str, Any], folder: Path = cache) -> Plan:
        config = XTFConfig(**{**block, "cache_dir": str(folder)})
        return make_plan(config, documents, provider, tokenizer, progress=False)

    # a pass over the documents and no more, not stored with the others: the default shares its own
    plain = plan(RULES["P < 0.1"], cache.with_name(f"{cache.name} plain")).stats
    for name in RULES if setting.compared else ("default", "P < 0.1"):
        made = plan(_with_unit(RULES[name], unit))
        result["rules"][name] = dropped(~made.selection.keep, kinds)
        if name == "default":
            result["cost"] = _cost(made, documents, plain.seconds)
            result["thresholds"] = made.selection.thresholds
            result["longest"] = examples_of(~made.selection.keep, kinds, documents, tokenizer)
            values = dict(made.selection.seen)
            result["sweep"] = sweep(values["task_relevance"], kinds)
    scores = {name: {**part, "unit": unit, "drop": {"quantile": 0.5}} for name, part in OTHERS.items()}
    if not setting.compared:
        scores = {name: part for name, part in scores.items() if name == "mean_log_probability"}
    values |= plan({"preset": "none", "selectors": scores, "min_kept": 0}).selection.seen
    values["default"] = combined(values)
    starts = segment_starts(documents, tokenizer, unit)
    result["auc"] = {name: _auc_by_kind(value, kinds, starts) for name, value in values.items()}
    return result


def measure_form(form: Form, data: Path, cache: Path) -> dict[str, Any]:
    """What `running_text` drops of a text, and its AUC over lines and over tokens, as JSON."""
    tokenizer = real.tokenizer(form.model)
    documents, kinds = tokenized(sample(form.text, data, form.number, 0)[0], tokenizer)
    block = {"preset": "none", "selectors": {"running_text": {"scorer": "running_text"}}, "cache_dir": str(cache)}
    made = make_plan(XTFConfig.parse(block), documents, Provider(form.model, "none", None), tokenizer, progress=False)
    values = made.selection.seen["running_text"]
    lines = _auc_by_kind(values, kinds, segment_starts(documents, tokenizer, "line"))
    return {
        **asdict(form),
        "rate": 0.0,
        "shape": "form",
        "tokens": len(kinds),
        "noise": float((kinds != GOOD).mean()),
        "rules": {"running_text": dropped(~made.selection.keep, kinds)},
        "auc": {"lines": lines["all"], "tokens": auc(values, kinds != GOOD)},
    }


def _with_unit(block: dict[str, Any], unit: str) -> dict[str, Any]:
    slots = ("reasoning_importance", "knowledge_novelty", "task_relevance")
    return block or {slot: {"unit": unit} for slot in slots}


def combined(values: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """One score for the default's rules on relevance and novelty: each divided by its threshold, the lower one."""
    relevance, novelty = values["task_relevance"].astype(float), values["knowledge_novelty"].astype(float)
    median = float(np.nanmedian(relevance)) if np.isfinite(relevance).any() else 1.0
    return np.fmin(relevance / (0.2 * median), novelty / 0.1)


def sweep(relevance: NDArray[np.float32], kinds: NDArray[Any]) -> dict[str, dict[str, float]]:
    """What `of_median` finds and loses at other shares, without the other two rules."""
    median = float(np.nanmedian(relevance))
    return {str(share): dropped(relevance < share * median, kinds) for share in SHARES}


def dropped(marks: NDArray[np.bool_], kinds: NDArray[Any]) -> dict[str, float]:
    """Share dropped of each kind of token."""
    noise = kinds != GOOD
    shares = {kind: float(marks[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
    return {**shares, "found": float(marks[noise].mean()) if noise.any() else float("nan")}


def _cost(made: Plan, documents: DocumentSet, plain: float) -> dict[str, float]:
    """Tokens that went through the model, as multiples of the dataset's, and seconds likewise of a plain pass."""
    more = made.scorers.get("excerpts", {})
    scoring = made.stats.seconds + more.get("seconds", 0.0)
    return {
        "tokens": (made.stats.tokens + more.get("tokens", 0)) / int(documents.lengths.sum()),
        "seconds": scoring / plain if plain else float("nan"),
    }


def _auc_by_kind(values: NDArray[Any], kinds: NDArray[Any], starts: NDArray[np.int64]) -> dict[str, float]:
    """AUC over units, each of the kind that most of its tokens have; undefined scores count as the highest."""
    ends = np.append(starts[1:], len(kinds))
    parts = (kinds[low:high].tolist() for low, high in zip(starts, ends, strict=True))
    own = [max(set(part), key=part.count) for part in parts]
    unit, score = np.asarray(own, dtype=object), np.asarray(values, dtype=float)[starts]
    good = unit == GOOD
    found = {"all": auc(score, ~good)}
    for kind in dict.fromkeys(unit[~good].tolist()):
        here = good | (unit == kind)
        found[kind] = auc(score[here], ~good[here])
    return found


def examples_of(
    marks: NDArray[np.bool_], kinds: NDArray[Any], documents: DocumentSet, tokenizer: Any, most: int = 60
) -> list[dict[str, Any]]:
    """Good text that was dropped, to be judged by people."""
    ids = documents.input_ids[documents.completion]
    at = np.flatnonzero(marks & (kinds == GOOD))
    spans = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(at) else []
    return [{"text": tokenizer.decode(ids[span]), "tokens": len(span)} for span in spans[:most]]
