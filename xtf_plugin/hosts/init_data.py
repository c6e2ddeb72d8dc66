"""What the rows of a data set are, for `xtf init`: what a host trains on as it is, and how other rows become that.

TRL's recipes choose columns and cannot rename them, so questions and answers are written again under the names that
it looks for. Rows are read with `datasets`, one after the other; no row is held but the first ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..environment import is_on
from ..errors import XTFUserError, reason
from . import hub
from .data_files import first_row

Row = Mapping[str, Any]
Kind = Literal["messages", "turns", "pair", "text"]

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HEAD = 200  # rows that are looked at
QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input", "user", "human")
ANSWERS = ("completion", "answer", "response", "output", "solution", "assistant", "reply", "target")
CONTEXTS = ("input", "context")  # read after an instruction or a question
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "chat")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
LABEL, LABELS = 60, 20  # characters of a label, and different ones in a column
MEDIA = ("image", "images", "audio", "video", "pixel_values")
CONVERT = """    import json
    from datasets import load_dataset
    with open("train.jsonl", "w", encoding="utf-8") as file:
        for row in load_dataset({source}, split={split!r}):
            new = {{"question": row["YOUR QUESTION"], "answer": row["YOUR ANSWER"]}}
            file.write(json.dumps(new) + "\\n")"""


SEPARATE = """    import csv
    with open({file!r}, newline="", encoding="utf-8-sig") as old, \\
            open("train.csv", "w", newline="", encoding="utf-8") as new:
        csv.writer(new).writerows(csv.reader(old, delimiter={sign!r}))"""


@dataclass(frozen=True)
class Source:
    """A data set: how `datasets.load_dataset` names it, and its first rows.

    Args:
        path: the builder of a file, else a folder or a name on the hub.
        data_files: the file, if `path` is a builder.
        config: of several, the one that is read; configs: all of them.
        split: that is trained on.
        head: its first rows.
    """

    path: str
    data_files: str | None
    config: str | None
    configs: list[str]
    split: str
    head: list[dict[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of the split."""
        with _readable(self.data_files or self.path):
            yield from _load(self.path, self.config, self.data_files)[self.split]


@dataclass(frozen=True)
class Shape:
    """How a data set's rows hold prompts and answers.

    Args:
        kind: messages: a conversation in one column. turns: lists of messages in `prompt` and `completion`. pair: texts
            of a question and its answer. text: one text without a prompt.
        columns: that are read; of a pair those of the question, then the answer's.
        keys: of a message's role and content.
        roles: of messages, by names that templates do not know.
        texts: whether the answer of a pair is text; else it is a number.
        labels: columns that are kept beside these, see `labels_of`.
    """

    kind: Kind
    columns: tuple[str, ...]
    keys: tuple[str, str] = ("role", "content")
    roles: frozenset[str] = frozenset()
    texts: bool = True
    labels: tuple[str, ...] = ()

    @property
    def of_trl(self) -> bool:
        """Whether TRL finds these columns, and roles in them, under these names."""
        usual = self.keys[0] == "role" and not self.roles and self.texts
        if self.kind == "messages":
            return usual and self.columns[0] in ("messages", "conversations")
        return usual and (self.kind != "pair" or self.columns == ("prompt", "completion"))


def open_source(name: str) -> Source:
    """Look at a data set: a file, a folder, or a name on the hub.

    Raises:
        XTFUserError: it cannot be read, or has no rows.
    """
    local = Path(os.path.expanduser(name))
    path, data_files = name, None
    if local.is_file():
        if local.suffix not in READERS:
            legal = ", ".join(READERS)
            raise XTFUserError(f"--dataset {name}: cannot read files ending in {local.suffix!r}. Legal: {legal}.")
        path, data_files = READERS[local.suffix], name
        if path == "csv":
            _check_separator(name, local)
    elif not local.is_dir() and (name.startswith((".", "/", "~")) or local.suffix in READERS or name.count("/") > 1):
        raise XTFUserError(f"--dataset {name}: there is no such file or folder{hub.looked_at(name)}. Correct the path.")
    if not local.exists() and (why := hub.missing("dataset", name, None, os.environ)):
        raise XTFUserError(f"--dataset: {why}")
    with _readable(name):
        configs = [] if local.exists() else _configs(name)
        config = "default" if "default" in configs else next(iter(configs), None)
        splits = _load(path, config, data_files)
        split = "train" if "train" in splits else next(iter(splits))
        head = list(islice(splits[split], HEAD))
    if not head:
        raise XTFUserError(f"--dataset {name}: it holds no rows. Name another one.")
    return Source(path, data_files, config, configs, split, head)


def _check_separator(name: str, file: Path) -> None:
    """Refuse a CSV file of one column whose name holds the sign that separates the real ones."""
    header: list[str] = []
    with suppress(OSError, ValueError):
        header = list(first_row([file], "csv") or ())
    sign = next((each for each in ";\t|" if len(header) == 1 and each in header[0]), None)
    if sign is not None:
        raise XTFUserError(
            f"--dataset {name}: its columns are separated by {sign!r}. Hosts read commas alone, so each line would be "
            f"one text under the name {header[0]!r}. Write it again, and start with --dataset train.csv:\n"
            + SEPARATE.format(file=str(file), sign=sign)
        )


@contextmanager
def _readable(name: str) -> Iterator[None]:
    from datasets import config
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    torch, config.TORCH_AVAILABLE = config.TORCH_AVAILABLE, False  # else a stream of rows imports it
    try:
        yield
    except XTFUserError:
        raise
    except StopIteration:
        raise XTFUserError(f"--dataset {name}: it holds no rows. Name another one.") from None
    except (DatasetsError, ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = reason(error.__cause__ or error)[:300].rstrip(".")
        raise XTFUserError(
            f"--dataset {name} cannot be read: {why}. Give a file ({', '.join(READERS)}), a folder of such files, or a "
            "data set's name on the hub."
        ) from error
    finally:
        config.TORCH_AVAILABLE = torch


def _load(path: str, config: str | None, data_files: str | None) -> dict[str, Iterable[dict[str, Any]]]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of an error, the error says too
    here = data_files is not None or Path(os.path.expanduser(path)).is_dir()
    files = {} if data_files is None else {"data_files": os.path.expanduser(data_files)}
    # what is in the hub's cache alone cannot be streamed
    streaming = here or not is_on(os.environ.get("HF_HUB_OFFLINE"))
    return dict(datasets.load_dataset(os.path.expanduser(path), config, streaming=streaming, **files))


def _configs(name: str) -> list[str]:
    import datasets

    return list(datasets.get_dataset_config_names(name))


def shape_of(source: Source) -> Shape:
    """How the rows hold prompts and answers.

    Raises:
        XTFUserError: they hold images, preferences, or columns of unknown meaning.
    """
    row: dict[str, Any] = {}
    for each in source.head:  # a column may begin later
        row |= {
            column: value
            for column, value in each.items()
            if column not in row or (value is not None and row[column] in (None, "", []))
        }
    if media := [name for name in MEDIA if name in row]:
        raise XTFUserError(f"the column {media[0]} holds no text, and only text can be scored. Name another data set.")
    for name in CONVERSATIONS:
        if _is_chat(row.get(name)):
            return _of_chats("messages", (name,), row, source.head)
    if _is_chat(row.get("prompt")) and _is_chat(row.get("completion")):
        return _of_chats("turns", ("prompt", "completion"), row, source.head)
    texts = {name.lower(): name for name, value in row.items() if isinstance(value, str)}
    numbers = {name.lower(): name for name, value in row.items() if type(value) in (int, float)}
    answers = [each[name] for each in (texts, numbers) for name in ANSWERS if name in each]
    answer = next(iter(answers), None)
    question = next((texts[name] for name in QUESTIONS if name in texts and texts[name] != answer), None)
    if question and answer:
        more = [texts[name] for name in CONTEXTS if name in texts and texts[name] not in (question, answer)]
        more = more if question.lower() in ("instruction", "question") else []
        return Shape("pair", (question, *more, answer), texts=answer in texts.values())
    if {"chosen", "rejected"} <= set(row):
        raise XTFUserError("the data holds preferences (`chosen`, `rejected`), and SFT trains on answers. Convert it.")
    if text := texts.get("text") or (next(iter(texts.values())) if len(texts) == len(row) == 1 else None):
        return Shape("text", (text,))
    named = repr(source.path) + (f", {source.config!r}" if source.config else "")
    given = named + (f", data_files={source.data_files!r}" if source.data_files else "")
    raise XTFUserError(
        f"the data has the columns {', '.join(row) or 'none'}: it is not clear what the question and the answer are. "
        f"Write them under these names, and start again with --dataset train.jsonl:\n"
        + CONVERT.format(source=given, split=source.split)
    )


def labels_of(head: Sequence[Row], shape: Shape) -> tuple[str, ...]:
    """Columns of short texts that several rows share, such as a source: `report_by` can count drops by them."""
    read = {*shape.columns, *QUESTIONS, *ANSWERS, *CONTEXTS, *CONVERSATIONS, "text", "chosen", "rejected"}
    found = []
    for name in dict.fromkeys(name for row in head for name in row if name not in read):
        values = [row[name] for row in head if row.get(name) is not None]
        if values and all(isinstance(each, str) and len(each) <= LABEL for each in values):
            found += [name] * (1 < len(set(values)) <= min(LABELS, len(values) // 2))
    return tuple(found)


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        return False
    return {"role", "content"} <= set(value[0]) or {"from", "value"} <= set(value[0])


def _of_chats(kind: Kind, columns: tuple[str, ...], row: Row, head: Iterable[Row]) -> Shape:
    """The shape of chats; a role may occur in a later row alone."""
    keys = ("role", "content") if {"role", "content"} <= set(row[columns[0]][0]) else ("from", "value")
    messages = (each for row in head for name in columns for each in row.get(name) or () if isinstance(each, Mapping))
    return Shape(kind, columns, keys, frozenset(ROLES) & {str(each.get(keys[0])) for each in messages})


def converted(row: Row, shape: Shape, host: str, chat: bool) -> Iterator[dict[str, Any]]:
    """A row as rows that a host trains on; none without a question or an answer.

    Of a conversation every answer gives a row, with what was said before it as its prompt.

    Args:
        host: whose names of columns are written.
        chat: messages, to which the chat template is applied: trl: `prompt` and `completion`. axolotl: `messages`. Else
            the texts of a pair, `prompt` and `completion`.
    """
    for prompt, answer in _answers(row, shape):
        if not chat:
            yield {"prompt": prompt[0]["content"] + "\n", "completion": answer["content"]}
        elif host == "axolotl":
            yield {"messages": [*prompt, answer]}
        else:
            yield {"prompt": prompt, "completion": [answer]}


def _answers(row: Row, shape: Shape) -> Iterator[tuple[list[Any], Any]]:
    if shape.kind == "pair":
        found = (row.get(name) for name in shape.columns)
        *questions, answer = ("" if value is None else str(value).strip() for value in found)
        if questions[0] and answer:
            question = "\n\n".join(text for text in questions if text)
            yield [{"role": "user", "content": question}], {"role": "assistant", "content": answer}
        return
    messages = [_message(each, shape.keys) for name in shape.columns for each in row.get(name) or ()]
    for at, message in enumerate(messages):
        if at and message["role"] == "assistant" and (message.get("content") or message.get("tool_calls")):
            yield messages[:at], message


def _message(message: Row, keys: tuple[str, str]) -> dict[str, Any]:
    """A message with the names of roles and keys that templates know; what is null is left out."""
    role, content = keys
    rest = {key: value for key, value in message.items() if key not in keys and value is not None}
    name = str(message.get(role))
    return {"role": ROLES.get(name, name), "content": message.get(content) or "", **rest}


def write_converted(source: Source, shape: Shape, host: str, chat: bool, file: Path) -> tuple[int, int, int]:
    """Write all rows of a source for a host; returns how many were read, written, and held no answer.

    Raises:
        XTFUserError: no row holds a question and an answer, or the file cannot be written.
    """
    read = written = without = 0
    try:
        file.parent.mkdir(parents=True)
        with file.open("w", encoding="utf-8", errors="replace") as lines:
            for row in source.rows():
                kept = {name: row.get(name) for name in shape.labels}
                made = [each | kept for each in converted(row, shape, host, chat)]
                lines.writelines(json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in made)
                read, written, without = read + 1, written + len(made), without + (not made)
    except FileExistsError:
        raise XTFUserError(f"{file.parent} exists, and would be overwritten. Remove it, or choose --output.") from None
    except OSError as error:
        raise XTFUserError(f"{file} cannot be written: {error.strerror or error}. Choose --output.") from error
    if not written:
        raise XTFUserError(f"no row has text in {' and '.join(shape.columns)}. Name another data set.")
    return read, written, without


def longest(head: Iterable[Row], shape: Shape) -> int:
    """About how many tokens the longest of some rows has: a token is seldom shorter than three bytes."""
    texts = [json.dumps([row.get(name) for name in shape.columns], ensure_ascii=False, default=str) for row in head]
    return max((len(text.encode(errors="replace")) for text in texts), default=0) // 3
