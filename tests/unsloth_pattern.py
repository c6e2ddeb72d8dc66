"""Doubles of what Unsloth does to trainers and models, in our own words; for tests/training/test_unsloth_pattern.py.

They follow Unsloth 2026.10: it rewrites TRL's SFTTrainer as `UnslothSFTTrainer`, directly under TRL's base class and
with a `train` on the instance; rows come out of it without labels, and `train_on_responses_only` puts labels and a
collator there afterwards; attention and losses of a model are replaced for its whole class. What needs its GPU kernels
cannot be run on a CPU and has a double only.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType, ModuleType

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerControl
from transformers.models.llama import modeling_llama
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from tests import tiny

ASK, ANSWER = "<|im_start|>user\n", "<|im_start|>assistant\n"


def texts(n=12):
    """Rows of chat text; the last one has no answer."""
    render = tiny.tokenizer().apply_chat_template
    rows = [{"text": render(row["messages"], tokenize=False)} for row in tiny.conversations(n - 1)]
    return [*rows, {"text": "<|im_start|>user\nNobody answers.<|im_end|>\n"}]


def sft(tmp_path, cls=SFTTrainer, data=None, model=None, **options):
    """A small trainer of one epoch on a CPU."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no", **options}
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, logging_steps=1, **settings)
    data = Dataset.from_list(texts()) if data is None else data
    return cls(model or tiny.model(), args=args, train_dataset=data, processing_class=tiny.tokenizer())


def train_on_responses_only(trainer, instruction_part=ASK, response_part=ANSWER):
    """Give the trainer's rows labels where an answer stands, drop rows without one, pad labels from now on."""
    tokenizer = trainer.processing_class
    begin, end = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (response_part, instruction_part))

    def labelled(row):
        ids, labels, answering = row["input_ids"], [], False
        for at, token in enumerate(ids):
            if ids[at : at + len(end)] == end:
                answering = False
            labels.append(token if answering else -100)
            if at + 1 >= len(begin) and ids[at + 1 - len(begin) : at + 1] == begin:
                answering = True
        return {"labels": labels}

    rows = trainer.train_dataset.map(labelled)
    trainer.train_dataset = rows.filter(lambda row: any(label != -100 for label in row["labels"]))
    if not isinstance(trainer.data_collator, DataCollatorForSeq2Seq):
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
    return trainer


def modules():
    """What stands in `sys.modules` for Unsloth, as far as its documentation here imports it."""
    found = {name: ModuleType(name) for name in ("unsloth", "unsloth.chat_templates")}
    found["unsloth.chat_templates"].train_on_responses_only = train_on_responses_only
    return found


def rewritten(name="SFTTrainer", source=sft_trainer):
    """`Unsloth<name>`: a trainer of the installed TRL under another name, in a module of its own, no subclass of it."""
    text = inspect.getsource(getattr(source, name)).replace(f"class {name}(", f"class _Unsloth{name}(", 1)
    namespace = {**vars(source), "__name__": f"Unsloth{name}"}
    exec(compile(text, f"Unsloth{name}", "exec"), namespace)

    class Anew(namespace[f"_Unsloth{name}"]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.train = MethodType(in_training_mode(type(self).train), self)

        def _prepare_dataset(self, dataset, processing_class, *_, **__):
            return dataset.map(lambda row: processing_class(row["text"]), remove_columns=dataset.column_names)

        def training_step(self, *args, **kwargs):
            with torch.enable_grad():
                return super().training_step(*args, **kwargs)

    Anew.__name__ = Anew.__qualname__ = f"Unsloth{name}"
    Anew.__module__ = namespace["__name__"]
    return Anew


def in_training_mode(train):
    def wrapper(self, *args, **kwargs):
        if hasattr(self.model, "for_training"):
            self.model.for_training()
        return train(self, *args, **kwargs)

    return wrapper


def own_attention(self, hidden_states, position_embeddings=None, **_):
    """An attention of a Llama's that asks neither transformers' attention interface nor its mask."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        projection(hidden_states).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class NoLogits:
    """What stands in an output in the place of logits that were never made; every use of it is an error."""

    def __getattr__(self, name):
        raise NotImplementedError("logits are empty")

    def __getitem__(self, index):
        raise NotImplementedError("logits are empty")


def without_logits(forward, always=False):
    """A causal LM's forward that gives no logits where it was given labels (or never)."""

    @functools.wraps(forward)  # trainers ask for its arguments
    def wrapper(self, *args, labels=None, **kwargs):
        output = forward(self, *args, labels=labels, **kwargs)
        if always or labels is not None:
            output.logits = NoLogits()
        return output

    return wrapper


class OwnStep(SFTTrainer):
    """Takes its training step without any other class's help."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoss(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnLoop(Trainer):
    """Its batches come from the trainer's dataloader, its steps from nowhere."""

    def train(self, *_, **__):
        control, loader = TrainerControl(), self.get_train_dataloader
        self.callback_handler.on_train_begin(self.args, self.state, control)
        for inputs in loader():
            self.model(**inputs).loss.backward()
            self.state.global_step += 1
            self.callback_handler.on_step_end(self.args, self.state, control)


class NoCallbacks(Trainer):
    """Makes its own batches, which no hook sees."""

    def train(self, *_, **__):
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)
        for inputs in loader:
            self.model(**inputs).loss.backward()


class NoCallbacksButTheLoader(Trainer):
    def train(self, *_, **__):
        next(iter(self.get_train_dataloader()))
