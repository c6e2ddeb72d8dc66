"""Makes a stream before anything else.

The class of streams in `datasets` becomes torch's IterableDataset, too, when the first one is made. If anything asks
before that whether it is one, Python remembers the answer, and DataLoaders of the process take no stream any more.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("datasets"):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
