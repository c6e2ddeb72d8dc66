"""attach() on trainers and models that are changed as Unsloth changes them: a stock trainer's labels, or a refusal.

Unsloth itself is no dependency; `tests/unsloth_pattern.py` holds doubles of its pattern.
"""

from __future__ import annotations

import functools
from types import MethodType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainerCallback,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer

from tests import tiny
from tests import unsloth_pattern as pattern
from tests.hosts.test_other_hosts import made as plain_trainer
from tests.made_scores import odd_sentences
from tests.watch import watched
from xtf_plugin import XTFDryRun, XTFError, XTFUserError, attach

ATTENTION = {"preset": "paper", "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.2}}}
WITHOUT = {**odd_sentences(), "knowledge_novelty": {"drop": {"quantile": 0.1}}}
ROWS = len(pattern.texts())
sft, texts = pattern.sft, pattern.texts


def labelled_rows():
    """What the trainer's rows are once the responses have their labels."""
    data = Dataset.from_list([dict(tiny.tokenizer()(row["text"])) for row in texts()])
    data = data.select_columns(["input_ids", "attention_mask"])
    host = SimpleNamespace(train_dataset=data, processing_class=tiny.tokenizer(), data_collator=None)
    return pattern.train_on_responses_only(host).train_dataset


def block(tmp_path, of=ATTENTION):
    return {"cache_dir": str(tmp_path / "cache"), **of}


def labels(trainer):
    """Train, and give the positions with a label of every document that a step was given."""
    found = watched(trainer)
    trainer.train()
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The labels that stock trainers are given of the same rows, by block."""
    folder, data = tmp_path_factory.mktemp("stock"), labelled_rows()
    given = {
        name: labels(attach(sft(folder / name, data=data), block(folder / name, of)))
        for name, of in (("attention", ATTENTION), ("without", WITHOUT))
    }
    whole = sum(label != -100 for row in data for label in row["labels"])
    assert all(0 < sum(map(len, documents.values())) < whole for documents in given.values())
    return given


class TestLabelsGivenAfterwards:
    @pytest.mark.parametrize("cls", [SFTTrainer, pattern.rewritten()], ids=["SFTTrainer", "UnslothSFTTrainer"])
    @pytest.mark.parametrize("first", ["attach", "labels"])
    def test_labels_are_those_of_the_stock_trainer(self, tmp_path, stock, cls, first):
        rows = Dataset.from_list(texts()) if cls is not SFTTrainer else labelled_rows().remove_columns("labels")
        trainer = sft(tmp_path, cls, rows)
        assert not issubclass(cls, SFTTrainer) or cls is SFTTrainer
        if first == "attach":
            attach(trainer, block(tmp_path))
        pattern.train_on_responses_only(trainer)
        if first == "labels":
            attach(trainer, block(tmp_path))
        inner = type(trainer.data_collator)
        assert labels(trainer) == stock["attention"]
        assert inner is type(trainer.data_collator) is DataCollatorForSeq2Seq
        assert len(trainer.train_dataset) == ROWS - 1

    def test_never_given(self, tmp_path):
        trainer = attach(sft(tmp_path, pattern.rewritten()), block(tmp_path))
        with pytest.raises(XTFUserError, match=r"no column \['labels'\].*train_on_responses_only"):
            trainer.train()

    def test_a_collator_that_they_will_replace(self, tmp_path):
        trainer = sft(tmp_path, pattern.rewritten())
        trainer.data_collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
        with pytest.raises(XTFUserError, match="train_on_responses_only does both: attach xtf after it"):
            attach(trainer, block(tmp_path))

    def test_given_when_the_batches_are_under_way(self, tmp_path):
        """The dataloader has the rows as they were, the plan as they are now: no batch is made of both."""

        class Late(TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})

        trainer = sft(tmp_path, data=labelled_rows())
        trainer.add_callback(Late())
        with pytest.raises(XTFError, match="was not scored"):
            attach(trainer, block(tmp_path)).train()

    def test_another_rewritten_trainer(self, tmp_path):
        cls = pattern.rewritten("DPOTrainer", dpo_trainer)
        assert not issubclass(cls, DPOTrainer)
        host = cls.__new__(cls)
        with pytest.raises(XTFUserError, match="UnslothDPOTrainer is not supported: .* TRL's DPOTrainer may not"):
            attach(host, True)


class TestStepsOfATrainersOwn:
    @pytest.mark.parametrize("cls", [pattern.OwnStep, pattern.OwnLoss])
    def test_are_masked_and_counted(self, tmp_path, stock, cls):
        trainer = attach(sft(tmp_path, cls, labelled_rows()), block(tmp_path))
        found = labels(trainer)
        assert found == stock["attention"]
        logged = [entry["xtf/kept_tokens_per_batch"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 3 and sum(logged) == sum(map(len, found.values()))

    def test_under_a_step_that_is_replaced_for_all_trainers(self, tmp_path, stock, monkeypatch):
        own, steps = Trainer.training_step, []

        def replaced(self, model, inputs, *args, **kwargs):
            steps.append(int((inputs["labels"] != -100).sum()))
            return own(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", replaced)
        trainer = attach(sft(tmp_path, data=labelled_rows()), block(tmp_path))
        assert labels(trainer) == stock["attention"]
        assert sum(steps) == sum(map(len, stock["attention"].values()))

    @pytest.mark.parametrize(
        ("cls", "message"),
        [
            (pattern.OwnLoop, "a batch that xtf has not seen: OwnLoop does not train through its own training_step"),
            (pattern.NoCallbacks, r"NoCallbacks.train\(\) has trained without calling its callbacks"),
            (pattern.NoCallbacksButTheLoader, "training started before scoring"),
        ],
    )
    def test_that_bypass_the_hooks_end_in_an_error(self, tmp_path, cls, message):
        data = labelled_rows()
        trainer = attach(plain_trainer(tmp_path, data, cls=cls), block(tmp_path))
        with pytest.raises(XTFError, match=message):
            trainer.train()
        assert trainer.state.global_step <= 1


class TestAttentionOfItsOwn:
    @pytest.fixture
    def replaced(self, monkeypatch):
        """For all models of the class, as long as a test takes."""
        monkeypatch.setattr(LlamaAttention, "forward", pattern.own_attention)

    def test_cannot_be_recorded(self, tmp_path, replaced):
        trainer = attach(sft(tmp_path, data=labelled_rows()), block(tmp_path))
        message = r"none of 2 layers use .*Unsloth.*`reasoning_importance`\), or name another .*`reference.model`"
        with pytest.raises(XTFError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_in_one_layer_cannot_be_recorded(self, tmp_path):
        trainer = attach(sft(tmp_path, data=labelled_rows()), block(tmp_path))
        attention = trainer.model.model.layers[1].self_attn
        attention.forward = MethodType(pattern.own_attention, attention)
        with pytest.raises(XTFError, match=r"only layers \[0\] of 2 layers use"):
            trainer.train()

    def test_is_not_needed_by_what_asks_for_none(self, tmp_path, stock, replaced):
        trainer = attach(sft(tmp_path, data=labelled_rows()), block(tmp_path, WITHOUT))
        assert labels(trainer) == stock["without"]

    def test_default_preset(self, tmp_path, replaced):
        trainer = attach(sft(tmp_path, data=labelled_rows()), block(tmp_path, {}))
        assert len(labels(trainer)) == ROWS - 1
        assert (tmp_path / "xtf/summary.json").is_file()

    def test_a_separate_reference_is_recorded(self, tmp_path, stock):
        base = str(tiny.save_base(tmp_path / "base"))
        trainer = sft(tmp_path, data=labelled_rows())
        for layer in trainer.model.model.layers:
            layer.self_attn.forward = MethodType(pattern.own_attention, layer.self_attn)
        attach(trainer, block(tmp_path, {**ATTENTION, "reference": {"model": base, "quantization": "none"}}))
        assert labels(trainer) == stock["attention"]

    def test_scores_made_beforehand_are_found(self, tmp_path, stock, monkeypatch):
        """Where all models of a class are replaced, a separate reference is too: another process scores for this."""
        base = str(tiny.save_base(tmp_path / "base"))
        given = block(tmp_path, {**ATTENTION, "reference": {"model": base, "quantization": "none"}})
        with pytest.raises(XTFDryRun):
            attach(plain_trainer(tmp_path, labelled_rows()), {**given, "dry_run": True}).train()
        monkeypatch.setattr(LlamaAttention, "forward", pattern.own_attention)
        assert labels(attach(sft(tmp_path, data=labelled_rows()), given)) == stock["attention"]
        with pytest.raises(XTFError, match="none of 2 layers"):
            attach(sft(tmp_path, data=labelled_rows()), {**given, "cache_dir": str(tmp_path / "other")}).train()


class TestForwardsOfItsOwn:
    def test_without_logits_in_training(self, tmp_path, stock, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "forward", pattern.without_logits(LlamaForCausalLM.forward))
        trainer = attach(plain_trainer(tmp_path, labelled_rows()), block(tmp_path))
        assert labels(trainer) == stock["attention"]

    def test_without_logits_at_all(self, tmp_path, monkeypatch):
        own = LlamaForCausalLM.forward
        monkeypatch.setattr(LlamaForCausalLM, "forward", pattern.without_logits(own, always=True))
        with pytest.raises(XTFError, match="gives no logits .* NoLogits.*UNSLOTH_RETURN_LOGITS"):
            attach(plain_trainer(tmp_path, labelled_rows()), block(tmp_path)).train()

    def test_with_hidden_states_as_logits(self, tmp_path, monkeypatch):
        @functools.wraps(LlamaForCausalLM.forward)
        def forward(self, input_ids=None, **kwargs):
            return SimpleNamespace(logits=self.model(input_ids=input_ids, **kwargs).last_hidden_state)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        with pytest.raises(XTFError, match=r"gives no logits .*, 64\)"):
            attach(plain_trainer(tmp_path, labelled_rows()), block(tmp_path)).train()

    def test_that_make_the_decoder_causal(self, tmp_path, monkeypatch):
        """Called by itself the decoder looks ahead; the log-probabilities are not the model's, and it is refused."""

        def looks_ahead(self, *args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", uncausal)
                return decoder(self, *args, **kwargs)

        def uncausal(*args, is_causal=False, **kwargs):
            return attention(*args, is_causal=is_causal and bool(inside), **kwargs)

        @functools.wraps(LlamaForCausalLM.forward)
        def forward(self, *args, **kwargs):
            inside.append(True)
            try:
                return whole(self, *args, **kwargs)
            finally:
                inside.pop()

        inside, attention = [], torch.nn.functional.scaled_dot_product_attention
        decoder, whole = LlamaModel.forward, LlamaForCausalLM.forward
        monkeypatch.setattr(LlamaAttention, "forward", pattern.own_attention)
        monkeypatch.setattr(LlamaModel, "forward", looks_ahead)
        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        with pytest.raises(XTFError, match="log-probabilities differ from the model's own forward"):
            attach(plain_trainer(tmp_path, labelled_rows()), block(tmp_path, WITHOUT)).train()

    def test_that_cut_their_input_off(self, tmp_path, monkeypatch):
        own = LlamaModel.forward

        def forward(self, input_ids=None, **kwargs):
            return own(self, input_ids=input_ids[:, :100], **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", forward)
        with pytest.raises(XTFError, match=r"was given \d+ tokens and read 100: it cuts its input off"):
            attach(plain_trainer(tmp_path, labelled_rows()), block(tmp_path, WITHOUT)).train()
