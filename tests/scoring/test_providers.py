"""The training model in 4 bits with adapters as the reference, or a separate model, quantised or not."""

from __future__ import annotations

import json
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import streams, tiny
from tests.scoring.test_engine import by_document
from tests.test_plan import rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFDryRun, XTFUserError
from xtf_plugin.scoring.distributed import Ranks
from xtf_plugin.scoring.engine import score
from xtf_plugin.scoring.fingerprint import model_facts, weights_hash
from xtf_plugin.scoring.providers import SeparateReference
from xtf_plugin.scoring.reference import borrow

TYPICAL = {"preset": "none", "selectors": {"odd": {"scorer": "typicality", "drop": {"below": -1.0}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("reference"))


def load_4bit(folder):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype="float32")


def logprobs(reference, documents):
    found = {}

    def sink(records):
        found.update((key, each.logprobs) for key, each in by_document(records))

    score(documents, np.arange(len(documents)), reference, (1,), sink, progress=False)
    return np.concatenate([found[key.tobytes()] for key in documents.keys])


def separate(folder, documents, **options):
    block = {"reference": {"model": str(folder), "dtype": "float32", **options}}
    return SeparateReference(XTFConfig.parse(block).reference, tiny.tokenizer(), documents, torch.device("cpu"))


class TestBorrowedQLoRA:
    def test_scores_are_those_of_the_4bit_base_and_training_state_survives(self, folder):
        documents = collect(rows())
        plain = logprobs(borrow(load_4bit(folder)), documents)
        model = prepare_model_for_kbit_training(load_4bit(folder))
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
        model.train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        flags = [(m.training, type(m).__name__) for m in model.modules()]
        weights = weights_hash(borrow(model).model)
        np.testing.assert_allclose(logprobs(borrow(model), documents), plain, atol=1e-5)
        assert [(m.training, type(m).__name__) for m in model.modules()] == flags
        assert weights_hash(borrow(model).model) == weights, "4-bit weights must not be repacked by scoring"

    def test_4bit_layers_never_see_evaluation_mode(self, folder):
        """In evaluation mode, bitsandbytes repacks them on some CPUs into a layout without gradients."""
        reference = borrow(load_4bit(folder))
        with reference.scoring(record=True):
            modes = {type(m).__name__: m.training for m in reference.model.modules()}
        assert modes["Linear4bit"] is True and modes["LlamaMLP"] is False

    def test_half_precision_products_around_float32_norms(self, folder):
        """`prepare_model_for_kbit_training` makes such models; the check of the reference must accept them."""
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype="float32")
        model = get_peft_model(prepare_model_for_kbit_training(loaded), LoraConfig(r=4, target_modules="all-linear"))
        assert np.isfinite(logprobs(borrow(model), collect(rows()))).all()

    def test_adapters_without_a_peft_model_are_refused(self):
        model = tiny.model()
        # as `model.add_adapter` does, which refuses older versions of PEFT
        inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
        with pytest.raises(XTFUserError, match="get_peft_model"):
            borrow(model)

    def test_8bit_scales_are_part_of_the_fingerprint(self, folder):
        quantization = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
        before = weights_hash(model)
        scale = next(p.SCB for p in model.parameters() if getattr(p, "SCB", None) is not None)
        scale.mul_(2)
        assert weights_hash(model) != before

    def test_fingerprint_ignores_adapters_and_sees_quantisation(self, folder):
        plain = load_4bit(folder)
        adapted = get_peft_model(load_4bit(folder), LoraConfig(r=4, target_modules="all-linear"))
        assert model_facts(plain)["weights"] == model_facts(adapted.get_base_model())["weights"]
        assert model_facts(plain)["weights"] != weights_hash(tiny.model())

    def test_weights_on_the_meta_device_are_refused(self):
        """All models without weights would have the same hash, and share scores."""
        with pytest.raises(XTFUserError, match="ZeRO-3"):
            weights_hash(tiny.model().to("meta"))


class TestSeparate:
    @pytest.mark.parametrize("quantization, tolerance", [("none", 1e-5), ("int8", 0.5), ("nf4", 2.0), ("fp4", 2.0)])
    def test_every_quantisation_loads_scores_and_is_freed(self, folder, quantization, tolerance):
        documents = collect(rows())
        truth = logprobs(borrow(tiny.model()), documents)
        provider = separate(folder, documents, quantization=quantization)
        with provider.open() as reference:
            ours = logprobs(reference, documents)
            held = [weakref.ref(reference.model), *map(weakref.ref, reference.model.parameters())]
        assert not hasattr(reference, "model")
        assert not any(each() is not None for each in held), "something keeps the weights in memory"
        assert np.array_equal(np.isnan(ours), np.isnan(truth))
        assert np.nanmean(np.abs(ours - truth)) <= tolerance
        if quantization != "none":
            assert np.nanmean(np.abs(ours - truth)) > 1e-4, "the model is not quantised"

    def test_fingerprint_follows_weights_and_quantisation(self, folder, tmp_path):
        documents = collect(rows())
        other = tmp_path / "other"
        tiny.model(seed=1).save_pretrained(other)
        tiny.tokenizer().save_pretrained(other)
        prints = {
            separate(folder, documents, quantization="nf4").fingerprint(),
            separate(folder, documents, quantization="fp4").fingerprint(),
            separate(other, documents, quantization="nf4").fingerprint(),
        }
        assert len(prints) == 3

    @pytest.mark.parametrize("before", [None, "true", "false"])
    @pytest.mark.parametrize("fails", [False, True])
    def test_every_rank_loads_all_weights_under_fsdp(self, folder, tmp_path, monkeypatch, before, fails):
        """transformers loads them on one rank only while this variable is on. No thread sets it."""
        name, seen = "FSDP_CPU_RAM_EFFICIENT_LOADING", []
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before)
        own, threads = type(os.environ).__setitem__, []

        def noted(environ, key, value):
            if key == name:
                threads.append(threading.current_thread())
            own(environ, key, value)

        monkeypatch.setattr(type(os.environ), "__setitem__", noted)
        load = AutoModelForCausalLM.from_pretrained

        def watch(*args, **kwargs):
            seen.append(os.environ.get(name))
            return load("/no/such/folder" if fails else args[0], **kwargs)

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
        monkeypatch.setattr(Ranks, "run_with_heartbeat", lambda self, work: ThreadPoolExecutor(1).submit(work).result())
        block = {"cache_dir": str(tmp_path / "cache"), "dry_run": True, **TYPICAL}
        block["reference"] = {"model": str(folder), "quantization": "none"}
        made = streams.attached(tmp_path, streams.trainer(tmp_path, streams.rows()), block)
        with pytest.raises(XTFUserError if fails else XTFDryRun):
            made.train()
        assert seen == ["false" if before else None] and os.environ.get(name) == before
        assert set(threads) <= {threading.main_thread()}

    def test_missing_model_is_one_clear_message(self, tmp_path):
        with pytest.raises(XTFUserError, match="reference.model.*could not be loaded"):
            separate(tmp_path / "nowhere", collect(rows()))

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("config.json", {"transformers_weights": "sub/model.safetensors"}, "sub/model.safetensors"),
            ("config.json", {"transformers_weights": "pytorch_model.bin"}, "pytorch_model.bin"),
            ("evil.safetensors.index.json", {"weight_map": {"a": "w.bin"}}, "w.bin"),
            ("model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}}, r"\.\./model"),
            ("model.safetensors.index.json", {"weight_map": 1}, "not an index of weights"),
            ("model.safetensors.index.json", "[" * 100_000, "cannot be read"),
        ],
    )
    def test_weights_outside_the_fingerprint_are_refused(self, tmp_path, name, content, match):
        folder = tiny.save_base(tmp_path / "reference")
        held = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(held | content))
        with pytest.raises(XTFUserError, match=match):
            separate(folder, collect(rows())).fingerprint()

    def test_an_index_of_weights_in_its_folder_is_accepted(self, tmp_path):
        folder = tiny.save_base(tmp_path / "reference")
        index = {"weight_map": {"lm_head.weight": "./model.safetensors"}}
        (folder / "other.safetensors.index.json").write_text(json.dumps(index))
        (folder / "a.json").mkdir()
        assert separate(folder, collect(rows())).fingerprint()


class TestTokenizerMustAgree:
    def refused(self, tmp_path, change, match):
        folder = tiny.save_base(tmp_path / "changed")
        change(folder)
        with pytest.raises(XTFUserError, match=match):
            separate(folder, collect(rows()))

    def test_vocabulary(self, tmp_path):
        def add(folder):
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(folder)
            other.add_tokens(["<|extra|>"])
            other.save_pretrained(folder)

        self.refused(tmp_path, add, "another vocabulary.*extra")

    def test_special_ids(self, tmp_path):
        def change(folder):
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(folder)
            other.eos_token = "<|im_end|>"
            other.save_pretrained(folder)

        self.refused(tmp_path, change, "eos_token_id")

    def test_segmentation_of_the_data(self, tmp_path):
        def change(folder):
            from tokenizers import Tokenizer, normalizers

            core = Tokenizer.from_file(str(folder / "tokenizer.json"))
            core.normalizer = normalizers.Lowercase()
            core.save(str(folder / "tokenizer.json"))

        self.refused(tmp_path, change, "cuts the training text differently")
