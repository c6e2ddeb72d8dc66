"""The scoring pass against an independent eager computation; the model is unchanged afterwards."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import GptOssConfig, GptOssForCausalLM

from tests import eager, tiny
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError, XTFUserError
from xtf_plugin.scoring import engine, self_check
from xtf_plugin.scoring.adapters import ADAPTER_INITS, ADAPTERS, VARIANTS
from xtf_plugin.scoring.reference import Reference, borrow, resolve_layers
from xtf_plugin.store.records import Records


def rows(sizes=(60, 37, 5, 2, 1, 90), seed=0):
    """Rows of ragged length whose completion is the second half, one of them with a prompt turn in between."""
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        ids = rng.integers(4, 400, size)
        labels = np.where(np.arange(size) >= size // 2, ids, -100)
        if size > 80:
            labels[60:70] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def by_document(records):
    """Key and records of each document."""
    for index, (low, high) in enumerate(pairwise(records.offsets)):
        columns = {name: values[low:high] for name, values in records.columns.items()}
        key = records.keys[index : index + 1]
        yield key.tobytes(), Records(keys=key, offsets=np.array([0, high - low]), **columns)


def run(documents, model, layers, **options):
    found = {}

    def sink(records):
        found.update(by_document(records))

    wanted = np.arange(len(documents))
    stats = engine.score(documents, wanted, Reference(model, "tiny"), layers, sink, progress=False, **options)
    return found, stats


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_agrees_with_eager_maps_and_full_logits(family):
    model = tiny.model(family)
    documents = collect(rows())
    found, _ = run(documents, model, (0, 1), batch_tokens=150)
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        logprobs, received = eager.scores(model, ids.astype(np.int64), (0, 1))
        ours = found[documents.keys[index].tobytes()]
        np.testing.assert_allclose(ours.logprobs, logprobs[completion].numpy(), atol=2e-5, rtol=0)
        np.testing.assert_allclose(ours.attention, received[completion].numpy(), atol=2e-5, rtol=0)
        entropy, deviation = eager.expectations(model, ids.astype(np.int64))
        np.testing.assert_allclose(ours.entropy, entropy[completion].numpy(), atol=2e-5, rtol=0)
        np.testing.assert_allclose(ours.deviation, deviation[completion].numpy(), atol=2e-5, rtol=0)
        assert ours.entropy.dtype == ours.deviation.dtype == np.float32


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3"])
def test_sliding_windows_are_shorter_than_the_documents(family):
    """So the test above covers windows."""
    assert tiny.model(family).config.sliding_window < 60


def test_layers_change_the_score():
    model, documents = tiny.model(), collect(rows())
    first, _ = run(documents, model, (0,))
    last, _ = run(documents, model, (1,))
    key = documents.keys[0].tobytes()
    assert np.nanmax(np.abs(first[key].attention - last[key].attention)) > 1e-2
    for name in ("logprobs", "entropy", "deviation"):
        np.testing.assert_array_equal(first[key].columns[name], last[key].columns[name])


def test_batching_changes_scores_by_rounding_only():
    model, documents = tiny.model(), collect(rows(sizes=range(2, 60)))
    one, _ = run(documents, model, (1,), batch_tokens=1)
    many, stats = run(documents, model, (1,), batch_tokens=10_000)
    assert stats.batches < 5 and len(one) == len(many) == len(documents)
    for key, records in one.items():
        for name, values in records.columns.items():
            np.testing.assert_allclose(values, many[key].columns[name], atol=1e-5)


def test_without_layers_no_attention_is_recorded():
    found, _ = run(collect(rows()), tiny.model(), ())
    assert all(list(records.columns) == ["logprobs", "entropy", "deviation"] for records in found.values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_unchanged_after_scoring(implementation):
    model = tiny.model(attn_implementation=implementation)
    model.train()
    model.model.layers[0].self_attn.eval()
    model.lm_head.weight.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    ids = torch.arange(5, 25)[None]
    torch.manual_seed(0)
    before, state = model(input_ids=ids).logits, torch.get_rng_state()
    run(collect(rows()), model, (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert model.config._attn_implementation == implementation
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.fixture
def little_memory(monkeypatch):
    """Room for 600 tokens at a time."""
    forward = Reference.forward

    def greedy(self, input_ids, *args, **kwargs):
        if input_ids.numel() > 600:
            raise torch.OutOfMemoryError("planted")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Reference, "forward", greedy)


def test_out_of_memory_halves_the_batches(little_memory):
    model, documents = tiny.model(), collect(rows(sizes=range(10, 60)))
    found, stats = run(documents, model, (1,), batch_tokens=4_000)
    assert len(found) == len(documents) and stats.halvings >= 2


def test_a_single_document_that_does_not_fit_names_the_setting(monkeypatch):
    def never(self, input_ids, *args, **kwargs):
        if input_ids.shape[0] * input_ids.shape[1] > 30:
            raise torch.OutOfMemoryError("planted")
        return Reference_forward(self, input_ids, *args, **kwargs)

    Reference_forward = Reference.forward
    monkeypatch.setattr(Reference, "forward", never)
    monkeypatch.setattr(self_check, "CHECK_TOKENS", 8)
    with pytest.raises(XTFError, match=r"single document of 90 tokens.*max_length"):
        run(collect(rows()), tiny.model(), (1,))


def test_other_errors_are_not_treated_as_out_of_memory(monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("planted shape error")

    monkeypatch.setattr(engine._Pass, "_launch", broken)
    with pytest.raises(RuntimeError, match="planted shape error"):
        run(collect(rows()), tiny.model(), (1,))


def test_unknown_head_is_refused_by_name():
    model = tiny.model()
    original = type(model).forward

    class Strange(type(model)):
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Strange
    with pytest.raises(XTFError, match="Strange.*differ from the model's own forward"):
        run(collect(rows()), model, (1,))


def test_token_ids_beyond_the_vocabulary_are_refused():
    made = rows()
    made[0]["input_ids"] = made[0]["input_ids"].copy()
    made[0]["input_ids"][3] = 100_000
    with pytest.raises(XTFError, match="token id 100000"):
        run(collect(made), tiny.model(), (1,))


def test_layer_names():
    config = tiny.model(num_hidden_layers=5).config
    assert resolve_layers("first", config) == (0,)
    assert resolve_layers("middle", config) == (2,)
    assert resolve_layers("last", config) == (4,)
    assert resolve_layers([0, -1, 4], config) == (0, 4)
    with pytest.raises(XTFUserError, match=r"\[5\].*5 layers"):
        resolve_layers([5], config)


def literals(kind):
    """The values that a type annotation lists."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return {bool: [True, False], type(None): [None]}.get(kind) or [v for part in get_args(kind) for v in literals(part)]


def _types():
    return {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def adapters():
    """Every accepted adapter type of this PEFT with each accepted initialisation."""
    for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        hints = get_type_hints(made)
        field = next((name for name in ADAPTER_INITS if name in hints), None)
        known = literals(hints[field]) if field else [None]  # an older PEFT knows fewer
        legal = [value for value in known if field is None or value in ADAPTER_INITS[field]]
        if str(kind.value) in ADAPTERS:
            for value in legal:
                if (kind.value, value) == ("C3A", None):  # listed in its type, but PEFT refuses it
                    continue
                yield pytest.param(str(kind.value), made, field, value, id=f"{kind.value}-{value}")


class TestAdapters:
    SIZES = {  # where the default is too large for the tiny model
        "ADALORA": {"total_step": 100},
        "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
        "C3A": {"block_size": 16},
        "MISS": {"r": 8},
        "ROAD": {"group_size": 16},
        "SHIRA": {"r": 2},
        "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6]},
        "VBLORA": {"vector_length": 16, "num_vectors": 8, "topk": 2, "r": 2},
        "WAVEFT": {"n_frequency": 64},
    }

    OPTIONS = {  # of LoRA
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "a trained head": {"modules_to_save": ["lm_head"]},
        "trained embeddings": {"modules_to_save": ["embed_tokens"]},
        "some trained tokens": {"trainable_token_indices": [5, 6, 7]},
        "adapted embeddings": {"target_modules": ["embed_tokens"]},
        "all linear layers": {"target_modules": "all-linear"},
        "parameters": {"target_parameters": ["model.layers.0.self_attn.q_proj.weight"], "target_modules": ["v_proj"]},
        "one layer": {"layers_to_transform": [0]},
        "its own biases": {"lora_bias": True},
        "ranks by module": {"rank_pattern": {"q_proj": 2}},
        "after some tokens": {"alora_invocation_tokens": [7, 8]},
        "monteclora": {"monteclora_config": {}},
        "velora": {"velora_config": {}},
        "in blocks": {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}},
    }
    NEED_TASKS = {"MULTITASK_PROMPT_TUNING", "POLY"}  # so that the adapted model is not run

    def compare(self, kind, made, options):
        """The adapter is trained first: most begin as the base model, and turning them off would change nothing."""
        plain, names = tiny.model(), get_type_hints(made)
        if "target_modules" in names:
            options = {"target_modules": ["gate_proj"] if "feedforward_modules" in names else ["q_proj"], **options}
        if "feedforward_modules" in names:
            options["feedforward_modules"] = ["gate_proj"]
        if "num_virtual_tokens" in names:
            options["num_virtual_tokens"] = 4
        options = {"task_type": "CAUSAL_LM", **options, **self.SIZES.get(kind, {})}
        ids = torch.arange(5, 40)[None]
        with torch.no_grad():
            expected = plain(input_ids=ids).logits
            model = get_peft_model(plain, made(**options))
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
            if kind not in {*self.NEED_TASKS, "SHADOW"}:
                assert not torch.allclose(model(input_ids=ids).logits[:, -35:], expected), "the adapter does nothing"
            reference = borrow(model)
            with reference.scoring(record=False):
                assert torch.equal(reference.model(input_ids=ids).logits, expected)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("kind", "made", "field", "value"), list(adapters()))
    def test_accepted_adapters_leave_the_base_model_unchanged(self, kind, made, field, value):
        self.compare(kind, made, {field: value} if field else {})

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("option", OPTIONS)
    def test_options_of_lora_leave_the_base_model_unchanged(self, option):
        known = get_type_hints(LoraConfig)
        if missing := self.OPTIONS[option].keys() - known:
            pytest.skip(f"this PEFT has no {missing}")
        self.compare("LORA", LoraConfig, dict(self.OPTIONS[option]))

    @pytest.mark.parametrize("kind", sorted(_types() - ADAPTERS))
    def test_other_types_of_peft_are_refused(self, kind):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
        model.peft_config["default"].peft_type = kind
        with pytest.raises(XTFUserError, match=f"peft_type='{kind}'"):
            borrow(model)

    def test_variants_of_lora_that_change_the_base_or_are_unknown_are_refused(self):
        variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
        for name in variants - VARIANTS:
            model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
            setattr(model.peft_config["default"], name, {"beta": 1.0})
            with pytest.raises(XTFUserError, match=f"{name}=.*Legal: None.*reference.model"):
                borrow(model)

    def test_kasa_is_refused(self):
        if "kasa_config" not in get_type_hints(LoraConfig):
            pytest.skip("this PEFT has no KaSA")
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"], kasa_config={}))
        with pytest.raises(XTFUserError, match="kasa_config"):
            borrow(model)

    @pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "unknown"])
    def test_initialisations_that_change_the_base_or_are_unknown_are_refused(self, value):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
        model.peft_config["default"].init_lora_weights = value
        with pytest.raises(XTFUserError, match=f"init_lora_weights='{value}'.*Legal: True, False, .*reference.model"):
            borrow(model)

    def test_a_pissa_model_is_refused(self):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
        with pytest.raises(XTFUserError, match="pissa"):
            borrow(model)

    def test_an_unknown_type_is_refused(self):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
        model.peft_config["default"].peft_type = "OF_TOMORROW"
        with pytest.raises(XTFUserError, match="peft_type='OF_TOMORROW'.*LORA.*reference.model"):
            borrow(model)


def test_borrow_scores_the_base_model_under_a_trained_adapter():
    from peft import LoraConfig, get_peft_model

    documents = collect(rows())
    plain, _ = run(documents, tiny.model(), (1,))
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    frozen = {name for name, p in model.named_parameters() if "lora_A" in name}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    found = {}

    def sink(records):
        found.update((key, each.logprobs) for key, each in by_document(records))

    engine.score(documents, np.arange(len(documents)), borrow(model), (1,), sink, progress=False)
    for key, records in plain.items():
        np.testing.assert_allclose(found[key], records.logprobs, atol=1e-5)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in frozen)


def gpt_oss():
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=500,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GptOssForCausalLM(config).eval()


def test_attention_sinks_are_refused_by_name():
    with pytest.raises(XTFError, match="s_aux.*scorer: attention_received"):
        run(collect(rows()), gpt_oss(), (1,))
    found, _ = run(collect(rows()), gpt_oss(), ())
    assert len(found) == 6, "without reasoning importance the model's own attention is used"


def test_a_mask_that_is_not_causal_is_refused_by_name():
    """A model whose tokens attend to later ones (prefix LM) would get wrong scores without an error."""
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    original = modeling_llama.create_causal_mask

    def looking_ahead(*args, **kwargs):
        return original(*args, **kwargs, or_mask_function=lambda b, h, q, k: k < 5)

    modeling_llama.create_causal_mask = looking_ahead
    try:
        with pytest.raises(XTFError, match="neither causal nor a causal sliding window"):
            run(collect(rows()), tiny.model(), (1,))
    finally:
        modeling_llama.create_causal_mask = original
    assert masking_utils.create_causal_mask is original


def test_a_layer_that_bypasses_the_attention_interface_is_refused_by_name(monkeypatch):
    from transformers.models.llama import modeling_llama

    attention = modeling_llama.LlamaAttention.forward

    def own_attention(self, hidden_states, *args, **kwargs):
        if self.layer_idx == 1:
            return hidden_states, None
        return attention(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", own_attention)
    with pytest.raises(XTFError, match=r"only layers \[0\] of 2"):
        run(collect(rows()), tiny.model(), (0,))


def test_the_first_token_id_without_an_embedding_is_refused():
    reference = Reference(tiny.model(), "tiny")
    rows = reference.embeddings.weight.shape[0]
    reference.check_ids(rows - 1)
    with pytest.raises(XTFError, match=f"token id {rows}, but tiny has only {rows} embeddings"):
        reference.check_ids(rows)
