"""A tiny model split between ranks by FSDP2 on the CPU: what it scores, in how many forwards, and a step after it."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests import tiny
from tests.test_plan import rows
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import distributed, engine
from xtf_plugin.scoring.engine import gather_vectors
from xtf_plugin.scoring.reference import Reference, ShardedReference, borrow


def sharded(ranks, adapters):
    """A tiny model under FSDP2 on the CPU, the decoder's layers and the whole, with adapters or without."""
    base = tiny.model()
    model = base
    if adapters:
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    borrowed = borrow(model)
    mesh = init_device_mesh("cpu", (ranks.size,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    reference = ShardedReference(borrowed.model, "tiny", borrowed.adapters_off, root=model)
    return model, reference


@contextmanager
def counted(reference):
    calls = []
    hook = reference.decoder.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def fsdp(ranks, folder, adapters, scored):
    """Unequal numbers of batches: 5 documents over 2 ranks, one of them far longer than the others."""
    data = rows(4)
    data.append({name: data[0][name] * 5 for name in ("input_ids", "labels")})
    documents = collect(data)
    model, reference = sharded(ranks, adapters)
    with counted(reference) as calls:
        found = scored(ranks, folder / f"fsdp-{adapters}-{ranks.rank}", documents, lambda: reference, budget=45)
    split = isinstance(reference.embeddings.weight, DTensor)
    lengths = documents.lengths
    of = distributed.share_out(lengths, ranks.size)
    own = len(list(engine.plan_batches(lengths[of == ranks.rank], 45)))
    ids = np.arange(20)
    vectors = gather_vectors(reference, ids, "input"), gather_vectors(reference, ids, "output")
    plain = Reference(tiny.model(), "tiny")
    expected = gather_vectors(plain, ids, "input"), gather_vectors(plain, ids, "output")
    gap = max(float((a - b).abs().max()) for a, b in zip(vectors, expected, strict=True))
    # training goes on from the shards: one step, then a forward that must see its result
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {**found, "forwards": len(calls), "batches": own, "vectors": gap, "losses": losses, "split": split}
