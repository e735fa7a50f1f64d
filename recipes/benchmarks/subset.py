"""Reduce a data set to some of its labels and their queries, if the full data would take too long."""

import numpy as np
from datasets import Dataset

from hf_xmc import XMCData


def subset(data: XMCData, num_labels: int | None, seed: int = 0, max_share: float = 1.0) -> XMCData:
    """Return the data with ``num_labels`` labels, drawn from those of at most ``max_share`` of the queries.

    With a label that nearly every query has, P@1 would say nothing.
    """
    counts = data.label_counts()
    possible = np.flatnonzero((counts > 0) & (counts <= max_share * len(data.train)))
    if num_labels is None or num_labels >= len(possible):
        chosen = possible
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(possible, num_labels, replace=False))
    new_id = np.full(len(counts), -1)
    new_id[chosen] = np.arange(len(chosen))

    def part(split: Dataset) -> Dataset:
        kept = [[int(new_id[label]) for label in ids if new_id[label] >= 0] for ids in split["label_ids"]]
        rows = [row for row, ids in enumerate(kept) if ids]
        texts = split.select(rows)["text"]
        return Dataset.from_dict({"text": list(texts), "label_ids": [kept[row] for row in rows]})

    splits = {name: part(data.split(name)) for name in ("train", "validation", "test") if getattr(data, name)}
    return XMCData(labels=data.labels.select(np.flatnonzero(np.isin(data.label_of, chosen))), **splits)
