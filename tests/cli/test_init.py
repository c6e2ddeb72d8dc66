"""`xtf init`: from any usual data set to a recipe that `xtf check` passes and the stock command trains, or one message.

Axolotl itself is in tests/axolotl/test_init_axolotl.py.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import forked, tiny
from tests.cli.test_cli import calm_environment, xtf  # noqa: F401 (fixtures)
from xtf_plugin import environment
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.errors import XTFUserError
from xtf_plugin.hosts import hub, init_recipe

MISSING = hub.missing  # which `calm_environment` replaces
PLAIN = [{"question": row["prompt"], "answer": row["completion"].strip(), "id": 7} for row in tiny.problems(12)]
NAMES = {"user": "human", "assistant": "gpt"}
SHARED = [
    {"conversations": [{"from": NAMES[each["role"]], "value": each["content"]} for each in row["messages"]]}
    for row in tiny.conversations(6)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of a tiny model with marks in its template, one without marks, and one without a template."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("marked", "unmarked", "base"):
        tiny.save_base(folder / name)
    template = folder / "marked/chat_template.jinja"
    for mark in ("{% generation %}", "{% endgeneration %}"):
        assert mark in template.read_text()
    bare = template.read_text().replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (folder / "unmarked/chat_template.jinja").write_text(bare)
    (folder / "base/chat_template.jinja").unlink()
    return folder


@pytest.fixture
def init(xtf, models, tmp_path, monkeypatch):  # noqa: F811
    """Run `xtf init` in an empty folder; return (exit code, stdout, stderr) and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(dataset, *more, model="marked"):
        code, out, err = xtf("init", "--model", models / model, "--dataset", dataset, *more)
        path = tmp_path / "recipe.yaml"
        assert path.exists() == (code == 0), err
        return code, out, err, yaml.safe_load(path.read_text(encoding="utf-8")) if code == 0 else None

    return call


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def save(rows: list[dict], name: str = "data.jsonl") -> str:
    tiny.save_rows(Path(name), rows)
    return name


@pytest.mark.parametrize("model", ["marked", "base"])
def test_questions_and_answers_are_written_again(init, xtf, model, tmp_path):  # noqa: F811
    """TRL cannot rename columns."""
    code, out, _, recipe = init(save(PLAIN), model=model)
    assert code == 0 and "12 rows" in out and "next: xtf check recipe.yaml" in out
    assert recipe["datasets"] == [{"path": "./recipe_data", "split": "train"}]
    assert "after a change of data.jsonl, remove recipe_data and this file" in (tmp_path / "recipe.yaml").read_text()
    row = rows_of(tmp_path / "recipe_data")[0]
    if model == "base":
        assert row == {"prompt": PLAIN[0]["question"] + "\n", "completion": PLAIN[0]["answer"]} and "note:" not in out
    else:
        assert row["prompt"] == [{"role": "user", "content": PLAIN[0]["question"]}]
        assert row["completion"] == [{"role": "assistant", "content": PLAIN[0]["answer"]}]
    assert xtf("check", "recipe.yaml")[0] == 0


def test_columns_that_the_host_reads_are_left_where_they_are(init, tmp_path):
    folder = save([{**row, "extra": 1} for row in tiny.problems(9)], "folder/train.jsonl").split("/")[0]
    _, out, _, recipe = init(folder)
    assert "note: the model has a chat template, and plain texts are trained without it" in out
    assert recipe["datasets"] == [{"path": "./folder", "split": "train", "columns": ["prompt", "completion"]}]
    assert (
        recipe["load_in_4bit"] is init_recipe._on_gpu()
        and recipe["use_peft"] is True
        and "assistant_only_loss" not in recipe
    )
    assert XTFConfig.parse(recipe["xtf"]) == XTFConfig()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "recipe.yaml"]


@pytest.mark.parametrize("rows, every", [(12, 1), (200, 10)])
def test_a_run_of_few_steps_logs_each(init, rows, every):
    """With 10, the quickstart's seven steps ended without a logged loss."""
    assert init(save([{"prompt": f"{n}?", "completion": f"{n}."} for n in range(rows)]))[3]["logging_steps"] == every


def test_conversations_are_trained_on_answers_alone(init, tmp_path):
    """By the template's marks; without marks every answer becomes a row, with what was said before as its prompt."""
    data = save([{"prompt": "of another kind", **row} for row in tiny.conversations(6, turns=2)])
    _, _, _, recipe = init(data)
    assert recipe["assistant_only_loss"] is True and recipe["datasets"][0]["columns"] == ["messages"]
    (tmp_path / "recipe.yaml").unlink()
    _, out, _, recipe = init(data, model="unmarked")
    assert "assistant_only_loss" not in recipe and "12 rows" in out
    first, second = rows_of(tmp_path / "recipe_data")[:2]
    messages = tiny.conversations(6, turns=2)[0]["messages"]
    assert (first["prompt"], first["completion"]) == (messages[:1], messages[1:2])
    assert (second["prompt"], second["completion"]) == (messages[:3], messages[3:])


LABELLED = {
    "written again": [{**row, "source": ["web", "book"][at % 2], "id": f"row {at}"} for at, row in enumerate(PLAIN)]
}
LABELLED["left"] = [{**row, "source": "ab"[at % 2]} for at, row in enumerate(tiny.conversations(6))]


@pytest.mark.parametrize("kind", LABELLED)
def test_a_column_that_drops_can_be_counted_by_is_kept(init, xtf, kind, tmp_path):  # noqa: F811
    """Also where rows are written again; a column that names single rows is not."""
    code, _, _, recipe = init(save(LABELLED[kind]))
    assert code == 0 and "  # report_by: source  " in Path("recipe.yaml").read_text()
    if kind == "left":
        assert recipe["datasets"][0]["columns"] == ["messages", "source"]
    else:
        rows = rows_of(tmp_path / "recipe_data")
        assert {row["source"] for row in rows} == {"web", "book"} and "id" not in rows[0]
    text = Path("recipe.yaml").read_text().replace("  # report_by: source", "  report_by: source")
    Path("recipe.yaml").write_text(text)
    assert xtf("check", "recipe.yaml")[0] == 0


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_other_names_of_roles_become_those_of_templates(init, keys, tmp_path):
    """TRL renames the keys `from` and `value`, but no roles."""
    rows = [
        {"messages": [dict(zip(keys, each.values(), strict=True)) for each in row["conversations"]]} for row in SHARED
    ]
    init(save(rows))
    roles = {each["role"] for row in rows_of(tmp_path / "recipe_data") for each in row["prompt"] + row["completion"]}
    assert roles == {"user", "assistant"}


def test_text_alone_is_trained_with_a_word_of_warning(init):
    _, _, _, recipe = init(save([{"content": row["prompt"] + row["completion"]} for row in tiny.problems(5)]))
    assert recipe["dataset_text_field"] == "content"
    assert "texts without a prompt" in Path("recipe.yaml").read_text()


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_files_of_every_kind(init, kind, tmp_path):
    file = tmp_path / f"Daten – 数据 {kind}.{kind}"
    if kind == "json":
        file.write_text(json.dumps(PLAIN), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, PLAIN[0])
            writer.writeheader()
            writer.writerows(PLAIN)
    else:
        pq.write_table(pa.Table.from_pylist(PLAIN), file)
    code, out, err, _ = init(file.name)
    assert code == 0 and "12 rows" in out, err


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3", "text": "all of it"}, "Add.\n\n1 2", "3"),
        ({"instruction": "Add.", "context": "", "response": "3", "category": "x"}, "Add.", "3"),
        ({"Question": "1 + 2?", "Complex_CoT": "Hm.", "Response": "3"}, "1 + 2?", "3"),
        ({"input": "1 + 2?", "output": "数 3"}, "1 + 2?", "数 3"),
        ({"prompt": "1 + 2?", "response": "3"}, "1 + 2?", "3"),
    ],
)
def test_known_names_of_columns(init, row, prompt, answer, tmp_path):
    init(save([row] * 3), model="base")
    assert rows_of(tmp_path / "recipe_data")[0] == {"prompt": prompt + "\n", "completion": answer}


@pytest.mark.parametrize("host", ["trl", "axolotl"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1", "context": "2", "output": "3"}, ("Add.\n\n1\n\n2\n", "3")),
        ({"question": "1 - 1?", "answer": 0}, ("1 - 1?\n", "0")),
        ({"prompt": "1 + 1?", "completion": 2}, ("1 + 1?\n", "2")),
    ],
    ids=["two contexts", "zero", "number"],
)
def test_what_a_host_cannot_read_is_written_again(init, monkeypatch, host, row, expected, tmp_path):
    """Axolotl reads one column beside the question, and neither host reads numbers."""
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.19.0")
    code, _, err, recipe = init(save([row] * 3), "--host", host, model="base")
    assert code == 0, err
    assert rows_of(tmp_path / "recipe_data")[0] == dict(zip(("prompt", "completion"), expected, strict=True))
    if host == "axolotl":
        type_ = recipe["datasets"][0]["type"]
        assert (type_["field_instruction"], type_["field_output"]) == ("prompt", "completion")
        assert type_["format"] == type_["no_input_format"] == "{instruction}" and "field_input" not in type_


@pytest.mark.parametrize("empty", [None, []])
def test_a_first_row_without_messages(init, empty):
    code, _, err, recipe = init(save([{"messages": empty}, *tiny.conversations(3)]))
    assert code == 0 and recipe["datasets"][0]["columns"] == ["messages"], err


def test_an_answer_in_words_goes_before_a_number(init, tmp_path):
    init(save([{"question": "1 + 2?", "answer": 3, "solution": "It is 3."}] * 3), model="base")
    assert rows_of(tmp_path / "recipe_data")[0]["completion"] == "It is 3."


@pytest.mark.parametrize("at", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize("role", ["bot", "model", "chatgpt", "gpt"])
def test_roles_of_any_row_are_mapped(init, monkeypatch, role, at, tmp_path):
    """Axolotl knows `human` and `gpt` by itself; what it does not know it would not train."""
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]} for _ in "abcd"]
    rows[at]["messages"][1]["role"] = role
    init(save(rows))
    assert {row["completion"][0]["role"] for row in rows_of(tmp_path / "recipe_data")} == {"assistant"}
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.19.0")
    Path("recipe.yaml").unlink()
    shutil.rmtree("recipe_data")
    _, _, _, recipe = init("data.jsonl", "--host", "axolotl")
    roles = recipe["datasets"][0].get("roles")
    assert (roles is None) == (role == "gpt")
    assert roles is None or {role, "assistant", "gpt"} <= set(roles["assistant"])


def test_rows_without_an_answer_are_counted_and_left_out(init, tmp_path):
    code, out, _, _ = init(save([*PLAIN, {"question": "?", "answer": None, "id": 1}]))
    assert code == 0 and "12 rows; 1 without an answer left out" in out and len(rows_of(tmp_path / "recipe_data")) == 12


def test_long_rows_get_room_up_to_what_the_model_reads(init, models):
    _, _, _, recipe = init(save([{"text": "word " * 300}]))
    assert recipe["max_length"] == 512
    Path("recipe.yaml").unlink()
    facts = json.loads((models / "marked/config.json").read_text())
    assert facts["max_position_embeddings"] == 512
    _, _, _, recipe = init(save([{"text": "word " * 400_000}]))  # 2 MB
    assert recipe["max_length"] == 512


REFUSED = {
    "no such file": ("nowhere.jsonl", None, "there is no such file or folder"),
    "no such folder": ("./nowhere", None, "there is no such file or folder"),
    "not on the hub": ("some/data", None, "so some/data would be fetched from the Hugging Face hub"),
    "columns between semicolons": ("data.csv", b"question;answer\na;b, c\n", "separated by ';'"),
    "columns between tabs": ("data.csv", b"question\tanswer\na\tb\n", "separated by '\\t'"),
    "another kind of file": ("data.xlsx", b"PK", "cannot read files ending in '.xlsx'"),
    "empty": ("data.jsonl", b"", "holds no rows"),
    "broken": ("data.jsonl", b'{"question": "a", "answer"\n', "cannot be read"),
    "no text": ("data.csv", b"\xff\xfe\x00\x01\n\xff\n", "cannot be read"),
    "no answer anywhere": (
        "data.jsonl",
        b'{"question": "a", "answer": " "}\n',
        "no row has text in question and answer",
    ),
    "unknown columns": ("data.jsonl", b'{"foo": "a", "bar": "b"}\n', 'row["YOUR QUESTION"]'),
    "pictures": ("data.jsonl", b'{"image": "a", "answer": "b"}\n', "the column image holds no text"),
    "preferences": ("data.jsonl", b'{"chosen": "a", "rejected": "b"}\n', "holds preferences"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_is_refused(init, name, tmp_path, monkeypatch):
    dataset, content, message = REFUSED[name]
    if content is not None:
        Path(dataset).write_bytes(content)
    monkeypatch.setattr(hub, "missing", MISSING)
    code, out, err, _ = init(dataset)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "recipe_data").exists()


def test_the_lines_that_convert_unknown_columns_work(init, tmp_path):
    code, _, err, _ = init(save([{"foo": "1 + 2?", "bar": "3"}] * 4, "odd.jsonl"))
    program = err[err.index("    import json") :].replace("YOUR QUESTION", "foo").replace("YOUR ANSWER", "bar")
    subprocess.run([sys.executable, "-c", "if True:\n" + program], check=True, capture_output=True)
    code, _, _, recipe = init("train.jsonl")
    assert code == 0 and recipe["datasets"][0]["path"] == "./recipe_data"
    assert rows_of(tmp_path / "recipe_data")[0]["prompt"] == [
        {"role": "user", "content": "1 + 2?"}
    ]  # as a chat model reads


def test_conversations_without_an_answer_are_refused(init, tmp_path):
    """After the recipe that would have left them where they are was refused."""
    rows = [{"messages": [{"role": "user", "content": "?"}]}] * 3
    code, _, err, _ = init(save(rows), model="unmarked")
    assert code == 2 and "no row has text in messages" in err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_csv_file_is_written_again_with_commas(init, tmp_path):
    (tmp_path / "odd.csv").write_text('question;answer\nWhat, then?;An answer.\nWhy?;"One; with a sign."\n')
    code, _, err, _ = init("odd.csv")
    program = err[err.index("    import csv") :]
    subprocess.run([sys.executable, "-c", "if True:\n" + program], check=True, capture_output=True)
    code, _, _, _ = init("train.csv")
    rows = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows_of(tmp_path / "recipe_data")]
    assert code == 0 and rows == [("What, then?", "An answer."), ("Why?", "One; with a sign.")]


def test_a_mistyped_model_is_refused_without_retries(init, monkeypatch, models, tmp_path):
    monkeypatch.setattr(hub, "missing", MISSING)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    code, out, err, _ = init(save(PLAIN), model=models.parent / "nowhere")
    assert code == 2 and "there is no such folder" in err
    with pytest.raises(XTFUserError, match="so modle would be fetched from the Hugging Face hub: .* cannot be reached"):
        init_recipe.init("modle", "data.jsonl", None, tmp_path / "other.yaml")
    assert time.monotonic() - start < 10 and out == ""


def test_models_that_are_refused(init, models, tmp_path):
    data = save(tiny.conversations(4))
    assert "has no chat template" in init(data, model="base")[2]
    assert "there is no such folder" in init(data, model="nowhere")[2]
    (tmp_path / "empty").mkdir()
    code, _, err, _ = init(save(PLAIN), model=tmp_path / "empty")
    assert code == 2 and "has no config.json" in err and not (tmp_path / "recipe_data").exists()


def test_a_home_folder_is_written_out(init, models, tmp_path, monkeypatch):
    """Hosts take `~` for the name of a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").symlink_to(models / "marked")
    save(tiny.problems(4))
    code, _, err, recipe = init("~/data.jsonl", "--model", "~/here")
    assert code == 0, err
    assert recipe["model_name_or_path"] == str(tmp_path / "here")
    assert recipe["datasets"][0]["data_files"] == str(tmp_path / "data.jsonl")


def test_data_beside_the_recipe_are_not_looked_for_elsewhere(init, xtf, tmp_path, monkeypatch):  # noqa: F811
    """`datasets` takes a name that is no folder from its cache, and another project may have left one there."""
    assert init(save(PLAIN))[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "bare.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("./recipe_data", "recipe_data"))
    for name, path in (("recipe", "./recipe_data"), ("bare", "recipe_data")):
        code, _, err = xtf("check", tmp_path / f"{name}.yaml")
        assert code == 2 and f"{path} is a folder beside the recipe" in err and f"Run this in {tmp_path}." in err


def test_a_folder_named_as_a_reader_of_files_is_not_data(init, tmp_path):
    (tmp_path / "json").mkdir()
    code, _, err, recipe = init(save(tiny.problems(4)))
    assert code == 0 and recipe["datasets"][0]["path"] == "json", err


def test_nothing_is_overwritten(init, xtf, tmp_path):  # noqa: F811
    (tmp_path / "recipe_data").mkdir()
    (tmp_path / "recipe_data/mine").touch()
    assert "recipe_data exists" in init(save(PLAIN))[2]
    (tmp_path / "recipe_data/mine").unlink()
    (tmp_path / "recipe_data").rmdir()
    (tmp_path / "recipe.yaml").write_text("mine")
    words = ("init", "--model", "m", "--dataset", "data.jsonl")
    code, _, err = xtf(*words)
    assert code == 2 and "recipe.yaml exists" in err and (tmp_path / "recipe.yaml").read_text() == "mine"
    (tmp_path / "recipe.yaml").unlink()
    assert init(save(PLAIN))[0] == 0
    assert "data.jsonl) and is not overwritten" in xtf(*words)[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--host", "unsloth"), "Legal: trl, axolotl"),
        (("--output", "recipe.json"), "ends in .yaml"),
        (("--output", "data.jsonl/recipe.yaml"), "cannot be written"),
        (("--output", "nowhere/recipe.yaml"), "cannot be written"),
    ],
)
def test_options_that_are_refused(init, words, message, tmp_path):
    code, _, err, _ = init(save(tiny.problems(4)), *words)
    assert code == 2 and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_the_host_is_the_one_that_is_installed(monkeypatch):
    for installed, host in ((("trl",), "trl"), (("axolotl", "trl"), "trl"), (("axolotl",), "axolotl"), ((), "trl")):
        found = {name: "1.0" for name in installed}
        monkeypatch.setattr(init_recipe, "installed_version", found.get)
        assert init_recipe._host(None) == host


@pytest.mark.parametrize(
    ("rows", "model", "expected"),
    [
        (PLAIN, "marked", {"path": "./recipe_data", "type": "chat_template", "field_messages": "messages"}),
        (PLAIN, "base", {"path": "data.jsonl", "ds_type": "json"}),
        (SHARED, "marked", {"message_property_mappings": {"role": "from", "content": "value"}}),
        ([{"text": "a"}], "base", {"type": "completion", "field": "text"}),
        ([{"prompt": "a?", "completion": " b"}], "marked", {"ds_type": "json"}),
    ],
)
def test_axolotl_maps_columns_itself(init, monkeypatch, rows, model, expected):
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.19.0")
    code, out, _, recipe = init(save(rows), "--host", "axolotl", model=model)
    assert code == 0 and "for axolotl train" in out and recipe["plugins"] == ["xtf_plugin.XTFPlugin"]
    assert expected.items() <= recipe["datasets"][0].items()
    if rows is PLAIN and model == "base":
        assert recipe["datasets"][0]["type"]["field_instruction"] == "question"


def test_a_data_set_on_the_hub(init, monkeypatch):
    """Of several configurations the first is read; its name and the others' are in the recipe."""
    seen = []

    def load(path, config, streaming):
        seen.append((path, config, streaming))
        return {"test": [], "train": iter(tiny.problems(3))}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["main", "socratic"])
    _, _, _, recipe = init("openai/gsm8k")
    assert seen == [("openai/gsm8k", "main", True)]
    entry = {"path": "openai/gsm8k", "name": "main", "split": "train", "columns": ["prompt", "completion"]}
    assert recipe["datasets"] == [entry] and "Other configurations: socratic" in Path("recipe.yaml").read_text()


def test_no_torch_is_imported(models, tmp_path):
    """Of transformers, only what renders chat templates, which takes no torch either."""
    data = tiny.save_rows(tmp_path / "data.jsonl", PLAIN)
    words = ["init", "--model", str(models / "marked"), "--dataset", str(data), "--output", str(tmp_path / "r.yaml")]
    code = f"""
import sys
from xtf_plugin import cli
try:
    cli.main({words!r})
finally:
    print({{"torch", "transformers.modeling_utils", "trl"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("set()\n"), ended.stderr


@pytest.mark.parametrize("rows", [PLAIN, tiny.conversations(12)], ids=["questions", "conversations"])
def test_stock_trl_trains_the_recipe(init, rows, tmp_path):
    init(save(rows))
    words = [Path(sys.executable).parent / "trl", "sft", "--config", "recipe.yaml", "--max_steps", "1", "--use_cpu"]
    result = forked.run(words, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs/recipe/xtf/summary.json").is_file() and "train_loss" in result.stdout + result.stderr
