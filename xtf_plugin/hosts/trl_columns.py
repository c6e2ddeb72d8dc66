"""Reads columns of the data in TRL: `SFTTrainer._prepare_dataset` drops them when it packs, and cuts rows.

So the method is called twice. The first call tokenises and does nothing else, and its rows still have all columns. The
second one gets these rows and cuts, packs and shuffles them, as it does for any dataset that is tokenised already.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from ..config.block import XTFConfig
from ..errors import XTFUserError
from ..training.columns import ATTRIBUTE, Pieces, read, reads_columns, texts_in

_NEEDED = {"dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"}
# settings with which the first call only tokenises
_NOTHING_ELSE = {"max_length": None, "shuffle_dataset": False, "use_liger_kernel": False}


def prepare(original: Any, config: XTFConfig, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `original`, TRL's `_prepare_dataset`; leave what the columns say at the trainer."""
    bound = inspect.signature(original).bind(trainer, *args, **kwargs)
    given = bound.arguments
    # without these, and for streams, the run is refused later: the rows that are trained on have no such column
    if not reads_columns(config) or not given.keys() >= _NEEDED or not isinstance(given["dataset"], Dataset):
        return original(trainer, *args, **kwargs)
    if given["dataset_name"] != "train":
        return original(trainer, *args, **kwargs)
    settings, packing = given["args"], given["packing"]
    pieces = _pieces(settings, packing)
    plain = copy.copy(settings)
    for name, value in _NOTHING_ELSE.items():
        setattr(plain, name, value)
    given |= {"args": plain, "packing": False}
    tokenised = original(*bound.args, **bound.kwargs)
    processing = given["processing_class"]
    tokenizer = getattr(processing, "tokenizer", processing)
    setattr(trainer, ATTRIBUTE, read(tokenised, config, tokenizer, pieces=pieces, texts=texts_in(settings)))
    given |= {"dataset": tokenised, "args": settings, "packing": packing, "formatting_func": None}
    return original(*bound.args, **bound.kwargs)


def _pieces(settings: Any, packing: bool) -> Pieces:
    """What TRL makes of a row's tokens: one document, or several if packing splits it."""
    longest, strategy = settings.max_length, settings.packing_strategy
    if packing and strategy not in ("bfd", "bfd_split"):
        raise XTFUserError(
            f"xtf: packing_strategy: {strategy} cuts rows at any place, so columns of the data no longer fit them. "
            "Use packing_strategy: bfd, or bfd_split."
        )

    def pieces(length: int) -> Iterable[slice]:
        if longest is None:
            return [slice(0, length)]
        if packing and strategy == "bfd_split":
            return [slice(start, start + longest) for start in range(0, length, longest)]
        return [slice(-longest, None) if settings.truncation_mode == "keep_end" and not packing else slice(0, longest)]

    return pieces
