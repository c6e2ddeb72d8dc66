"""A trainer that cannot be masked, or is no longer masked as planned, stops with a reason."""

from __future__ import annotations

import pytest
import torch
from datasets import IterableDataset

from tests import streams, tiny
from tests.made_scores import DROPS, odd_sentences
from tests.streams import attached
from tests.training.test_callback import trainer
from xtf_plugin import XTFDataCollator, XTFDryRun, XTFError, XTFUserError, attach
from xtf_plugin.scoring.distributed import Ranks
from xtf_plugin.scoring.providers import SeparateReference
from xtf_plugin.training import callback, verification


class TestRefusals:
    def test_attaching_twice(self, tmp_path):
        made = attach(trainer(tmp_path), True)
        with pytest.raises(XTFError, match="attached to this trainer already"):
            attach(made, True)

    def test_streaming(self, tmp_path):
        made = trainer(tmp_path)
        made.train_dataset = IterableDataset.from_generator(lambda: iter([{"input_ids": [1], "labels": [1]}]))
        with pytest.raises(XTFUserError, match="streamed"):
            attach(made, True)

    def test_images_that_reach_the_collator(self, tmp_path):
        made = trainer(tmp_path)
        made.train_dataset = made.train_dataset.add_column("images", [[0]] * len(made.train_dataset))
        made._signature_columns = ["messages", "images"]  # TRL's, for a dataset of images
        with pytest.raises(XTFUserError, match="rows have images"):
            attach(made, True)
        assert not hasattr(made, "_xtf_hooks")

    def test_not_a_trainer(self):
        with pytest.raises(XTFUserError, match="needs a transformers Trainer"):
            attach(object(), True)

    def test_rows_without_labels(self, tmp_path):
        made = attach(trainer(tmp_path), True)
        made.train_dataset = made.train_dataset.remove_columns("labels")
        with pytest.raises(XTFUserError, match="no column.*labels"):
            made.train()

    def test_dataset_changed_after_it_was_read(self, tmp_path):
        made = attach(trainer(tmp_path), {"cache_dir": str(tmp_path / "cache")})
        loader = made.get_train_dataloader
        changed = made.train_dataset.map(lambda row: {"input_ids": [7, *row["input_ids"][1:]]})

        def other_rows():
            original, made.train_dataset = made.train_dataset, changed
            try:
                return loader()
            finally:
                made.train_dataset = original

        made.get_train_dataloader = other_rows
        with pytest.raises(XTFError, match="was not scored"):
            made.train()

    def test_collator_replaced_after_attaching(self, tmp_path):
        """The dataloader is built without our hook: the first batch carries other labels, and the run stops."""
        made = attach(trainer(tmp_path), {"cache_dir": str(tmp_path / "cache"), **DROPS})
        del made.get_train_dataloader
        with pytest.raises(XTFError, match="does not carry the planned labels"):
            made.train()

    def test_callback_removed(self, tmp_path):
        made = attach(trainer(tmp_path), True)
        made.pop_callback(made._xtf_hooks)
        with pytest.raises(XTFError, match="no masks|nothing was scored"):
            made.train()

    def test_a_batch_whose_labels_are_gone(self, tmp_path):
        """A collator may leave them out later than in the two rows that it is tried on."""
        made = trainer(tmp_path, max_steps=1)
        attach(made, {"cache_dir": str(tmp_path / "cache"), **DROPS})
        made.train()
        hooks = made._xtf_hooks.on_batch.__self__
        with pytest.raises(XTFError, match="the training batch has no `labels`"):
            hooks.on_batch({"input_ids": torch.ones(1, 4, dtype=torch.int64)})

    def test_nan_weights(self, tmp_path):
        model = tiny.model()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        made = attach(trainer(tmp_path, model=model), {"cache_dir": str(tmp_path / "cache")})
        with pytest.raises(XTFError, match="NaN or infinite log-prob"):
            made.train()

    def test_no_row_left(self, tmp_path):
        rows = [{"prompt": "a " * 400, "completion": " b"}] * 4
        with pytest.raises(XTFUserError, match="no row of the training data is left.*max_length"):
            attach(trainer(tmp_path, rows=rows, max_length=16), True)

    def test_everything_dropped(self, tmp_path):
        drop_all = {
            "preset": "none",
            "knowledge_novelty": {"drop": {"unknown_below": 0.999}},
            "protect": {"special_tokens": False, "formats": None},
            "min_kept": 0,
            "cache_dir": str(tmp_path / "cache"),
        }
        with pytest.raises(XTFUserError, match="drop every one.*min_kept"):
            attach(trainer(tmp_path), drop_all).train()
        assert (tmp_path / "out/xtf/scores.parquet").is_file(), "what was scored is kept, to look at"

    def test_ranks_that_do_not_all_end_with_a_dry_run(self, tmp_path, monkeypatch):
        """One that has ended would leave the others waiting."""
        agreed, agree = [], Ranks.agree
        monkeypatch.setattr(Ranks, "agree", lambda self, *facts: agreed.append(facts) or agree(self, *facts))
        monkeypatch.setenv("XTF_DRY_RUN", "1")
        with pytest.raises(XTFDryRun):
            attach(trainer(tmp_path), {"cache_dir": str(tmp_path / "cache")}).train()
        monkeypatch.delenv("XTF_DRY_RUN")
        attach(trainer(tmp_path), {"cache_dir": str(tmp_path / "cache")}).train()
        assert [facts for facts, what in agreed if what == "XTF_DRY_RUN"] == [b"True", b"False"]

    def test_several_processes_that_nothing_connects(self, tmp_path, monkeypatch):
        made = trainer(tmp_path)
        monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self: 2))
        with pytest.raises(XTFUserError, match="not connected by torch.distributed"):
            attach(made, DROPS)


def test_a_separate_reference_is_made_beside_a_heartbeat(tmp_path, monkeypatch):
    """It reads files and tokenises: how long that takes differs from rank to rank."""
    inside, run = [], Ranks.run_with_heartbeat

    def watched(self, work):
        inside.append(True)
        try:
            return run(self, work)
        finally:
            inside.pop()

    class Reference(SeparateReference):
        def __init__(self, *args):
            assert inside
            super().__init__(*args)

    monkeypatch.setattr(Ranks, "run_with_heartbeat", watched)
    monkeypatch.setattr(callback, "SeparateReference", Reference)
    folder = tiny.save_base(tmp_path / "reference")
    block = {"reference": {"model": str(folder), "quantization": "none"}, "cache_dir": str(tmp_path / "cache")}
    assert attach(trainer(tmp_path), block).train().global_step == 2


def test_masks_that_are_not_applied_are_noticed_when_a_batch_should_lose_labels(tmp_path, monkeypatch):
    """One row of 24 has something to drop: the batches before it look as planned whether masks are applied or not."""
    rows = [*tiny.problems(20), {"prompt": "Who?", "completion": " Sure, Zoe. It is 12."}, *tiny.problems(3, seed=8)]
    block = {"preset": "none", "force_drop": ["Zoe"], "cache_dir": str(tmp_path / "cache")}
    made = attach(trainer(tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=24), block)
    monkeypatch.setattr(XTFDataCollator, "__call__", lambda self, features: self.inner(features))
    with pytest.raises(XTFError, match="does not carry the planned labels"):
        made.train()
    assert made.state.global_step > 0


@pytest.mark.parametrize(("steps", "warns"), [(1, True), (24, False)])
def test_a_training_without_proof_of_masks_warns(tmp_path, caplog, steps, warns):
    rows = [*tiny.problems(20), {"prompt": "Who?", "completion": " Sure, Zoe. It is 12."}, *tiny.problems(3, seed=8)]
    block = {"preset": "none", "force_drop": ["Zoe"], "cache_dir": str(tmp_path / "cache")}
    attach(trainer(tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=steps), block).train()
    assert ("nothing has shown that the model received the masks" in caplog.text) is warns


def test_a_stream_without_proof_of_masks_warns(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(verification, "verify_batch", lambda *_: 0)
    attached(tmp_path, streams.trainer(tmp_path, max_steps=2), {**odd_sentences(), "calibration": 8}).train()
    assert "nothing has shown that the model received the masks" in caplog.text


def test_a_stream_whose_dataloader_bypasses_the_hook_warns(tmp_path, caplog):
    """The rows that are trained on have nothing to drop, but the sample has."""
    drop = {"scorer": "typicality", "scope": "document", "drop": {"quantile": 0.03}}
    block = {"preset": "none", "selectors": {"odd": drop}, "calibration": 40}
    made = attached(tmp_path, streams.trainer(tmp_path, per_device_train_batch_size=1, max_steps=2), block)
    del made.get_train_dataloader
    made.train()
    assert "nothing has shown that the model received the masks" in caplog.text
