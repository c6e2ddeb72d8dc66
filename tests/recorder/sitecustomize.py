"""On PYTHONPATH, makes every Trainer of a stock command write down which labels its steps were given.

Independent of the package: it reads what the model is about to be trained or evaluated on. One line of JSON per
document and step in `$RECORD.<rank>`, for evaluation in `$RECORD.eval.<rank>`: the token ids, and the positions that
carry a label. `$PRETEND` (`name==version`) makes a distribution look like another version of itself; `$SEED` seeds
PyTorch when it is imported, for hosts that make an adapter before they seed.
"""

import json
import os
import sys
from importlib import metadata

from xtf_plugin.hosts.boot import when_imported


def documents(inputs):
    """Token ids and labelled positions of each document of a batch: padding away, packed rows cut."""
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        labels = inputs["labels"][row].tolist()
        mask = inputs["attention_mask"][row].tolist() if inputs.get("attention_mask") is not None else [1] * len(ids)
        places = inputs["position_ids"][row].tolist() if inputs.get("position_ids") is not None else None
        starts = [0]
        if places is not None and sum(place == 0 for place, real in zip(places, mask, strict=True) if real) > 1:
            starts = [at for at, place in enumerate(places) if place == 0 and mask[at]]
        for low, high in zip(starts, [*starts[1:], len(ids)], strict=True):
            real = [at for at in range(low, high) if mask[at]]
            # position 0 of a document is predicted by nothing, and padding-free collators blank it
            kept = [at - low for at in real if labels[at] != -100 and at > low]
            yield {"ids": [ids[at] for at in real], "kept": kept}


def watch(name, suffix):
    trainer = sys.modules["transformers.trainer"].Trainer
    step = getattr(trainer, name)
    if hasattr(step, "recorded"):
        return

    def recorded(self, model, inputs, *args, **kwargs):
        with open(f"{os.environ['RECORD']}{suffix}.{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as file:
            for document in documents(inputs):
                file.write(json.dumps(document) + "\n")
        return step(self, model, inputs, *args, **kwargs)

    recorded.recorded = True
    setattr(trainer, name, recorded)


def at_the_first_trainer(module):
    """A trainer makes its callback handler first, before anything could have taken hold of its methods."""
    init = module.CallbackHandler.__init__

    def __init__(self, *args, **kwargs):
        watch("training_step", "")
        watch("prediction_step", ".eval")
        init(self, *args, **kwargs)

    module.CallbackHandler.__init__ = __init__


def pretend(name, version):
    """Tell everybody that asks for the version of a distribution another one."""
    own = metadata.version
    metadata.version = lambda distribution: version if distribution == name else own(distribution)


if "PRETEND" in os.environ:
    pretend(*os.environ["PRETEND"].split("=="))
if "SEED" in os.environ:
    when_imported("torch", lambda torch: torch.manual_seed(int(os.environ["SEED"])))
if "RECORD" in os.environ:
    when_imported("transformers.trainer_callback", at_the_first_trainer)
