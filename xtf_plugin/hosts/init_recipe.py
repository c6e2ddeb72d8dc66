"""`xtf init`: a recipe for a model and a data set, which `xtf check` passes and the stock command trains.

Nothing is asked. The columns of the data, the model's chat template and the installed host say what must be in it; all
else is LoRA, in 4 bits on a GPU, with values that suit most models, in a file that its user reads and changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from ..environment import docs, installed_version
from ..errors import XTFUserError
from . import hub
from .init_data import HEAD as HEAD_ROWS
from .init_data import ROLES, Shape, Source, labels_of, longest, open_source, shape_of, write_converted
from .preflight import problems
from .recipes import COMMANDS, load_recipe, parse_block

SHORTEST, LONGEST = 512, 4096  # tokens of a row
COMMENT = 36  # column in which comments begin
NO_PROMPT = "texts without a prompt: task_relevance then judges a sentence by the text before it alone"
PLAIN = "plain text: no chat template is applied to it"
UNUSED = (
    "note: the model has a chat template, and plain texts are trained without it. Columns of messages use it, and a "
    "chat model often scores them better: {docs}"
)

Line = tuple[str, Any, str]  # key, value, comment

HEAD = """\
# LoRA fine-tuning of {model} on {data}. Written by `xtf init`; every line may be changed.
#
#   xtf check {path}
#   xtf score {path}    # scores the answers and ends before training; look with: xtf show, xtf tune
#   {command} {path}
"""
BLOCK = """\
xtf:                                # the only addition to a stock recipe: {docs}
  preset: default                   # leaves out sentences that their prompt does not explain, or that repeat text
  # task_relevance:                 # the score to change first, if too much or too little is left out;
  #   drop: {of_median: 0.3}        # 0.2 if not given, more drops more. `xtf tune` shows what others drop
  # protect:
  #   patterns: ['####.*']          # regular expressions: what they match is always trained
  # force_drop: ['I hope this helps[.!]'] # regular expressions: what they match is always left out
  # control: random                 # for the comparison run: leaves out as many tokens at random
"""


@dataclass(frozen=True)
class Model:
    """What a recipe needs to know of a model.

    Args:
        template: whether it has a chat template.
        positions: of its longest row; 0: not known.
        unpadded: its EOS token, if it has no token for padding.
    """

    name: str
    template: bool
    positions: int
    unpadded: str | None


@dataclass(frozen=True)
class Choice:
    """How the data is read: lines for the recipe, what to say of it, and whether it is written again first.

    Args:
        entry: of `datasets`, without where the data is.
        chat: whether pairs are written again as messages.
    """

    entry: dict[str, Any]
    note: str
    lines: tuple[Line, ...] = ()
    convert: bool = False
    chat: bool = False


def init(model: str, dataset: str, host: str | None, output: Path) -> list[str]:
    """Write a recipe, and the data again where the host cannot read its columns; returns lines to print.

    Raises:
        XTFUserError: model or data cannot be read, no recipe for them would run, or a file is in the way.
    """
    model, dataset = (os.path.expanduser(each) for each in (model, dataset))  # hosts read `~` as a name
    chosen, folder = _host(host), output.parent / f"{output.stem}_data"
    if output.suffix not in (".yaml", ".yml"):
        raise XTFUserError(f"--output {output}: a recipe is a YAML file. Choose a name that ends in .yaml.")
    for path in (output, folder):
        if path.exists():
            raise XTFUserError(
                f"{path} exists{_about(path)} and is not overwritten. Remove it, or name another file: --output X.yaml"
            )
    source, about = open_source(dataset), _model(model)
    shape, found = shape_of(source), list[str]()
    shape = replace(shape, labels=labels_of(source.head, shape))
    for choice in _choices(chosen, shape, about):
        try:
            said, data, found = [], source, []
            if choice.convert:
                file = folder / "train.jsonl"
                read, rows, without = write_converted(source, shape, chosen, choice.chat, file)
                each = f", one for each answer in {read:,} conversations" if rows > read - without else ""
                each += f"; {without:,} without an answer left out" if without else ""
                said = [f"wrote {file}: {rows:,} rows{each}"]
                data = replace(source, path=str(folder), data_files=None, config=None, configs=[], split="train")
            text = recipe_text(chosen, dataset, data, about, choice, shape, output)
            _write(output, text)
            found = _problems(output)
        finally:
            if found:
                output.unlink()
            if not output.exists():
                shutil.rmtree(folder, ignore_errors=True)
        if not found:
            said += [UNUSED.format(docs=docs("troubleshooting.md"))] if about.template and PLAIN in choice.note else []
            return [*said, f"wrote {output}, for {COMMANDS[chosen]}", f"next: xtf check {output}"]
    raise XTFUserError("no recipe for these would run:\n" + "\n".join(f"- {each}" for each in found))


def _about(path: Path) -> str:
    """What a recipe that `init` wrote is for, by its first line; empty for other files."""
    with suppress(OSError, UnicodeDecodeError):
        first, _, rest = path.read_text(encoding="utf-8").partition(". Written by `xtf init`")
        if rest and "\n" not in first:
            return f" ({first.removeprefix('# ')})"
    return ""


def _write(output: Path, text: str) -> None:
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        why = error.strerror or error
        raise XTFUserError(f"{output} cannot be written: {why}. Choose another --output.") from error


def _problems(output: Path) -> list[str]:
    recipe = load_recipe(output)
    config = parse_block(recipe)
    assert config is not None  # the block above is one
    return problems(recipe, config)


def _host(wanted: str | None) -> str:
    if wanted in COMMANDS:
        return wanted
    if wanted is not None:
        raise XTFUserError(f"--host {wanted} is not a host. Legal: {', '.join(COMMANDS)}.")
    return "axolotl" if installed_version("axolotl") and not installed_version("trl") else "trl"


def _model(name: str) -> Model:
    """From the files beside the weights, which are not read.

    Raises:
        XTFUserError: there is no such model, or it cannot be reached.
    """
    settings = _json(name, "tokenizer_config.json", needed=True)
    template = settings.get("chat_template") or any(
        _file(name, each) for each in ("chat_template.jinja", "chat_template.json")
    )
    about = _json(name, "config.json")
    positions = about.get("text_config", about).get("max_position_embeddings")
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    unpadded = None if settings.get("pad_token") else end
    return Model(name, bool(template), positions if isinstance(positions, int) else 0, unpadded)


def _json(name: str, file: str, needed: bool = False) -> dict[str, Any]:
    path = _file(name, file, needed)
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return found if isinstance(found, dict) else {}
    return {}


def _file(name: str, file: str, needed: bool = False) -> Path | None:
    """A file of a model: in its folder, or from the hub; None: it has none."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise XTFUserError(
            f"--model {name}: there is no such folder{hub.looked_at(name)}. Give a folder of save_pretrained, or "
            "a hub id."
        )
    if needed and (why := hub.missing("model", name, None, os.environ)):
        raise XTFUserError(f"--model: {why}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError, EntryNotFoundError) as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if missing or not needed:
            return None
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise XTFUserError(
            f"--model {name}: there is no such folder, and the hub does not give it: {why}. Give a folder of "
            "save_pretrained; for a gated model, log in first (hf auth login)."
        ) from error


def _choices(host: str, shape: Shape, model: Model) -> Iterator[Choice]:
    """Ways to read the data, the best one first. Raises XTFUserError if the model has no chat template for a chat."""
    named = ", ".join(f"`{name}`" for name in shape.columns)
    if shape.kind in ("messages", "turns") and not model.template:
        raise XTFUserError(
            f"the data is chat ({named}), and the tokenizer of {model.name} has no chat template. Name the model's "
            "instruct version, or give the data as question and answer."
        )
    yield from (_of_axolotl if host == "axolotl" else _of_trl)(shape, model, named)


def _of_trl(shape: Shape, model: Model, named: str) -> Iterator[Choice]:
    columns = {"columns": [*shape.columns, *shape.labels]}
    if shape.kind == "text":
        field = (("dataset_text_field", shape.columns[0], ""),) if shape.columns[0] != "text" else ()
        yield Choice(columns, f"{named}: {NO_PROMPT}", field)
    elif shape.kind == "messages":
        if shape.of_trl:
            marked: Line = ("assistant_only_loss", True, "without it the user's turns would be trained too")
            yield Choice(columns, f"conversations in {named}", (marked,))
        note = f"a row for each answer of the conversations in {named}, the turns before it as its prompt"
        yield Choice({}, note, convert=True, chat=True)
    elif shape.of_trl:
        yield Choice(columns, named + (f", {PLAIN}" if shape.kind == "pair" else ""))
    else:
        note = f"{named}, written again as `prompt` and `completion`, the names TRL looks for"
        note += "" if model.template else f"; {PLAIN}"
        yield Choice({}, note, convert=True, chat=model.template)


def _of_axolotl(shape: Shape, model: Model, named: str) -> Iterator[Choice]:
    chat = {"type": "chat_template", "field_messages": "messages"}
    template: Line = ("chat_template", "tokenizer_default", "the model's own")
    if shape.kind == "text":
        yield Choice({"type": "completion", "field": shape.columns[0]}, f"{named}: {NO_PROMPT}")
    elif shape.kind == "messages":
        role, content = shape.keys
        keys: dict[str, Any] = {}
        if role != "role":
            keys["message_property_mappings"] = {"role": role, "content": content}
        if shape.roles - {"human", "gpt"}:  # which Axolotl knows
            keys["roles"] = {to: [to, *(name for name in ROLES if ROLES[name] == to)] for to in ("user", "assistant")}
        yield Choice({**chat, "field_messages": shape.columns[0], **keys}, f"conversations in {named}", (template,))
    elif shape.kind == "turns" or (model.template and not shape.of_trl):
        note = f"{named}, written again as `messages`, to which Axolotl applies the chat template"
        yield Choice(chat, note, (template,), convert=True, chat=True)
    else:
        question, *more, answer = shape.columns
        convert, end = len(more) > 1 or not shape.texts, "" if shape.of_trl else "\n"
        if convert:  # Axolotl reads one column beside the question's, and texts alone
            question, more, answer, end = "prompt", [], "completion", ""
            named += ", written again as `prompt` and `completion`"
        fields = {"field_instruction": question, "field_output": answer, **({"field_input": more[0]} if more else {})}
        formats = {"no_input_format": "{instruction}" + end}
        formats["format"] = "{instruction}\n\n{input}" + end if more else formats["no_input_format"]
        yield Choice({"type": {**fields, **formats}}, f"{named}, {PLAIN}", convert=convert)


def recipe_text(
    host: str, dataset: str, source: Source, model: Model, choice: Choice, shape: Shape, output: Path
) -> str:
    """The recipe."""
    words = {"model": model.name, "data": dataset, "path": str(output), "command": COMMANDS[host]}
    head = HEAD.format(**{name: " ".join(text.split()) for name, text in words.items()})
    make = _axolotl if host == "axolotl" else _trl
    length, tokens = SHORTEST, longest(source.head, shape)
    while length < min(tokens, LONGEST):
        length *= 2
    length = min(length, model.positions or length)
    limit = f"longer rows are cut; the longest of the first {len(source.head)} has at most about {tokens:,} tokens"
    others = [name for name in source.configs if name != source.config]
    note = choice.note + (f". Other configurations: {', '.join(others[:8])}" if others else "")
    parts = make(model, source, choice, (length, limit), f"runs/{output.stem}")
    again = f"after a change of {dataset}, remove {source.path} and this file, and start again"
    copied = f"# These are copies: {' '.join(again.split())}.\n" if choice.convert else ""
    data = [f"# Data: {' '.join(note.split())}.\n{copied}{parts[1]}"]
    return "\n".join(
        [head, parts[0], *data, *parts[2:], BLOCK.replace("{docs}", docs("config.md")) + _of_labels(shape)]
    )


def _of_labels(shape: Shape) -> str:
    """A line of the block that counts drops by the columns of labels; empty if there is none."""
    names = list(shape.labels)
    named = names[0] if len(names) == 1 else names
    return _lines(("  # report_by", named, "the report counts what is left out for each value")) if names else ""


def _entry(source: Source, choice: Choice, host: str) -> str:
    """The list `datasets` with its one source."""
    where: dict[str, Any] = {"path": source.path if source.data_files else _here(source.path)}
    if source.data_files and host == "axolotl":
        where = {"path": source.data_files, "ds_type": source.path}
    elif source.data_files:
        where["data_files"] = source.data_files
    name = {"name": source.config} if source.config not in (None, "default") else {}
    entry = {**where, **name, "split": source.split, **choice.entry}
    return "datasets:\n" + indent(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000), "  ")


def _here(path: str) -> str:
    """A path that `datasets` cannot take for a name on the hub, or in its cache, where the folder is not there."""
    return path if path.startswith((".", "/")) or not os.path.isdir(path) else f"./{path}"


def _lines(*lines: Line) -> str:
    written = []
    for key, value, comment in lines:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        line = f"{key}: {text.strip().removesuffix('...').strip()}"
        written.append(f"{line:<{COMMENT - 1}} # {comment}" if comment else line)
    return "\n".join(written) + "\n"


def _on_gpu() -> bool:
    """Whether this machine has a GPU, without asking torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _bits(gpu: bool) -> Line:
    """Whether the base is in 4 bits: a small one in 4 bits is a worse reference, and a CPU gains nothing by it."""
    return "load_in_4bit", gpu, "true saves GPU memory; below a billion weights false scores better"


def _logging(source: Source) -> Line:
    """Few rows make few steps: with 10 such a run would end before it logs anything."""
    return "logging_steps", 1 if len(source.head) < HEAD_ROWS else 10, ""


def _trl(model: Model, source: Source, choice: Choice, length: tuple[int, str], folder: str) -> list[str]:
    gpu = _on_gpu()
    four: tuple[Line, ...] = (("bnb_4bit_quant_type", "nf4", ""),) if gpu else ()
    return [
        _lines(
            ("model_name_or_path", model.name, ""),
            ("dtype", "bfloat16", "float32 on a CPU without bfloat16 units"),
            _bits(gpu),
            *four,
            ("use_peft", True, "LoRA adapters are what is trained"),
            ("lora_r", 16, ""),
            ("lora_alpha", 32, ""),
            ("lora_target_modules", "all-linear", ""),
        ),
        _entry(source, choice, "trl") + _lines(*choice.lines, ("max_length", *length)),
        _lines(
            ("num_train_epochs", 1, ""),
            ("per_device_train_batch_size", 4, ""),
            ("gradient_accumulation_steps", 4, ""),
            ("learning_rate", 2.0e-4, ""),
            ("lr_scheduler_type", "cosine", ""),
            ("warmup_steps", 0.03, "below 1: a share of all steps"),
            ("bf16", gpu, "true on a GPU, false on a CPU"),
            _logging(source),
            ("report_to", "none", "or wandb, trackio, tensorboard"),
            ("seed", 0, ""),
            ("output_dir", folder, ""),
        ),
    ]


def _axolotl(model: Model, source: Source, choice: Choice, length: tuple[int, str], folder: str) -> list[str]:
    gpu = _on_gpu()
    kernels = ("lora_qkv_kernel", "lora_mlp_kernel", "lora_o_kernel", "lora_embedding_kernel")
    padding: Line = ("special_tokens", {"pad_token": model.unpadded}, "the tokenizer has none for padding")
    cpu = [(name, False, "Triton: needs a GPU") for name in kernels] + [("tf32", False, "")]
    return [
        _lines(
            ("base_model", model.name, ""),
            _bits(gpu),
            ("adapter", "qlora" if gpu else "lora", ""),
            ("lora_r", 16, ""),
            ("lora_alpha", 32, ""),
            ("lora_target_linear", True, ""),
            *((padding,) if model.unpadded else ()),
            *(() if gpu else cpu),
        ),
        _entry(source, choice, "axolotl")
        + _lines(*choice.lines, ("dataset_prepared_path", f"{folder}/prepared", ""), ("sequence_len", *length)),
        _lines(
            ("num_epochs", 1, ""),
            ("micro_batch_size", 4, ""),
            ("gradient_accumulation_steps", 4, ""),
            ("learning_rate", 2.0e-4, ""),
            ("lr_scheduler", "cosine", ""),
            ("warmup_ratio", 0.03, ""),
            ("optimizer", "adamw_torch", ""),
            ("bf16", "auto" if gpu else False, "auto on a GPU, false on a CPU"),
            _logging(source),
            ("seed", 0, ""),
            ("output_dir", folder, ""),
        )
        + "\n"
        + _lines(("plugins", ["xtf_plugin.XTFPlugin"], "without this line the run is refused")).rstrip("\n"),
    ]
