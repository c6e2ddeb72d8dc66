"""What is written and shown, with hostile data in it: the cache has no text, files follow the umask, the report runs
nothing in Chromium, the terminal gets no control characters; and what the package's own code never does.

Every search is shown to find what is there: else a test here could not fail.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.browsing import browser  # noqa: F401 (a fixture)
from tests.made_scores import odd_sentences
from tests.reliability import LONG, record
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from tests.test_repo_rules import BOOT, PACKAGE, ROOT, sources, tree
from xtf_plugin import cli
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.report import writer
from xtf_plugin.report.score_table import METADATA

SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"}
SHELLS |= {"os.chmod", "os.umask", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def unsafe_calls(paths) -> list[str]:
    """Calls of a shell, of code in text, of a YAML loader that makes objects, of names that another could take."""
    found = []
    for path in paths:
        for node in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            name = ast.unparse(node.func)
            shell = any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            started = name.startswith(("os.spawn", "os.exec")) or (isinstance(node.func, ast.Name) and name in BUILTINS)
            if shell or started or name in SHELLS:
                found.append(f"{path.name}:{node.lineno}: {name}")
    return found


def test_no_shell_and_no_code_from_text(tmp_path):
    assert unsafe_calls([*sources(PACKAGE), BOOT]) == []
    calls = ["os.system(x)", "subprocess.run(x, shell=True)", "eval(x)", "yaml.load(x, Loader=yaml.Loader)", "exec(x)"]
    calls += ["tempfile.mktemp()", "os.execv(x, y)", "model.eval()", "re.compile(x)", "run(x, shell=False)"]
    (tmp_path / "planted.py").write_text("\n".join(calls))
    assert len(unsafe_calls([tmp_path / "planted.py"])) == 7


# Findings of bandit in the package and the boot file that are no problem, and why; pyproject.toml has those that hold
# for the complete package.
ANSWERED = {
    ("B105", "xtf_plugin/report/terminal.py"): "what a scorer measures, in words; no password",
    ("B310", "xtf_plugin/hosts/hub.py"): "the hub's address, which only the user can set; the answer is not read",
    ("B615", "xtf_plugin/hosts/init_data.py"): "rows of the data set that the recipe then names; no code",
    (
        "B615",
        "xtf_plugin/hosts/init_recipe.py",
    ): "JSON and a template of what the recipe then names; they are only read",
    ("B615", "xtf_plugin/scoring/providers.py"): "`revision` is in **options; the user chooses it, and the key has it",
}


def test_bandit_finds_nothing_that_is_not_answered():
    if importlib.util.find_spec("bandit") is None:
        assert not LONG, "bandit is not installed: the figures would lack this test"
        pytest.skip("bandit is not installed (a dev dependency)")
    words = ["-q", "-f", "json", "-c", str(ROOT / "pyproject.toml"), "-r", str(PACKAGE), str(BOOT)]
    ended = subprocess.run([sys.executable, "-m", "bandit", *words], capture_output=True, text=True)
    report = json.loads(ended.stdout)
    assert not report["errors"] and report["metrics"]["_totals"]["loc"] > 5_000 and str(BOOT) in report["metrics"]
    found = {(each["test_id"], Path(each["filename"]).relative_to(ROOT).as_posix()) for each in report["results"]}
    assert found - ANSWERED.keys() == set(), "find an answer, or mend it"
    assert ANSWERED.keys() - found == set(), "an answer that nothing asks for any more"
    record("bandit", lines=report["metrics"]["_totals"]["loc"], findings=len(report["results"]))


DOMAIN = "photosynthesis"


def texts() -> set[str]:
    """Words of the data and of the word file that no file format has of its own."""
    return {w.strip(".,?!") for r in tiny.problems(12) for t in r.values() for w in t.split() if len(w) > 4} | {DOMAIN}


def revealed(folder: Path) -> set[str]:
    """Which of them are in the files of a folder: in names and bytes, and unpacked."""
    hay = b""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        hay += str(path.relative_to(folder)).encode() + path.read_bytes()
        if path.suffix == ".parquet":
            read = pq.read_table(path)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, read.schema) as writer:
                writer.write_table(read)
            hay += sink.getvalue().to_pybytes() + repr(pq.read_metadata(path).metadata).encode()
    codes = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")
    return {word for word in texts() if any(word.encode(code) in hay for code in codes)}


def written(folder: Path, **block):
    """A cache and all that a run writes."""
    (folder / "words.txt").write_text(f"apples\n{DOMAIN}\n")
    selectors = odd_sentences()["selectors"]
    block = {"selectors": selectors, "task_relevance": {"domain": str(folder / "words.txt")}, **block}
    config = XTFConfig.parse({**ATTRIBUTES_ON, "cache_dir": str(folder / "cache"), **block})
    plan = make_plan(config, collect(rows()), Provider(), tiny.tokenizer(), progress=False)
    return plan, writer.write(plan, tiny.tokenizer(), folder / "xtf")


def test_the_cache_holds_no_text(tmp_path):
    written(tmp_path)
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) >= 2 and len(texts()) > 10
    assert revealed(tmp_path / "cache") == set()
    assert len(revealed(tmp_path / "xtf")) > 5, "the search finds text where there is some"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_and_folders_are_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        written(tmp_path)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for part in ("cache", "xtf") for p in (tmp_path / part).rglob("*")}
    assert len(modes) > 7
    assert {p.name: mode for p, mode in modes.items() if mode != (0o777 if p.is_dir() else 0o666) & ~mask} == {}


OWNED = "window.owned=1"
PAYLOADS = (
    f"<script>{OWNED}</script>",
    f"</script><script>{OWNED}</script>",
    f'<img src=x onerror="{OWNED}">',
    f"</title></style><svg onload={OWNED}>",
    f'" autofocus onfocus="{OWNED}" x="',
    f"<!--<script>\u2028;{OWNED};//$data$script$hash${{{OWNED}}}",
    f"javascript:{OWNED}",
)
HOSTILE = "".join(PAYLOADS)


def harmless(browser, page: str, csp: bool = False):  # noqa: F811
    """Open a page, look at all of it, and tell what it ran; without its policy, so that only escaping protects."""
    context = browser.new_context(bypass_csp=not csp)
    opened, asked = context.new_page(), []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    opened.goto(page)
    opened.eval_on_selector_all("details", "all => all.forEach((each) => { each.open = true; })")
    for place in ("#documents .token", "table td"):
        for element in opened.locator(place).all()[:3]:
            element.hover(timeout=2_000)
    found = opened.evaluate("[window.owned, document.images.length, document.scripts.length, document.title]")
    text = opened.inner_text("body")
    context.close()
    assert {url for url in asked if url != "data:,"} == {page}
    return found, text


def test_the_report_of_a_hostile_run_runs_nothing(browser, tmp_path):  # noqa: F811
    """Names of folder, model and patterns; test_page.py has the tokens."""
    provider = Provider()
    provider.description = lambda: {"name": HOSTILE, "source": HOSTILE, HOSTILE: HOSTILE}
    folder = tmp_path / f"&amp;{HOSTILE}".replace("/", "\\")[:200]
    patterns = [f"({text.translate({ord(c): None for c in '[](){}*+?|^$.'})})" for text in PAYLOADS]
    block = {"force_drop": patterns, "protect": {"patterns": patterns}, "cache_dir": str(tmp_path / "c" / HOSTILE)}
    data = [{**row, "input_ids": row["input_ids"][:9] + tiny.tokenizer()(HOSTILE)["input_ids"]} for row in rows(3)]
    data = [{**row, "labels": [-100] * 9 + row["input_ids"][9:]} for row in data]
    config = XTFConfig.parse({**ATTRIBUTES_ON, **block})
    plan = make_plan(config, collect(data), provider, tiny.tokenizer(), progress=False)
    writer.write(plan, tiny.tokenizer(), folder / "xtf")
    found, text = harmless(browser, (folder / "xtf" / "report.html").as_uri())
    assert found == [None, 0, 2, f"xtf report: {folder.name}".replace("\u2028", " ")]
    assert text.count("onerror") > 5, "what is hostile is shown"


def replaced(value, numbers: bool, place: str = ""):
    """A table's metadata with a payload in every text (and number) that is only shown."""
    if place.split(".")[1:2] in (["config"], ["format"], ["bytes"]) or (numbers and place == ".totals"):
        return value
    if isinstance(value, dict):
        made = {key: replaced(item, numbers, f"{place}.{key}") for key, item in value.items()}
        return made | ({HOSTILE: HOSTILE} if place in (".reference", ".versions", ".scoring") else {})
    if isinstance(value, list):
        return [replaced(item, numbers, f"{place}.") for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) or numbers else value


@pytest.mark.parametrize("numbers", [False, True])
def test_a_report_made_from_a_strangers_table_runs_nothing(browser, tmp_path, numbers):  # noqa: F811
    _, (_, page, scores) = written(tmp_path)
    about = replaced(json.loads(pq.read_schema(scores).metadata[METADATA]), numbers)
    held = pq.read_table(scores)
    held = held.set_column(held.schema.get_field_index("token"), "token", [[HOSTILE] * held.num_rows])
    pq.write_table(held.replace_schema_metadata({METADATA: json.dumps(about).encode()}), scores)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(scores)])
    found, text = harmless(browser, page.as_uri())
    assert found[:3] == [None, 0, 2] and "onerror" in text
    (tmp_path / "naive.html").write_text(f"<title>x</title><body>{PAYLOADS[2]}<script>1</script>")
    assert naive_is_owned(browser, (tmp_path / "naive.html").as_uri()), "the payload itself does nothing"


def naive_is_owned(browser, page: str) -> bool:  # noqa: F811
    opened = browser.new_page()
    opened.goto(page)
    opened.wait_for_function("window.owned === 1", timeout=5_000)
    opened.close()
    return True


CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
CONTROLS = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\r\u202eevil[/]"  # and what rich takes for the end of a style


def test_the_terminal_is_given_no_control_characters(tmp_path, capsys):
    """By a table and a cache that others have written: in every text that they hold."""
    _, (_, _, scores) = written(tmp_path)
    held = pq.read_table(scores)
    for name in ("document", "token", "reason"):
        values = [f"{CONTROLS}{value}" for value in held[name].to_pylist()]
        held = held.set_column(held.schema.get_field_index(name), held.schema.field(name), [values])
    pq.write_table(held, scores)
    for path in (tmp_path / "cache").rglob("reference.json"):
        path.write_text(json.dumps({"name": CONTROLS, "source": CONTROLS}))
    for words in (["show", scores], ["report", scores], ["cache", "list", "--cache-dir", tmp_path / "cache"]):
        with pytest.raises(SystemExit):
            cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        assert CONTROL.findall(shown.out + shown.err) == [] and "x1b" in shown.out + shown.err, words[0]
