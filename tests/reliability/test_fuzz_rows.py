"""Rows that no trainer should hand over: documents come out as a plain loop would cut them, or one clear refusal does.

What does come out goes through selection and the collator, in any order, packing and batch: nothing but labels changes,
and only to -100, and each document keeps the same tokens wherever it turns up.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.made_scores import RI, TR, with_scores
from tests.reliability import amount, record
from tests.reliability.strategies import IGNORED, Piece, Reading, agree, check_selection, collated, inputs, naive, plain
from tests.test_plan import ATTRIBUTES_ON, Provider
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.distinct import TOKEN_IDS
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.errors import XTFError
from xtf_plugin.plan import make_plan, scores_of
from xtf_plugin.selection.masks import MaskTable

# what only a foreign traceback would say
FOREIGN = ("inhomogeneous", "invalid literal", "too large to convert", "numpy", "subscriptable")

ids = st.sampled_from([0, 1, 2, 3, 5, 7, 35, 434, TOKEN_IDS - 1])
labels = st.sampled_from([IGNORED, IGNORED, 0, 7, 255, -1, -99, 2**31, 2**62, -(2**63)])
FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "int64": lambda column: np.asarray(column, dtype=np.int64),
    "strided": lambda column: np.asarray([*column, *column], dtype=np.int64).reshape(2, -1).T.copy()[:, 0],
    "tensor": lambda column: torch.tensor(column, dtype=torch.int64),
    "numpy items": lambda column: [np.int64(value) for value in column],
}
SMALL = {"uint8": np.uint8, "int16": np.int16, "torch uint8": torch.uint8, "torch int32": torch.int32}


def formed(draw: Any, column: list[int]) -> Any:
    """A column as some kind of sequence; small numbers may lie in a type that holds no -100."""
    fits = bool(column) and 0 <= min(column) and max(column) <= 255
    kind = draw(st.sampled_from([*FORMS, *(3 * [*SMALL] if fits else [])]))
    if kind in FORMS:
        return FORMS[kind](column)
    return (torch.tensor if kind.startswith("torch") else np.asarray)(column, dtype=SMALL[kind])


@st.composite
def pieces(draw: Any) -> tuple[list[int], list[int]]:
    """One document: token ids and labels."""
    tokens = draw(st.lists(ids, min_size=0, max_size=7))
    kind = draw(st.sampled_from(["mixed", "mixed", "all", "none"]))
    fixed = {"all": tokens, "none": [IGNORED] * len(tokens)}
    size = len(tokens)
    return tokens, fixed.get(kind) or draw(st.lists(labels, min_size=size, max_size=size))


def packed(draw: Any, inside: list[tuple[list[int], list[int]]], kind: str) -> dict[str, Any]:
    """Documents as one row, their boundaries given by `kind`; perhaps with padding on either side."""
    columns = {"input_ids": [t for d in inside for t in d[0]], "labels": [t for d in inside for t in d[1]]}
    if kind == "seq_lengths":
        columns["seq_lengths"] = [len(tokens) for tokens, _ in inside]
    elif kind == "position_ids":
        columns["position_ids"] = [place for tokens, _ in inside for place in range(len(tokens))]
    left, right = draw(st.sampled_from([(0, 0), (0, 0), (2, 0), (0, 3)]))
    if left or right:
        columns["attention_mask"] = [1] * len(columns["input_ids"])
        fill = {"input_ids": 1, "labels": IGNORED, "attention_mask": 0, "position_ids": 9}
        columns |= {n: [fill[n]] * left + columns[n] + [fill[n]] * right for n in fill if n in columns}
    row: dict[str, Any] = {name: formed(draw, column) for name, column in columns.items()}
    if "attention_mask" in row and draw(st.booleans()):
        row["attention_mask"] = torch.tensor(columns["attention_mask"], dtype=torch.bool)
    return {**draw(st.sampled_from([{}, {"text": "kept"}, {"seq_lengths": None}])), **row}


@st.composite
def rows(draw: Any) -> list[dict[str, Any]]:
    """A sound dataset: some documents twice, some alone, some packed."""
    pool = draw(st.lists(pieces(), min_size=1, max_size=4))
    groups = draw(st.lists(st.lists(st.sampled_from(pool), min_size=1, max_size=3), min_size=1, max_size=4))
    made = []
    for group in groups:
        whole = [document for document in group if document[0]] or group[:1]  # packing leaves no empty documents
        kinds = ["position_ids", *(["seq_lengths"] if all(tokens for tokens, _ in whole) else []), "wrapped"]
        made.append(packed(draw, whole, draw(st.sampled_from(kinds)) if len(whole) > 1 else "wrapped"))
    return made


ITEMS = [
    -1,
    -100,
    TOKEN_IDS,
    2**31,
    2**40,
    2**63,
    2**70,
    -(2**70),
    1.5,
    7.0,
    float("nan"),
    float("inf"),
    None,
    "7",
    "a",
    True,
]
ITEMS += [[1], [], b"1", {}, np.float32(0.5), np.uint64(2**64 - 100), np.datetime64("2020-01-01"), 1j, "0", 0]
WHOLES = [None, [], 3, 0, "12", b"12", {}, [[1, 2]], [[1], [2, 3]], [None], ["a"], np.zeros((2, 2)), np.asarray(4)]
WHOLES += [[2.9, 2.9], [1, -1, 4], [0, 4], [10**30], range(4), np.asarray(["a", "b"]), torch.ones(4, 1), torch.ones(())]
WHOLES += [torch.zeros(4), torch.zeros(4, requires_grad=True), torch.ones(4, dtype=torch.bfloat16)]
NAMES = ["input_ids", "labels", "seq_lengths", "position_ids", "attention_mask"]


@st.composite
def lying(draw: Any) -> list[dict[str, Any]]:
    """A dataset of which one row is not what it should be."""
    made = draw(rows())
    row, name = draw(st.sampled_from(made)), draw(st.sampled_from(NAMES))
    column = list(plain(row[name])) if row.get(name) is not None else []
    kind = draw(st.sampled_from(["item", "item", "longer", "shorter", "whole", "missing", "numbers", "wrapping"]))
    if kind == "whole" or (not column and kind in ("item", "shorter")):
        row[name] = draw(st.sampled_from(WHOLES))
    elif kind == "item":
        column[draw(st.integers(0, len(column) - 1))] = draw(st.sampled_from(ITEMS))
        row[name] = column
    elif kind == "missing":
        row.pop(name, None)
    elif kind == "wrapping":  # their sum in 64 bits is the number of tokens
        row["seq_lengths"] = [2**63 - 1, 2**63 - 1, len(plain(row["labels"])) + 2]
    elif kind in ("longer", "shorter"):
        row[name] = [*column, draw(st.sampled_from([0, 1, IGNORED]))] if kind == "longer" else column[:-1]
    else:
        row[name] = draw(st.lists(st.integers(-1, 6), max_size=9))
    return made


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", ["sound", "lying"])
def test_rows_become_the_documents_of_a_plain_loop_or_one_refusal(kind: str) -> None:
    seen: Counter[str] = Counter()

    @inputs(400, 5_000)
    @given(rows() if kind == "sound" else lying())
    def holds(data: list[dict[str, Any]]) -> None:
        expected, may_refuse = naive(data)
        seen["inputs"] += 1
        try:
            made = collect(data)
        except XTFError as error:
            assert may_refuse, f"refused: {error}"
            assert len(str(error)) < 600 and not any(word in str(error) for word in FOREIGN), str(error)
            seen["refused"] += 1
        else:
            assert expected is not None, "rows that say nothing certain were taken"
            agree(made, expected)

    holds()
    share = seen["refused"] / seen["inputs"]
    assert 0.25 < share < 0.98 if kind == "lying" else 0 < share < 0.5
    record("fuzzed rows", **seen)


BLOCKS = [
    {"preset": "paper", "min_kept": 1},
    {"preset": "paper", "min_kept": 0, "knowledge_novelty": {"drop": {"unknown_below": 0.9}}},
    {"preset": "official", "min_kept": 2, "combine": "majority"},
    {"preset": "none", "reasoning_importance": {"drop": {"quantile": 0.6}, "window": 3}, "control": "random"},
    {"preset": "none", "knowledge_novelty": {"drop": {"quantile": 0.5}}, "min_kept": 3},
]


def decided(config: XTFConfig, documents: DocumentSet) -> Any:
    """What is kept of documents whose scores, protection and force follow from their content alone."""
    size = int(documents.completion_offsets[-1])
    columns = np.full((3, size), np.nan, dtype=np.float32)
    for index, key in enumerate(documents.keys):
        low, high = documents.completion_offsets[index : index + 2]
        columns[:, low:high] = np.random.default_rng(list(key)).exponential(size=(3, high - low))
    columns[:, documents.completion_positions == 0] = np.nan
    token_ids = documents.input_ids[documents.completion]
    relevance = np.cos(token_ids.astype(np.float64)).astype(np.float32) ** 2
    values = {"logprobs": -columns[0], RI: columns[2], TR: relevance}
    scores = with_scores(scores_of(documents, None, {}), **values)
    return check_selection(scores, config, token_ids % 5 == 0, token_ids % 7 == 0)


def fates(made: Any, documents: DocumentSet) -> dict[Piece, list[bool]]:
    """What is kept of each document's completion tokens; documents without tokens say nothing."""
    ends, known = documents.completion_offsets, map(documents.document, range(len(documents)))
    pieces = [(tuple(plain(tokens)), tuple(plain(mask))) for tokens, mask in known]
    return {piece: plain(made.keep[ends[i] : ends[i + 1]]) for i, piece in enumerate(pieces) if piece[0]}


def repacked(documents: DocumentSet, rng: random.Random) -> list[dict[str, Any]]:
    """Every occurrence of every document that is not empty again, in another order and other rows."""
    order = [at for at in np.repeat(np.arange(len(documents)), documents.counts) if documents.lengths[at]]
    rng.shuffle(order)
    made = []
    while order:
        inside = [documents.document(order.pop()) for _ in range(min(len(order), rng.randint(1, 3)))]
        tokens, mask = (np.concatenate([each[part] for each in inside]) for part in (0, 1))
        lengths = [len(each) for each, _ in inside]
        restarts = [place for length in lengths for place in range(length)]
        bounds = {"seq_lengths": lengths} if rng.random() < 0.5 else {"position_ids": restarts}
        made.append({"input_ids": plain(tokens), "labels": plain(np.where(mask, tokens, IGNORED)), **bounds})
    return made


def check_batch(batch: list[dict[str, Any]], masks: MaskTable, kept: dict[Piece, list[bool]], nested: bool) -> None:
    """The labels of a batch are those that its documents keep; one comes back where none that trains is left."""
    expected, trains = [], 0
    for row in batch:
        labels = list(plain(row["labels"]))
        where = [at for at, label in enumerate(labels) if label != IGNORED]
        known = [piece for piece in Reading(row).documents() if piece[0]]
        fate = [both for piece in known for both in zip(kept[piece], places(piece), strict=True)]
        for at, (flag, place) in zip(where, fate, strict=True):
            labels[at] = labels[at] if flag else IGNORED
            trains += flag and place > 0  # nothing predicts a document's first token
        expected.append(labels)
    found = [list(plain(row["labels"])) for row in collated(batch, masks, nested=nested)]
    back = [(i, j) for i, labels in enumerate(found) for j, label in enumerate(labels) if label != expected[i][j]]
    assert len(back) <= (1 if trains == 0 else 0), "labels came back that nothing asked for"
    assert all(expected[i][j] == IGNORED for i, j in back)


def places(piece: Piece) -> list[int]:
    return [place for place, flag in enumerate(piece[1]) if flag]


def test_a_document_keeps_the_same_tokens_in_every_order_packing_and_batch() -> None:
    seen: Counter[str] = Counter()

    @inputs(160, 3_000)
    @given(rows(), st.sampled_from(BLOCKS), st.integers(0, 2**32), st.integers(1, 4), st.booleans())
    def holds(data: list[dict[str, Any]], block: dict[str, Any], seed: int, size: int, nested: bool) -> None:
        if naive(data)[0] is None:
            return
        documents, config = collect(data), XTFConfig.parse(block)
        made = decided(config, documents)
        kept = fates(made, documents)
        masks = MaskTable.build(documents.keys, documents.completion_offsets, made.keep, made.best)
        other = repacked(documents, random.Random(seed))
        again = collect(other)
        assert fates(decided(config, again), again) == kept, "masks depend on order or packing"
        for source in (data, other):
            for at in range(0, len(source), size):
                check_batch(source[at : at + size], masks, kept, nested)
        seen.update(inputs=1, kept=int(made.keep.sum()), dropped=int((~made.keep).sum()))

    holds()
    assert min(seen["kept"], seen["dropped"]) > seen["inputs"] // 2
    record("fuzzed packings", inputs=seen["inputs"])


ON = {
    "attributes": ATTRIBUTES_ON,
    "relevance": {"preset": "none", "task_relevance": True},
    "by last state": {"preset": "none", "task_relevance": {"embedding": "output"}},
    "default": {},
}


@pytest.mark.parametrize("on", list(ON))
@pytest.mark.parametrize("token", [435, 10**6, TOKEN_IDS - 1])
def test_a_token_id_beyond_the_model_is_one_clear_error(tmp_path, on: str, token: int) -> None:
    """However large it is, and without memory for as many ids."""
    config = XTFConfig.parse({**ON[on], "cache_dir": str(tmp_path)})
    data = [{"input_ids": [7, 8, 9, token], "labels": [IGNORED, 8, 9, token]}]
    tracemalloc.start()
    try:
        with pytest.raises(XTFError, match=f"token id {token}, but tiny has only 435 embeddings"):
            make_plan(config, collect(data), Provider(), tiny.tokenizer(), progress=False)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("token", [-1, TOKEN_IDS, 2**31 - 1, 2**40])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
def test_a_token_id_that_no_vocabulary_has_is_refused(token: int, dtype: Any) -> None:
    """Before anything is as long as it is large."""
    bounds = np.iinfo(dtype)
    if bounds.min <= token <= bounds.max:
        ids = np.asarray([7, token], dtype=dtype)
        with pytest.raises(XTFError, match=f"the token id {token}, which no tokenizer gives"):
            collect([{"input_ids": ids, "labels": [IGNORED, 8]}])


def test_plans_of_a_reference_hold_for_odd_rows(tmp_path) -> None:
    """Through the whole of `make_plan`: single tokens, nothing but prompts, one token over and over, empty rows."""
    rng, provider, refusals = random.Random(0), Provider(), 0
    number, vocabulary = amount(12, 300), len(tiny.tokenizer())
    for _ in range(number):
        data = []
        for _ in range(rng.randint(1, 4)):
            tokens = [rng.choice([0, 1, 2, 3, rng.randrange(vocabulary)]) for _ in range(rng.choice([0, 1, 1, 2, 9]))]
            tokens *= rng.choice([1, 1, 5])
            prompt = min(len(tokens), rng.choice([0, 0, 1, 99]))
            data += [{"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]}] * rng.choice([1, 2])
        config = XTFConfig.parse({**rng.choice([ATTRIBUTES_ON, {}, *BLOCKS]), "cache_dir": str(tmp_path / "cache")})
        try:
            documents = collect(data)
            plan = make_plan(config, documents, provider, tiny.tokenizer(), progress=False)
        except XTFError as error:
            assert "completion token" in str(error), str(error)
            refusals += 1
            continue
        special = np.isin(plan.scores.token_ids, tiny.tokenizer().all_special_ids)
        assert not config.protect.special_tokens or plan.selection.keep[special].all()
        masks, kept = plan.masks(), fates(plan.selection, documents)
        for source in (data, repacked(documents, rng)):
            check_batch(source, masks, kept, nested=False)
        again = make_plan(config, documents, provider, tiny.tokenizer(), progress=False)
        assert again.stats.documents == 0 and np.array_equal(again.selection.keep, plan.selection.keep)
    assert refusals < number / 2
    record("plans of odd rows", inputs=number, refused=refusals)
