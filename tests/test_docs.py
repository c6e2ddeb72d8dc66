"""The documentation is run: every block, command and link of README.md, docs/ and recipes/README.md has a rule here.

Blocks are collected, not listed: one of a new kind, or a command that begins with a new word, fails until it has a
rule. Commands that train are run for real, in the order a reader would: on a tiny model, in a folder of their own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import config_page, forked, real, tiny, unsloth_pattern
from tests.doc_commands import CHECKS, PLACEHOLDER, check_command
from tests.hosts.test_other_hosts import with_mask
from tests.pages import PAGES, ROOT, Block, blocks, commands, inline_code, prose, relative_links
from tests.reliability import LONG
from tests.test_plan import rows as labelled
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.hosts import axolotl_checks
from xtf_plugin.report import terminal
from xtf_plugin.scorers import registry

BIN = Path(sys.executable).parent
BLOCKS = [block for page in PAGES for block in blocks(page)]
FENCED = [block for block in BLOCKS if block.language != "indented"]
README = PAGES[0]
QUICKSTART = ROOT / "docs/quickstart.md"
SWITCHES = ("XTF_DISABLE", "XTF_DRY_RUN", "XTF_SCORES_OUTPUT", "TORCH_DEVICE_BACKEND_AUTOLOAD")
HERE = {"HuggingFaceTB/SmolLM2-135M-Instruct": "model", "path/to/data.jsonl": "data/train.jsonl"}  # for `xtf init`
TINY = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dtype": "float32",
    "load_in_4bit": True,
    "use_peft": True,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "output_dir": "out",
}


@functools.cache
def keys_of_trl() -> set[str]:
    """The keys that `trl sft` takes from a recipe, plus ours."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init} | {"env", "xtf"}


class Workplace:
    """A reader's folder: a tiny model and data where recipes point, and the commands that were run there, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[tuple[str, ...], subprocess.CompletedProcess[str]] = {}
        tiny.save_base(folder / "model")
        tiny.save_rows(folder / "data/train.jsonl", tiny.problems(24))
        shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))

    def write_recipe(self, name: str) -> None:
        """Put the `xtf:` block of the named recipe, or of the README's first YAML block, on the tiny model and data."""
        first = next(block.text for block in FENCED if block.page == README and block.language == "yaml")
        data = yaml.safe_load(first if name == PLACEHOLDER else (ROOT / name).read_text(encoding="utf-8"))
        text = yaml.safe_dump({**TINY, "xtf": data["xtf"]}, sort_keys=False)
        path = self.folder / name
        if not path.exists() or path.read_text() != text:  # `xtf show` scores again when the recipe is the newer one
            path.write_text(text)

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        if tuple(words) not in self.results:
            for name in (word for word in words if word.endswith(".yaml")):
                self.write_recipe(name)
            command = [*words, "--output", f"made-{len(self.results)}.yaml"] if words[:2] == ["xtf", "init"] else words
            command = [HERE.get(word, word) for word in command]
            quiet = {"XTF_CACHE": "cache", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {name: value for name, value in os.environ.items() if name not in SWITCHES} | quiet
            self.results[tuple(words)] = forked.run([BIN / command[0], *command[1:]], cwd=self.folder, env=environment)
        return self.results[tuple(words)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def trained(workplace) -> Workplace:
    """The workplace after the README's `trl sft`."""
    result = workplace.run(["trl", "sft", "--config", PLACEHOLDER])
    assert result.returncode == 0, result.stderr[-3000:]
    return workplace


def run_bash(block: Block, trained: Workplace, monkeypatch) -> None:
    for words in commands(block.text):
        check_command(words)
        if words[0] in ("trl", "xtf") and block.page != QUICKSTART:  # whose commands run in order, below
            result = trained.run(words)
            assert result.returncode == 0, result.stderr[-3000:]


def check_yaml(block: Block, trained: Workplace | None = None, monkeypatch=None) -> None:
    data = yaml.safe_load(block.text)
    if "plugins" in data:  # an Axolotl recipe: whether Axolotl takes it is tested where Axolotl is
        axolotl_checks.check_plugin_line(data)
        data.pop("plugins")
    assert set(data) <= keys_of_trl(), f"unknown to `trl sft`: {set(data) - keys_of_trl()}"
    if "xtf" in data:
        XTFConfig.parse(data["xtf"])


def run_python(block: Block, trained: Workplace, monkeypatch) -> None:
    """Run a reader's script with what a reader would have: a model, its tokenizer and a dataset. One step is enough."""
    import transformers
    import trl
    from datasets import Dataset

    folder = trained.folder / f"script-{block.page.stem}-{block.line}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XTF_CACHE", str(folder / "cache"))
    small = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    for package, name in ((trl, "SFTConfig"), (transformers, "TrainingArguments")):
        monkeypatch.setattr(package, name, functools.partial(getattr(package, name), **small))
    if "from unsloth" in block.text:  # no dependency of ours: a double stands in for it
        for name, module in unsloth_pattern.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    if "out/xtf/scores.parquet" in block.text:  # what the stock run of the README left
        shutil.copytree(trained.folder / "out/xtf", folder / "out/xtf")
    given = {"model": tiny.model(), "tokenizer": tiny.tokenizer(), "dataset": Dataset.from_list(tiny.problems(16))}
    given["rows"] = Dataset.from_list(with_mask(labelled(16)))
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__", **given})
    if ".train(" in block.text:
        written = list(folder.glob("*/xtf/summary.json"))
        assert written, f"{block}: trained without XTF"
        summary = json.loads(written[0].read_text())
        if summary["config"]["preset"] == "default":  # the tiny model gives it nothing to drop
            assert summary["totals"]["completion_tokens"] > 0
        else:
            assert summary["totals"]["dropped_tokens"] > 0


def check_toml(block: Block, trained: Workplace | None = None, monkeypatch=None) -> None:
    """The one kind there is: a package with a scorer. tests/scorers/test_registry.py installs it and runs it."""
    assert f'[project.entry-points."{registry.GROUP}"]' in block.text, "not the pyproject.toml of a scorer's package"


@cache
def demo_rows() -> list[Any]:
    """The rows of the demo's data, which know where their noise is."""
    sys.path.insert(0, str(ROOT / "recipes/demo"))
    try:
        import prepare

        return [row for part in prepare.make_rows(0) for row in part]
    finally:
        sys.path.pop(0)


@cache
def demo_completions() -> list[str]:
    """The completions of the demo's data as `xtf show` prints them, without marks."""
    return [terminal.visible(row.completion) for row in demo_rows()]


def check_text(block: Block, trained: Workplace | None = None, monkeypatch=None) -> None:
    """The one kind there is: demo data as `xtf show` prints it. Without its marks it is the demo's text."""
    lines = [line for line in block.text.splitlines() if not line.startswith("prompt: ")]
    bare = re.sub(r"\[-|\{\+|\|[\w ]+[-+][\]}]", "", "\n".join(lines)).rstrip("\n")
    assert any(bare in text for text in demo_completions()), f"{block}: not the text of the demo"


def check_diff(block: Block, trained: Workplace | None = None, monkeypatch=None) -> None:
    """The one kind there is: an answer of the demo, noise marked as dropped and the rest as kept."""
    lines = [(line[:1], line[1:].strip()) for line in block.text.splitlines()]
    for row in demo_rows():
        noise = " ".join(row.completion[start:end] for start, end, _ in row.noise)
        if all(text in (noise if mark == "-" else row.clean) for mark, text in lines):
            return
    pytest.fail(f"{block}: no answer of the demo has this noise and this text")


RULES = {
    "diff": check_diff,
    "bash": run_bash,
    "yaml": check_yaml,
    "python": run_python,
    "toml": check_toml,
    "text": check_text,
}


def check_block(block: Block, trained: Workplace | None = None, monkeypatch=None) -> None:
    if block.language not in RULES:
        pytest.fail(f"{block}: no rule for blocks marked {block.language!r}: add one to RULES")
    RULES[block.language](block, trained, monkeypatch)


@pytest.mark.parametrize("block", FENCED, ids=str)
def test_block_does_what_it_says(block, trained, monkeypatch):
    check_block(block, trained, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_prose_and_in_indented_blocks_exist(page):
    indented = [block.text for block in BLOCKS if block.page == page and block.language == "indented"]
    for text in (*indented, *inline_code(page)):
        first, *rest = text.split()
        if first in CHECKS and rest:  # the others are formulas, keys and names
            for words in commands(text):
                check_command(words)


def assert_dropped_as_marked(block: Block, shown: str) -> None:
    """What `xtf show` prints of an answer drops the lines that are marked so, and keeps the others."""
    part = re.compile(r"\[-(.*?)\|[\w ]+-\]", re.DOTALL)
    texts = {"-": "\n".join(part.findall(shown)), " ": part.sub("\n", shown)}
    for line in block.text.splitlines():
        assert terminal.visible(line[1:].strip()) in texts[line[0]], line


WHICH = ["tiny", pytest.param("real", marks=[real.needs(real.SMOLLM2), pytest.mark.skipif(not LONG, reason="long")])]


@pytest.mark.parametrize("which", WHICH)
def test_the_quickstart_runs_in_the_order_of_its_page(which, tmp_path):
    """All commands but `pip` and the download of the model, for which another model stands at the same place."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    model = tmp_path / ".models" / real.SMOLLM2
    if which == "real":
        model.parent.mkdir()
        model.symlink_to(real.MODELS / real.SMOLLM2)
    else:
        tiny.save_base(model)
    steps = [
        words
        for block in FENCED
        if block.page == QUICKSTART and block.language == "bash"
        for words in commands(block.text)
    ]
    assert [" ".join(words[:2]) for words in steps if words[0] in ("xtf", "trl")] == [
        "xtf init",
        "xtf check",
        "xtf score",
        "xtf show",
        "xtf tune",
        "trl sft",
    ]
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"XTF_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for words in steps:
        if words[0] == "pip" or words[1] == "recipes/models.py":
            continue
        result = forked.run([BIN / words[0], *words[1:]], cwd=tmp_path, env=environment, timeout=900)
        assert result.returncode == 0, f"{words}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert "scored 0 documents" in result.stdout + result.stderr, "the training has scored again"
    if which == "real":
        shown = forked.run(
            [BIN / "xtf", "show", "recipe.yaml", "--grep", "mashed"], cwd=tmp_path, env=environment
        ).stdout
        assert_dropped_as_marked(next(block for block in FENCED if block.language == "diff"), shown)


def test_no_block_is_overlooked():
    fences = sum(
        len(re.findall(r"^\s*(?:```|~~~)\w*$", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES
    )
    assert len(FENCED) == fences / 2 >= 7
    assert any(block.text.startswith("python recipes/") for block in BLOCKS if block.language == "indented")


QUICK = [["xtf", "cache", "list"], *(c.split() for c in inline_code(README) if re.match("xtf (check|show|report) ", c))]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_commands_of_the_table_read_what_the_run_left(words, trained):
    """`xtf score` and `xtf cache prune` have tests of their own; here they are only parsed."""
    table = trained.folder / "out/xtf/scores.parquet"
    written = table.stat().st_mtime_ns
    result = trained.run(words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()
    assert table.stat().st_mtime_ns == written


def test_stock_command_writes_what_the_readme_names(trained):
    named = [code for code in inline_code(README) if code.startswith("<output_dir>/")]
    assert len(named) >= 2
    for code in named:
        assert (trained.folder / code.replace("<output_dir>", "out")).is_file(), code
    summary = json.loads((trained.folder / "out/xtf/summary.json").read_text())
    assert list(summary["totals"]["scores"]) == list(XTFConfig().scores)
    assert summary["totals"]["completion_tokens"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_files(page):
    assert [str(target) for target in relative_links(page) if not target.exists()] == []


def test_first_commands_stand_at_the_top_of_the_readme():
    top = "\n".join(README.read_text(encoding="utf-8").splitlines()[:30])
    assert "pip install" in top and "make demo" in top


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_short(page):
    """A page that is longer holds more than one idea; README is what somebody reads who has two minutes."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (150 if page == README else 300)


def test_examples_use_the_preset_that_we_recommend():
    """`paper` and `official` are there to be compared with: who copies an example should not get them."""
    texts = {str(block): block.text for block in FENCED if "xtf" in block.text}
    assert len(texts) > 15
    wrong = re.compile(r"preset\W+(paper|official)")
    assert [name for name, text in texts.items() if wrong.search(text)] == []


def test_figures_of_the_readme_stand_in_the_evidence():
    text = prose(README)
    helps = text[text.index("## Does it help?") : text.index("## Use it")]
    figures = set(re.findall(r"[\d.]+(?= %)", helps)) | set(re.findall(r"([\d.]+) to [\d.]+ %", helps))
    assert len(figures) > 8
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    assert [one for one in figures if not re.search(rf"(?<![\d.]){re.escape(one)}(?![\d.]*\d)", evidence)] == []


def test_messages_that_troubleshooting_quotes_exist():
    """A quoted line is a message of the package; `…` stands for what a message fills in."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "xtf_plugin").rglob("*.py")]
    known = [
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in text.values)
        if isinstance(text, ast.JoinedStr)
        else text.value
        for tree in sources
        for text in ast.walk(tree)
        if isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str))
    ]
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quoted) > 10
    whole = "\n".join(known)
    for message in quoted:
        missing = [part for part in message.split("…") if part.strip(" .,:;()") not in whole]
        assert not missing, f"no message of the package has {missing}"


def test_choosing_names_the_thresholds_of_the_default():
    """What else is worth a try, `xtf tune` says: from the data, and in one place."""
    rows = re.findall(r"^\| .+ \| `(\w+)` \| `(\{.+\})` \|$", (ROOT / "docs/choosing.md").read_text(), re.MULTILINE)
    wanted = {name: part.drop.model_dump() for name, part in XTFConfig().scores.items()}
    assert {name: yaml.safe_load(drop) for name, drop in rows} == wanted


def test_reference_of_the_block_is_fresh():
    assert config_page.main(["--check"]) is None


def test_architecture_names_every_folder_and_top_level_module():
    package = ROOT / "xtf_plugin"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert len(folders) == 9
    assert folders | modules <= set(inline_code(ROOT / "docs" / "architecture.md"))


def test_architecture_names_files_that_exist():
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", prose(ROOT / "docs" / "architecture.md"))
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / top / name).is_file() for top in ("", "xtf_plugin"))] == []


def test_every_decision_has_a_date_and_a_reason():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert len(pages) > 5
    for page in pages:
        first, *records = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert first.startswith("# ") and records, page
        for record in records:
            assert re.match(r"20\d\d-\d\d-\d\d: \S", record), f"{page}: {record[:60]!r} has no date"
            assert "**Decision.** " in record and "**Why.** " in record, f"{page}: {record[:60]!r}"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("", "anything"),
        ("toml", "a = 1"),
        ("text", "Nobody[-·wrote|TR-]·this."),
        ("diff", "- For each egg in a simple cake you can use one of these:"),
        ("diff", "  As an AI language model, I don't have personal opinions"),
        ("bash", "curl example.org"),
        ("bash", "pip install xtf"),
        ("bash", "make nothing-of-the-kind"),
        ("bash", "trl sft --config recipes/nothing.yaml"),
        ("bash", "xtf shwo recipe.yaml"),
        ("bash", "axolotl trian recipe.yaml"),
        ("bash", "axolotl train recipes/axolotl/nothing.yaml"),
        ("bash", "axolotl xtf shwo recipe.yaml"),
        ("bash", "xtf show recipe.yaml --rows 3"),
        ("bash", "xtf show recipes/nothing.yaml"),
        ("bash", "xtf cache prune --al"),
        ("bash", "python -m xtf_plugin.nothing"),
        ("bash", "python recipes/prepare_prompt_completion.py data --colums prompt"),
        ("bash", "accelerate launch -m trl.scripts.nothing"),
        ("yaml", "lora_rank: 8"),
        ("yaml", "xtf: {preset: papr}"),
        ("yaml", "plugins: [xtf_plugin.Plugin]\nxtf: true"),
    ],
)
def test_rules_refuse_what_is_wrong(language, text):
    (block,) = blocks(README, f"Some words.\n\n```{language}\n{text}\n```\n")
    assert (block.line, block.text) == (3, text)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        check_block(block)


def test_the_matrix_names_tests_that_exist():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, test in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not test or re.search(rf"^ *def {test}\(", text, re.MULTILINE), f"{path}::{test}"
