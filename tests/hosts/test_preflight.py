"""What `xtf check` finds in a recipe before anything is loaded is what the stock command dies of, and nothing else."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml

from tests import real, tiny
from xtf_plugin.errors import XTFUserError
from xtf_plugin.hosts import hub
from xtf_plugin.hosts import trl as trl_host
from xtf_plugin.hosts.preflight import _fields, notes, problems
from xtf_plugin.hosts.recipes import load_recipe, parse_block

PAIRS = [{"prompt": "What is 2 + 3?", "completion": " It is 5. Sure!"}] * 4
CHATS = tiny.conversations(4, turns=1)
NO_MARKS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny model, and one of data."""
    folder = tmp_path_factory.mktemp("preflight")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(made, tmp_path, rows=PAIRS, file="train.jsonl", **changes):
    write(tmp_path / "data" / file, rows)
    data = {
        "model_name_or_path": str(made / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "xtf": {"preset": "none", "knowledge_novelty": True, "cache_dir": str(tmp_path / "cache")},
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not ...}))
    return path


def checked(path):
    recipe = load_recipe(path)
    return problems(recipe, parse_block(recipe))


def in_stock(path, monkeypatch):
    """Whether stock TRL trains the recipe; in this process, since the imports take most of its time."""
    from transformers import Trainer
    from trl import SFTTrainer
    from trl.scripts import sft

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changed = [(trl_host, "_argument_added"), (trl_host, "_block_parsed"), (Trainer, "train")]
    for owner, name in (*changed, (SFTTrainer, "__init__"), (SFTTrainer, "_prepare_dataset")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test: no other one parses a block
    try:
        parser = sft.make_parser()
        arguments = parser.parse_args_and_config(args=["--config", str(path)], fail_with_unknown_args=True)
        sft.main(*arguments)
    except (Exception, SystemExit):
        return False
    return True


def block(**keys):
    return {"preset": "none", "knowledge_novelty": True, **keys}


def files(**changes):
    """A mixture of the one file of data."""
    return {"dataset_name": ..., "datasets": [{"path": "json", "data_files": "data/train.jsonl"}], **changes}


def card(*names):
    parts = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: train.jsonl\n" for name in names
    )
    return f"---\nconfigs:\n{parts}---\n"


def shared(messages):
    return [{"from": each["role"], "value": each["content"]} for each in messages]


MISTAKES = {
    "no such model": ({"model_name_or_path": "./no/such/model"}, "there is no folder ./no/such/model"),
    "no column of report_by": (
        {"xtf": block(report_by="source")},
        "no column 'source' for report_by, only prompt, comp",
    ),
    "a bare name of a model": ({"model_name_or_path": "model"}, "/model, so model would be fetched from"),
    "a bare name of data": ({"dataset_name": "data/sets"}, "/data/sets, so data/sets would be fetched from"),
    "no data": ({"dataset_name": ...}, "names no training data"),
    "no such data": ({"dataset_name": "./no/such/data"}, "there is no such folder of data"),
    "a data folder without data": ({"file": "notes.md"}, "holds no data file"),
    "an empty file": ({"rows": []}, "it is empty"),
    "a broken file": ({"rows": [], "raw": '{"prompt": "a", }\n'}, "cannot be read"),
    "a line that is null": ({"raw": '{"prompt": "a", "completion": "b"}\nnull\n'}, "line 2 is not a JSON object"),
    "a line that is a list": ({"raw": '{"prompt": "a", "completion": "b"}\n\n[1]\n'}, "line 3 is not a JSON object"),
    "raw columns": ({"rows": [{"question": "a", "answer": "b"}]}, "columns question, answer"),
    "a prompt beside text": ({"rows": [{"prompt": "a", "text": "b"}]}, "TRL does not read `text` beside it"),
    "a prompt beside messages": ({"rows": [{**CHATS[0], "prompt": "a"}]}, "TRL does not read `messages` beside it"),
    "a chat and a text": ({"rows": [{**PAIRS[0], "prompt": CHATS[0]["messages"]}]}, "has messages and text"),
    "conversations of messages": (
        {"rows": [{"conversations": CHATS[0]["messages"]}]},
        "`conversations` must be a list of {from, value}",
    ),
    "a mixture to evaluate on": (files(eval_strategy="steps", eval_steps=1), "Set test_split_size, or eval_strategy"),
    "another split of a mixture": (files(dataset_train_split="sft"), "has no split 'sft', only train"),
    "a share of some": (
        {"dataset_name": ..., "datasets": [{**files()["datasets"][0], "fraction": 0.5}, files()["datasets"][0]]},
        "Set it for all, or for none",
    ),
    "no such configuration": ({"dataset_config": "main"}, "there is no configuration 'main', only default"),
    "no such configuration of a card": ({"dataset_config": "c", "card": card("a", "b")}, "'c', only a, b"),
    "which of two configurations": ({"card": card("a", "b")}, "has the configurations a, b. Set dataset_config"),
    "no such configuration of a mixture": (
        {"dataset_name": ..., "datasets": [{"path": "data", "name": "main"}]},
        "there is no configuration 'main'",
    ),
    "a model at home": ({"model_name_or_path": "~/model"}, "no folder ~/model. `~` stands for no folder here"),
    "a reference at home": ({"xtf": block(reference={"model": "~/model"})}, "`~` stands for no folder here"),
    "data at home": ({"dataset_name": "~/data"}, "folder of data. `~` stands for no folder here"),
    "files at home": (
        {"dataset_name": ..., "datasets": [{"path": "json", "data_files": "~/data/train.jsonl"}]},
        "no file ~/data/train.jsonl. `~` stands for no folder here",
    ),
    "a template at home": ({"rows": CHATS, "chat_template_path": "~/t.jinja"}, "`~` stands for no folder here"),
    "a template without its ending": ({"rows": CHATS, "chat_template_path": "recipe.yaml"}, "is no .jinja file"),
    "written by save_to_disk": ({"saved": "one"}, "was written by save_to_disk"),
    "a split of save_to_disk": ({"saved": "several", "dataset_train_split": "sft"}, "no split 'sft', only train"),
    "raw columns of save_to_disk": ({"saved": "several", "rows": [{"question": "a"}]}, "has the columns question"),
    "packing without a length": ({"packing": True, "max_length": None}, "Set max_length"),
    "a prompt alone": ({"rows": [{"prompt": "a", "answer": "b"}]}, "no `completion`"),
    "only a test split": ({"file": "test.jsonl"}, "no split 'train', only test"),
    "another split": ({"dataset_train_split": "sft"}, "no split 'sft', only train"),
    "no split to evaluate on": ({"eval_strategy": "steps", "eval_steps": 1}, "no split 'test'"),
    "no such text column": ({"rows": [{"body": "a b c"}], "dataset_text_field": "content"}, "or `content`"),
    "messages that are text": ({"rows": [{"messages": "a"}]}, "must be a list of"),
    "an old key": ({"max_seq_length": 64}, "Did you mean max_length?"),
    "a mistyped key": ({"learning_rat": 1e-4}, "Did you mean learning_rate?"),
    "a mistyped block": ({"XTF": True}, "XTF: TRL has no such key"),
    "a key beside the block": ({"force_drop": ["x"]}, "force_drop: TRL has no such key. It belongs under `xtf:`."),
    "a number that is none": ({"learning_rate": "fast"}, "'fast' is no number"),
    "a whole number that is none": ({"logging_steps": 1, "max_steps": "many"}, "'many' is no whole number"),
    "an output folder that is a file": ({"output_dir": "recipe.yaml/out"}, "cannot be written"),
    "no marks in the template": (
        {"rows": CHATS, "template": NO_MARKS, "assistant_only_loss": True},
        "needs a chat template with {% generation %}",
    ),
    "chat without a template": ({"rows": CHATS, "template": None}, "no chat template"),
    "no such template": ({"rows": CHATS, "chat_template_path": "./no/such.jinja"}, "there is no ./no/such.jinja"),
    "a template that is broken": ({"rows": CHATS, "template": "{% for"}, "does not render the data"),
    "a template that refuses the data": (
        {"rows": CHATS, "template": "{{ raise_exception('No user, please.') }}"},
        "does not render the data: No user, please. Correct the template or the data",
    ),
    "a broken template of pairs": (
        {"rows": [{"prompt": c["messages"][:1], "completion": c["messages"][1:]} for c in CHATS], "template": "{{ "},
        "does not render the data",
    ),
    "assistant-only loss without a chat": ({"assistant_only_loss": True}, "assistant_only_loss needs `messages`"),
    "an eos token that is none": ({"eos_token": "<|no|>"}, "is not in the tokenizer's vocabulary"),
    "an eos token that is a list": ({"eos_token": ["a"]}, "eos_token: ['a'] is not in the tokenizer's vocabulary"),
    "a number for the data": ({"dataset_name": ..., "datasets": 5}, "datasets: 5 is no list"),
    "a long path": ({"dataset_name": "./" + "x" * 5_000}, "there is no such folder of data"),
    "a long name of data": ({"dataset_name": "x" * 5_000}, "would be fetched from the Hugging Face hub"),
    "a long path of a model": ({"model_name_or_path": "./" + "x" * 5_000}, "there is no folder"),
    "no such checkpoint": ({"resume_from_checkpoint": "./no/checkpoint"}, "there is no folder ./no/checkpoint"),
    "streamed without adapters": ({"dataset_streaming": True}, "Set use_peft: true, or reference.model"),
    "no such reference": ({"xtf": block(reference={"model": "./no/reference"})}, "reference.model: there is no folder"),
    "no such column of marks": (
        {"xtf": {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "verdict"}}}},
        "no column 'verdict'",
    ),
    "images": ({"rows": [{**PAIRS[0], "images": []}]}, "holds images"),
    "an encoder": ({"config": {"architectures": ["LlamaForSequenceClassification"]}}, "predicts no next tokens"),
    "adapters": ({"without": "config.json", "beside": "adapter_config.json"}, "It holds adapters"),
    "a model without weights": ({"without": "model.safetensors"}, "has no weights"),
    "a model without a tokenizer": ({"without": "tokenizer.json"}, "has no tokenizer"),
}


def recipe_with(made, tmp_path, changes):
    """A recipe with a mistake; of the model's folder, a copy where the mistake lies in it."""
    import shutil

    changes = dict(changes)
    raw, saved, head = (changes.pop(name, None) for name in ("raw", "saved", "card"))
    beside = changes.pop("beside", None)
    if {"template", "config", "without"} & set(changes):
        model = tmp_path / "model"
        shutil.copytree(made / "model", model)
        if "template" in changes:
            tokenizer = type(tiny.tokenizer()).from_pretrained(model)
            tokenizer.chat_template = changes.pop("template")
            (model / "chat_template.jinja").unlink(missing_ok=True)
            tokenizer.save_pretrained(model)
        facts = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**facts, **changes.pop("config", {})}))
        if gone := changes.pop("without", None):
            (model / gone).unlink()
        if beside:
            (model / beside).write_text("{}")
        changes["model_name_or_path"] = str(model)
    path = recipe_of(made, tmp_path, **changes)
    if raw is not None:
        (tmp_path / "data" / "train.jsonl").write_text(raw)
    if saved:
        save(tmp_path / "data", saved)
    if head:
        (tmp_path / "data" / "README.md").write_text(head)
    return path


def save(folder, kind):
    """Put what save_to_disk writes in the place of a file of rows."""
    import shutil

    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    made = Dataset.from_list(rows)
    (made if kind == "one" else DatasetDict({"train": made})).save_to_disk(str(folder))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_and_the_stock_command_agree(made, tmp_path, monkeypatch, mistake):
    changes, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    path = recipe_with(made, tmp_path, changes)
    found = checked(path)
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem for problem in found)
    assert not in_stock(path, monkeypatch)


RIGHT = {
    "pairs": {},
    "chats": {"rows": CHATS},
    "chats, answers alone": {"rows": CHATS, "assistant_only_loss": True},
    "text": {"rows": [{"text": "One. Two three."}] * 4},
    "a column of text": {"rows": [{"body": "One. Two three."}] * 4, "dataset_text_field": "body"},
    "a number as text": {"learning_rate": "1e-4"},
    "a mixture": files(),
    "a mixture with a part set aside": files(eval_strategy="steps", eval_steps=1, test_split_size=0.5),
    "conversations": {"rows": [{"conversations": shared(row["messages"])} for row in CHATS]},
    "pairs beside conversations": {"rows": [{**row, "conversations": "none"} for row in PAIRS]},
    "messages beside conversations": {"rows": [{**row, "conversations": "none"} for row in CHATS]},
    "text beside conversations": {"rows": [{"text": "One. Two three.", "conversations": ["none"]}] * 4},
    "pairs beside messages that are text": {"rows": [{**row, "messages": "none"} for row in PAIRS]},
    "the configuration of a folder": {"dataset_config": "default"},
    "a configuration of a card": {"dataset_config": "b", "card": card("a", "b")},
    "the one configuration of a card": {"card": card("a")},
    "splits of save_to_disk": {"saved": "several"},
    "a file whose name begins with ~": {
        **files(datasets=[{"path": "json", "data_files": "~rows.jsonl"}]),
        "file": "../~rows.jsonl",
    },
    "an output folder at home": {"output_dir": "~/out"},
}


@pytest.mark.parametrize("recipe", RIGHT)
def test_recipes_without_a_mistake_are_left_alone(made, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = recipe_with(made, tmp_path, RIGHT[recipe])
    assert checked(path) == []
    assert in_stock(path, monkeypatch)


def in_parquet(folder, name, rows):
    import pyarrow as pa
    from pyarrow import parquet

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), folder / name)
    return {"dataset_name": str(folder)}


def in_shards(folder):
    return {**in_parquet(folder, "data/train_sft-00000-of-00001.parquet", CHATS), "dataset_train_split": "train_sft"}


def in_a_card(folder):
    write(folder / "parts" / "a.jsonl", PAIRS)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: sft\n    path: parts/*.jsonl\n---\n"
    )
    return {"dataset_name": str(folder), "dataset_train_split": "sft"}


def compressed(folder):
    import gzip

    folder.mkdir()
    with gzip.open(folder / "train.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in PAIRS)
    return {"dataset_name": str(folder)}


def beside_other_files(folder):
    for name in ("dataset_infos.json", ".cache/a.json", "statistics.json"):
        write(folder / name, [{"default": {}}])
    write(folder / "train.jsonl", PAIRS)
    return {"dataset_name": str(folder)}


def in_a_folder_called_test(folder):
    write(folder / "test" / "a.jsonl", PAIRS)
    return {"dataset_name": str(folder / "test")}


def as_table(folder):
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,completion\n" + 4 * f"{'a ' * 70_000},b\n")
    return {"dataset_name": str(folder), "max_length": 16, "completion_only_loss": False}


def listed(**entry):
    def made_in(folder):
        write(folder / "test.jsonl", entry.pop("rows", PAIRS))
        source = {
            name: value.format(folder=folder) if isinstance(value, str) else value for name, value in entry.items()
        }
        return {"dataset_name": ..., "datasets": [source]}

    return made_in


def late_column(folder):
    write(folder / "train.jsonl", [PAIRS[0], *({**row, "verdict": [1] * 8} for row in PAIRS)])
    return {
        "dataset_name": str(folder),
        "xtf": {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "verdict"}}},
    }


FOLDERS = {
    "chats in Parquet": lambda folder: {
        **in_parquet(folder, "train.parquet", CHATS),
        "assistant_only_loss": True,
    },
    "a split of shards": in_shards,
    "splits named by a card": in_a_card,
    "compressed": compressed,
    "beside other files": beside_other_files,
    "in a folder called test": in_a_folder_called_test,
    "a long field of a table": as_table,
    "a file called test": listed(path="json", data_files="{folder}/test.jsonl"),
    "files by a pattern": listed(path="json", data_files="{folder}/*.jsonl"),
    "files by split": listed(path="json", data_files={"sft": "data/t*.jsonl"}, split="sft"),
    "files of a folder": listed(path="json", data_dir="{folder}", split="test"),
    "a sum of splits": listed(path="{folder}", split="test[:2]+test[2:]"),
    "some columns": listed(
        path="{folder}", split="test", columns=["text"], rows=[{"prompt": "a", "text": "One. Two three."}] * 4
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_data_of_every_kind_is_left_alone(made, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = recipe_of(made, tmp_path, **{"file": "../other/train.jsonl", **FOLDERS[kind](tmp_path / "data")})
    assert checked(path) == []
    assert in_stock(path, monkeypatch)


def test_a_column_that_begins_in_a_later_row(made, tmp_path):
    path = recipe_of(made, tmp_path, **{"file": "../other/train.jsonl", **late_column(tmp_path / "data")})
    assert checked(path) == []


def test_a_file_of_one_long_line_is_not_read_whole(tmp_path):
    from xtf_plugin.hosts import data_files

    file = tmp_path / "train.json"
    with file.open("wb") as opened:
        opened.write(b'[{"prompt": "')
        opened.truncate(1 << 34)  # sparse
    assert data_files.first_row([file], "json") is None


def test_a_card_with_a_day_that_does_not_exist_is_left_to_the_run(made, tmp_path):
    path = recipe_of(made, tmp_path)
    (tmp_path / "data" / "README.md").write_text("---\nmade: 2024-13-45\n---\n")
    assert checked(path) == []


def test_a_line_that_is_nested_deeply(made, tmp_path):
    """It ends the process of the stock command."""
    path = recipe_of(made, tmp_path)
    (tmp_path / "data/train.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert "line 1 is nested too deeply" in checked(path)[0]


def test_a_vocabulary_that_is_a_list(made, tmp_path):
    path = recipe_with(made, tmp_path, {"config": {}, "eos_token": "<|no|>"})
    file = tmp_path / "model" / "tokenizer.json"
    facts = json.loads(file.read_text())
    facts["model"] = {"type": "Unigram", "vocab": [["a", 0.0]]}
    file.write_text(json.dumps(facts))
    (problem,) = checked(path)
    assert "'<|no|>' is not in the tokenizer's vocabulary" in problem


def test_a_template_that_is_not_on_this_disk(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert checked(recipe_of(made, tmp_path, rows=CHATS, chat_template_path="some/model")) == []


@pytest.mark.parametrize("key", ["dataset_streaming", "streaming"])
def test_only_the_key_that_trl_reads_streams(made, tmp_path, key):
    write(tmp_path / "other.jsonl", PAIRS)
    mixture = {"datasets": [{"path": "json", "data_files": str(tmp_path / "other.jsonl")}]}
    for changes in ({}, mixture):
        found = checked(recipe_of(made, tmp_path, **{key: True, **changes}))
        assert bool(found) is ((key == "streaming") == bool(changes))


def test_a_wrong_number_of_steps_of_streamed_data(made, tmp_path):
    (problem,) = checked(recipe_of(made, tmp_path, dataset_streaming=True, max_steps="many", use_peft=True))
    assert "'many' is no whole number" in problem


def test_check_ends_with_2_in_a_moment_and_imports_no_host(made, tmp_path):
    path = recipe_of(made, tmp_path, max_seq_length=64, output_dir="/dev/null/out")
    code = f"""
import sys
from xtf_plugin import cli
try:
    cli.main(["check", {str(path)!r}])
finally:
    print({{"torch", "transformers", "trl", "datasets"}} & set(sys.modules))
"""
    begin = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.perf_counter() - begin < 30, "3 s on quiet cores; here others may run"
    assert (ended.returncode, ended.stdout.strip()) == (2, "set()")
    assert ended.stderr.startswith("xtf: error: ") and ended.stderr.count("\n- ") == 2
    assert "Traceback" not in ended.stderr


def test_the_keys_of_a_recipe_are_those_of_trls_parser():
    from trl.scripts import sft

    known = {action.dest for action in sft.make_parser()._actions} - {"help", "xtf"}
    assert known <= set(_fields()) | {f"no_{name}" for name in _fields()}


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "falcon", "mpt", "gpt_oss", "llama", "gemma3_text", "qwen2"])
def test_architectures_without_attention_to_record_are_named(made, tmp_path, kind):
    path = recipe_with(made, tmp_path, {"config": {"model_type": kind}, "xtf": {"preset": "official"}})
    found = [problem for problem in checked(path) if "attention received" in problem]
    assert bool(found) is (kind not in ("llama", "gemma3_text", "qwen2"))
    path = recipe_of(made, tmp_path, model_name_or_path=str(tmp_path / "model"))
    assert checked(path) == []


@real.needs(real.SMOLLM2)
def test_a_reference_with_another_tokenizer(made, tmp_path):
    model = str(real.MODELS / real.SMOLLM2)
    (problem,) = checked(recipe_of(made, tmp_path, xtf=block(reference={"model": model})))
    assert "has another vocabulary" in problem


GATED = {"gated": "manual", "siblings": [{"rfilename": name} for name in (".gitattributes", "README.md", "a b.json")]}


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """A hub that knows some names, and the requests that it got; its caches are empty."""
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            gated = "/gated/" in self.path and "/resolve/" not in self.path
            known = gated or self.path.endswith(("/some/model", "/some/data"))
            mine = self.headers.get("authorization") == "Bearer mine"
            self.send_response(200 if known else 302 if mine else 401)
            self.send_header("location", "/elsewhere")
            self.end_headers()
            if gated:
                self.wfile.write(json.dumps(GATED).encode())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_for_what_is_not_on_this_disk(made, tmp_path, monkeypatch, hub_at):
    recipe = load_recipe(recipe_of(made, tmp_path, model_name_or_path="some/model", dataset_name="some/data"))
    assert problems(recipe, parse_block(recipe)) == [] and notes(recipe) == []
    assert hub_at == ["/api/models/some/model", "/api/datasets/some/data"]
    monkeypatch.chdir(tmp_path)
    model, data = checked(recipe_of(made, tmp_path, model_name_or_path="models/tiny", dataset_name="mine"))
    for problem, name, kind in ((model, "models/tiny", "model"), (data, "mine", "dataset")):
        assert f"there is no folder {tmp_path / name}, so {name} would be fetched from the Hugging Face hub" in problem
        assert f"it has no such {kind}, or you may not read it" in problem
    reference = block(reference={"model": "another"})
    assert checked(recipe_of(made, tmp_path, xtf=reference))[0].startswith("reference.model: there is no folder")
    (problem,) = checked(recipe_of(made, tmp_path, model_name_or_path="./tiny"))
    assert f"there is no folder ./tiny (looked for: {tmp_path / 'tiny'})" in problem


def test_a_gated_model_is_found_by_its_files(made, tmp_path, monkeypatch, hub_at):
    path = recipe_of(made, tmp_path, model_name_or_path="gated/model", dataset_name="gated/data")
    model, data = checked(path)
    home = os.environ["HF_ENDPOINT"]
    assert f"it is gated, and its files are not open to you. Accept its terms at {home}/gated/model, then" in model
    assert f"{home}/datasets/gated/data, then log in (hf auth login) or set HF_TOKEN." in data
    assert hub_at[1::2] == [
        f"/{part}gated/{name}/resolve/main/a%20b.json" for part, name in (("", "model"), ("datasets/", "data"))
    ]
    hub._answer.cache_clear()
    hub_at.clear()
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert checked(path) == []
    assert len(hub_at) == 4  # a file that lies elsewhere is not asked for there
    monkeypatch.delenv("HF_TOKEN")
    named = {"model_name_or_path": "gated/model", "dataset_name": "gated/data"}
    for token in ("mine", "mine\n"):  # as `|` in YAML ends a text
        hub._answer.cache_clear()
        assert checked(recipe_of(made, tmp_path, env={"HF_TOKEN": token}, **named)) == []
    assert len(checked(recipe_of(made, tmp_path, env={"HF_TOKEN": "another"}, **named))) == 2
    monkeypatch.setattr(hub, "build_opener", lambda *_: (_ for _ in ()).throw(TimeoutError))
    hub._answer.cache_clear()
    assert checked(path) == []  # a gate that does not answer is left to the run


def test_a_hub_out_of_reach_is_said_at_once(made, tmp_path, monkeypatch, hub_at):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    model, data = checked(recipe_of(made, tmp_path, model_name_or_path="some/model", dataset_name="some/data"))
    assert "http://127.0.0.1:9 cannot be reached" in model and "cannot be reached" in data
    assert time.monotonic() - start < 10
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, data = checked(recipe_of(made, tmp_path, model_name_or_path="some/model", dataset_name="some/data"))
    assert "HF_HUB_OFFLINE is set" in model and "HF_HUB_OFFLINE is set" in data


@pytest.mark.parametrize("folder", ["home/hub/datasets--some--data", "home/datasets/some___data"])
def test_data_in_a_cache_is_left_to_the_run(made, tmp_path, monkeypatch, hub_at, folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / folder).mkdir(parents=True)
    assert checked(recipe_of(made, tmp_path, dataset_name="some/data")) == [] == hub_at


def test_a_file_that_cannot_be_read_is_named_with_one_full_stop(made, tmp_path):
    path = recipe_of(made, tmp_path)
    (tmp_path / "data/train.jsonl").unlink()
    (tmp_path / "data/train.parquet").write_bytes(b"no Parquet")
    (problem,) = checked(path)
    assert "cannot be read: " in problem and ".." not in problem and problem.endswith(". Repair the file.")


def cached(made, hub, revisions):
    """A hub's cache with a model; `revisions`: names and the model's chat template there."""
    import shutil

    for number, (name, template) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        folder = hub / "models--some--model"
        shutil.copytree(made / "model", folder / "snapshots" / commit)
        (folder / "snapshots" / commit / "chat_template.jinja").write_text(template)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)


def test_the_revision_of_a_model_is_read(made, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    cached(made, hub, {"main": NO_MARKS, "old": tiny.CHAT_TEMPLATE})
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    for revision, right in ((..., False), ("old", True), ("main", False), (f"{1:040x}", True), ("gone", False)):
        chats = {"rows": CHATS, "assistant_only_loss": True, "model_name_or_path": "some/model"}
        path = recipe_of(made, tmp_path, model_revision=revision, **chats)
        assert (checked(path) == []) is right, revision
        assert in_stock(path, monkeypatch) is right
    assert "some/model (revision gone) is not in the cache" in checked(path)[0]


def test_the_env_block_of_a_recipe_says_where_models_are(made, tmp_path, monkeypatch, hub_at):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    cached(made, tmp_path / "home" / "hub", {"main": NO_MARKS})
    chats = {"rows": CHATS, "assistant_only_loss": True, "model_name_or_path": "some/model"}
    assert checked(recipe_of(made, tmp_path, **chats)) == []
    found = checked(recipe_of(made, tmp_path, env={"HF_HUB_OFFLINE": 1}, **chats))
    assert "is not in the cache" in found[0]
    monkeypatch.delenv("HF_HUB_CACHE")
    found = checked(recipe_of(made, tmp_path, env={"HF_HOME": str(tmp_path / "home")}, **chats))
    assert len(found) == 1 and "{% generation %}" in found[0]


ANSWER = "{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }}\n{% else %}A: "
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
MARKED = ANSWER + "{% generation %}{{ m['content'] }}{% endgeneration %}"
THINKS = "<think>\n\n</think>\n\n"
TURNS = {  # a template; whether answers alone are trained; what is said of it, for messages and for pairs of them
    "marked": (MARKED.replace("{% endgen", "<|im_end|>{% endgen") + PROMPT, True, "", ""),
    "unmarked": (ANSWER + "{{ m['content'] }}<|im_end|>\n" + PROMPT, False, "", ""),
    "no end": (ANSWER + "{{ m['content'] }}\n" + PROMPT, False, "nothing after", "nothing after"),
    "no end in the marks": (MARKED + "\n" + PROMPT, True, "nothing after an answer", "nothing after an answer"),
    "an end outside": (MARKED + "<|im_end|>\n" + PROMPT, True, "'<|im_end|>' outside", "'<|im_end|>' outside"),
    "an eos token outside": (MARKED + "{{ eos_token }}\n" + PROMPT, True, "'<|endoftext|>' outside", "outside"),
    "an insertion": (ANSWER + THINKS + "{{ m['content'] }}<|im_end|>" + PROMPT, False, "inserts", "inserts"),
    "an insertion outside": (
        MARKED.replace("{% gen", THINKS + "{% gen").replace("{% endgen", "<|im_end|>{% endgen") + PROMPT,
        True,
        "",
        "",
    ),
    "an insertion inside": (
        MARKED.replace("ion %}{{", f"ion %}}{THINKS}{{{{").replace("{% endgen", "<|im_end|>{% endgen") + PROMPT,
        True,
        "inserts '<think>\\n\\n</think>'",
        "inserts",
    ),
    "that refuses": ("{{ raise_exception('no') }}", False, "", ""),
    "that fails": ("{{ 1 / 0 }}", False, "", ""),
}


@pytest.mark.parametrize("pairs", [False, True], ids=["messages", "pairs"])
@pytest.mark.parametrize("kind", TURNS)
def test_ends_of_turns_that_are_never_trained_are_noted(made, tmp_path, kind, pairs):
    template, alone, *expected = TURNS[kind]
    (tmp_path / "t.jinja").write_text(template)
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS] if pairs else CHATS
    changes = {"assistant_only_loss": alone, "chat_template_path": str(tmp_path / "t.jinja")}
    path = recipe_of(made, tmp_path, rows=rows, **changes)
    found = notes(load_recipe(path))
    assert len(found) == bool(expected[pairs]) and all(expected[pairs] in note for note in found), found


def test_answers_with_an_opening_of_their_own_are_not_noted(made, tmp_path):
    (tmp_path / "t.jinja").write_text(TURNS["an insertion"][0])
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFive."}]}
        for row in CHATS
    ]
    path = recipe_of(made, tmp_path, rows=rows, chat_template_path=str(tmp_path / "t.jinja"))
    assert notes(load_recipe(path)) == []


def test_check_prints_notes_and_says_ok(made, tmp_path, capsys):
    from xtf_plugin import cli

    (tmp_path / "t.jinja").write_text(TURNS["no end"][0])
    cli.check(recipe_of(made, tmp_path, rows=CHATS, chat_template_path=str(tmp_path / "t.jinja")), False)
    printed = capsys.readouterr().out
    assert ": ok\n" in printed and "\nnote: no end of turn is trained" in printed


def test_axolotl(made, tmp_path):
    write(tmp_path / "data/train.jsonl", CHATS)
    data = {
        "base_model": str(made / "no-model"),
        "datasets": [{"path": str(tmp_path / "no-data"), "type": "chat_template"}],
        "plugins": ["xtf_plugin.XTFPlugin"],
        "xtf": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    found = checked(path)
    assert len(found) == 2 and "no-model" in found[0] and "no-data" in found[1]
    for source in ("data", "data/train.jsonl"):
        data |= {"base_model": str(made / "model"), "datasets": [{"path": str(tmp_path / source)}]}
        path.write_text(yaml.safe_dump(data))
        assert checked(path) == []
    data |= {"datasets": [{"path": "s3://bucket/folder/file.jsonl"}]}
    path.write_text(yaml.safe_dump(data))
    assert checked(path) == []


def axolotl_recipe(made, tmp_path, **changes):
    data = {
        "base_model": str(made / "model"),
        "adapter": "lora",
        "datasets": [{"path": str(tmp_path / "data"), "type": "chat_template"}],
        "plugins": ["xtf_plugin.XTFPlugin"],
        "xtf": True,
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"peft_init_lora_weights": "pissa"}, "pissa"),
        ({"peft_init_lora_weights": "gaussian"}, ""),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "loftq"),
        ({}, ""),
        ({"peft_init_lora_weights": "pissa", "xtf": {"reference": {"model": "some/base"}}}, ""),
    ],
)
def test_adapters_of_axolotl_that_change_the_base(made, tmp_path, monkeypatch, keys, named):
    monkeypatch.setattr(hub, "missing", lambda *_: "")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    write(tmp_path / "data/train.jsonl", CHATS)
    path = axolotl_recipe(made, tmp_path, **keys)
    found = checked(path)
    assert len(found) == bool(named) and all(f"peft_init_lora_weights: {named} changes" in each for each in found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"special_tokens": ["x"]}, "special_tokens: ['x'] is no mapping"),
        ({"peft": "x"}, "peft: 'x' is no mapping"),
        ({"peft": {"loftq_config": 3}}, ""),
        ({"datasets": 5}, "datasets: 5 is no list"),
        ({"datasets": [{"path": "./" + "x" * 5_000, "type": "chat_template"}]}, "there is no such folder of data"),
    ],
)
def test_values_of_another_type_in_axolotl(made, tmp_path, keys, message):
    """Axolotl's own schema says what is wrong inside `peft`."""
    write(tmp_path / "data/train.jsonl", CHATS)
    path = axolotl_recipe(made, tmp_path, **keys)
    assert any(message in problem for problem in checked(path)) == bool(message)
    notes(load_recipe(path))


@pytest.mark.parametrize("columns", ["messages", "tools", "table"])
def test_a_template_of_what_is_not_known_here(made, tmp_path, columns):
    """Messages of a table are not read, and tools are the host's to write; a syntax error is one anyway."""
    rows = [{**row, "tools": None} if columns == "tools" else row for row in CHATS]
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no') }}")
    path = recipe_of(made, tmp_path, rows=rows, chat_template_path=str(tmp_path / "t.jinja"))
    if columns == "table":
        (tmp_path / "data/train.jsonl").unlink()
        in_parquet(tmp_path / "data", "train.parquet", rows)
    assert any("does not render" in each for each in checked(path)) == (columns == "messages")
    (tmp_path / "t.jinja").write_text("{{ image_token + 'x' }}")
    assert not any("does not render" in each for each in checked(path))
    (tmp_path / "t.jinja").write_text("{{ ")
    assert any("does not render" in each for each in checked(path))


def test_the_tokenizer_that_axolotl_is_told_to_take(made, tmp_path):
    """Its eos token is the one that is trained, and its template the default one."""
    import shutil

    write(tmp_path / "data/train.jsonl", CHATS)
    shutil.copytree(made / "model", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    (note,) = notes(load_recipe(axolotl_recipe(made, tmp_path)))
    assert "writes '<|im_end|>', and Axolotl trains '<|endoftext|>'" in note
    for named in (str(tmp_path / "tokenizer"), "on/the-hub"):
        assert notes(load_recipe(axolotl_recipe(made, tmp_path, tokenizer_config=named))) == []


def test_a_recipe_that_would_fail_is_refused(made, tmp_path):
    from xtf_plugin import cli

    with pytest.raises(XTFUserError, match="this run would fail"):
        cli.check(recipe_of(made, tmp_path, max_seq_length=64), False)
