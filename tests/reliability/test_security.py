"""What is read: files in place of ours, models, recipes and settings from strangers run no code and lead nowhere else.

Every payload is shown to work on a reader that trusts it: else a test here could not fail.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
import yaml

from tests import tiny
from tests.reliability import amount, record
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from xtf_plugin import cli
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.hosts.recipes import load_recipe
from xtf_plugin.plan import make_plan
from xtf_plugin.report.score_table import METADATA, SCHEMA
from xtf_plugin.scoring.providers import SeparateReference, load
from xtf_plugin.store.admin import list_cache
from xtf_plugin.training import callback


def plan(cache: Path, **block):
    config = XTFConfig.parse({**ATTRIBUTES_ON, "cache_dir": str(cache), **block})
    return make_plan(config, collect(rows()), Provider(), tiny.tokenizer(), progress=False)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(save, value, **options) -> bytes:
    sink = io.BytesIO()
    save(sink, value, **options)
    return sink.getvalue()


def extension_type(bomb: Bomb) -> bytes:
    """Parquet whose column claims to be of a Python type; pyarrow once unpickled that while it read the schema."""
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(bomb)}
    held = pa.table([[1]], pa.schema([pa.field("x", pa.int64(), metadata=about)]))
    return saved(lambda sink, value: pq.write_table(value, sink), held)


FORMS = {  # how a bomb is packed, and who would set it off
    "pickle": (pickle.dumps, pickle.loads),
    "numpy objects": (
        lambda bomb: saved(np.save, np.array([bomb], dtype=object), allow_pickle=True),
        lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    ),
    "torch file": (
        lambda bomb: saved(lambda sink, value: torch.save(value, sink), [bomb]),
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    ),
    "numpy archive": (
        lambda bomb: saved(lambda sink, value: np.savez(sink, about=value), np.array([bomb], dtype=object)),
        lambda data: np.load(io.BytesIO(data), allow_pickle=True)["about"],
    ),
    "arrow extension": (
        extension_type,
        lambda data: pickle.loads(pq.read_schema(io.BytesIO(data))[0].metadata[b"ARROW:extension:metadata"]),
    ),
    "yaml tag": (
        lambda bomb: f"!!python/object/apply:os.mkdir [{json.dumps(bomb.marker)}]\n".encode(),
        lambda data: yaml.unsafe_load(data.decode()),
    ),
}


def refused(*words: object) -> None:
    """A command ends with 2; what it said is for `capsys`."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2


def in_the_cache(data: bytes, folder: Path) -> None:
    """In place of every file of a score cache, and of a shard under the name that its hash gives it."""
    before = plan(folder / "cache")
    for path in [path for path in (folder / "cache").rglob("*") if path.is_file()]:
        path.write_bytes(data)
        if path.suffix == ".parquet" and not path.name.startswith("relevance"):
            path.with_name(xxhash.xxh3_128_hexdigest(data) + ".parquet").write_bytes(data)
    list_cache(folder / "cache")
    after = plan(folder / "cache")
    assert np.array_equal(before.selection.keep, after.selection.keep) and after.stats.stored_documents == 0
    assert len(list(folder.rglob("*.damaged"))) == 2


def as_the_score_table(data: bytes, folder: Path) -> None:
    """All of it, and its metadata."""
    path = folder / "scores.parquet"
    pq.write_table(SCHEMA.empty_table().replace_schema_metadata({METADATA: data}), path)
    refused("report", path)
    path.write_bytes(data)
    refused("show", path)
    refused("report", path)


def as_the_recipe(data: bytes, folder: Path) -> None:
    """And as the block on the command line."""
    (folder / "recipe.yaml").write_bytes(data)
    for command in ("check", "score", "show"):
        refused(command, folder / "recipe.yaml")
    with pytest.raises(XTFUserError):
        XTFConfig.parse(data.decode("latin-1"))


def as_the_word_file(data: bytes, folder: Path) -> None:
    (folder / "words.txt").write_bytes(data)
    try:
        plan(folder / "cache", task_relevance={"domain": str(folder / "words.txt")})
    except XTFUserError as error:
        assert "domain" in str(error)


PLACES = (in_the_cache, as_the_score_table, as_the_recipe, as_the_word_file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_no_file_that_is_read_runs_anything(tmp_path, capsys, place, form):
    marker = tmp_path / "ran"
    packed, trusting = FORMS[form]
    data = packed(Bomb(marker))
    place(data, tmp_path)
    assert not marker.exists() and "Traceback" not in capsys.readouterr().err
    trusting(data)
    assert marker.exists(), "the payload itself does nothing"
    record("payloads fed", tried=1)


def reference(folder: Path, **block):
    """A separate reference, as a run opens it."""
    config = XTFConfig.parse({"reference": {"model": str(folder), "quantization": "none", **block}}).reference
    SeparateReference(config, tiny.tokenizer(), collect(rows(2)), torch.device("cpu")).fingerprint()
    return load(config, torch.device("cpu")).model


WEIGHTS = ("model.safetensors", "pytorch_model.bin", "named by the index.bin")


@pytest.mark.parametrize("form", amount(["pickle", "torch file"], list(FORMS)))
@pytest.mark.parametrize("name", [*WEIGHTS, "config.json", "tokenizer.json"])
def test_no_file_of_a_reference_runs_anything(tmp_path, name, form):
    folder = tiny.save_base(tmp_path / "model")
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    if "index" in name:
        index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "other.safetensors").write_bytes(b"")
    (folder / name).write_bytes(FORMS[form][0](Bomb(tmp_path / "ran")))
    with pytest.raises(XTFUserError, match="reference.model"):
        reference(folder)
    assert not (tmp_path / "ran").exists()
    record("payloads fed", tried=1)


CODE = """import os, transformers
os.makedirs({marker!r})
class Config(transformers.LlamaConfig): pass
class Model(transformers.LlamaForCausalLM): config_class = Config
class Tokenizer(transformers.PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("kind, tokenizer", [("llama", False), ("unheard_of", False), ("llama", True)])
def test_code_beside_a_reference_runs_only_with_the_key(tmp_path, monkeypatch, kind, tokenizer):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, markers = tiny.save_base(tmp_path / f"of_{kind}_{tokenizer}"), tmp_path / "ran"
    own = {"AutoConfig": "own_config.Config", "AutoModelForCausalLM": "own_model.Model"}
    changes = {"config.json": {"auto_map": own, "model_type": kind}}
    if tokenizer:
        own = {"AutoTokenizer": [None, "own_tokenizer.Tokenizer"]}
        changes["tokenizer_config.json"] = {"auto_map": own, "tokenizer_class": "Tokenizer"}
    for name, change in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    for name in ("own_config", "own_model", "own_tokenizer"):
        (folder / f"{name}.py").write_text(CODE.format(marker=str(markers / name)))
    if kind == "llama" and not tokenizer:  # transformers has a class of its own for it, and takes that one
        assert type(reference(folder)).__module__.startswith("transformers.models.")
    else:
        with pytest.raises(XTFUserError, match="trust_remote_code"):
            reference(folder)
    assert not markers.exists()
    assert type(reference(folder, trust_remote_code=True)).__name__ == "Model" and (markers / "own_model").exists()


NAMES = {  # a setting, and where it leads; None: nowhere
    "below": "here/below",
    "../beside": "beside",
    "../../a/b": "../a/b",
    "~/at home": "home/at home",
    "~nobody_at_all/x": "here/~nobody_at_all/x",
    "$HOME/`touch x`;touch y": "here/$HOME/`touch x`;touch y",
    "new\nline": "here/new\nline",
    "\x1b[31m\u202e<b>": "here/\x1b[31m\u202e<b>",
    "%2e%2e/x": "here/%2e%2e/x",
    **dict.fromkeys(["x" * 300, "y/" * 3_000, "nul\0x", "\ud800"]),
}


@pytest.mark.parametrize("setting", NAMES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("key", ["cache_dir", "report"])
def test_files_appear_only_where_a_setting_says(tmp_path, monkeypatch, key, setting):
    for name in ("work/here", "work/home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "work" / "home"))
    block = {"cache_dir": str(tmp_path / "other"), "report": str(tmp_path / "other"), key: setting}
    provider, args = Provider(), SimpleNamespace(report_to=[])
    provider.description = lambda: {"name": "../../../evil", "source": "~/evil"}
    record("hostile folders of settings", tried=1)
    try:
        config = XTFConfig.parse({**ATTRIBUTES_ON, **block})
    except XTFUserError as error:
        assert NAMES[setting] is None and key in str(error)
        return
    made = make_plan(config, collect(rows(3)), provider, tiny.tokenizer(), progress=False)
    run = SimpleNamespace(args=args, processing_class=tiny.tokenizer())
    callback.XTFCallback._report(SimpleNamespace(plan=made, config=config, trainer=run), tmp_path / "out")
    found = {p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "other")}
    if NAMES[setting] is None:
        assert not found
        return
    target = Path(os.path.normpath(tmp_path / "work" / NAMES[setting]))
    assert found and all(path.is_relative_to(target) for path in found)
    if key == "report":  # the command line reads it where the run writes it
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": "m", "xtf": block}))
        assert load_recipe(tmp_path / "recipe.yaml").scores_path().resolve() == target / "scores.parquet"


RECIPES = ["", "x" * 300, "y/" * 3_000, "no\nsuch", "\x1b]0;x\x07", "~/none", "/dev/null", ".", "a/../../x"]


@pytest.mark.parametrize("name", [*RECIPES, "../outside.yaml"])
def test_names_of_recipes_are_only_names(tmp_path, monkeypatch, capsys, name):
    """One that leads outside is read as any other; nothing appears there or here."""
    (tmp_path / "outside.yaml").write_text("model_name_or_path: m\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in ("check", "score", "show", "report"):
        refused(command, name)
        record("names of recipes", tried=1)
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "outside.yaml"]
