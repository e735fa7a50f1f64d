"""Public objects can be pickled for spawned workers, and workers draw positives by the seed."""

import pickle

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, make_static_encoder
from sentence_transformers.base.data_collator import BaseDataCollator
from torch.utils.data import DataLoader

import hf_xmc
from hf_xmc import XMCTrainer, XMCTrainingArguments, in_batch_dataset, losses, st_losses

EPOCHS = 3


def trainer(rows, tmp_path, mode="exact"):
    args = XMCTrainingArguments(str(tmp_path), label_mode=mode, report_to="none", use_cpu=True, save_strategy="no")
    return XMCTrainer(make_static_encoder(), args, rows, labels=LABELS)


def test_public_objects_can_be_pickled(queries, encoder, tmp_path):
    GradientState._reset_state()  # it keeps weak references to the data loaders of runs that were interrupted
    model = hf_xmc.XMCModel(encoder, LABELS)
    model.remember(queries)
    model.calibrate(queries)
    data = hf_xmc.XMCData(queries, Dataset.from_dict({"text": LABELS}), test=queries)
    mined = trainer(queries, tmp_path, "mined")
    values = {
        "XMCModel": model,
        "TrainingMemory": model.memory,
        "MemorySettings": model.memory.settings,
        "Prediction": model.predict("a boat")[0],
        "Hierarchy": hf_xmc.Hierarchy({"1": ["0"]}),
        "LabelIndex": model.index,
        "FaissIndex": hf_xmc.FaissIndex(model.index.embeddings, "HNSW8"),
        "TopK": model.search(["a boat"], 3),
        "XMCData": data,
        "with_phrases": hf_xmc.with_phrases(data),
        "phrase_encoder": hf_xmc.phrase_encoder(hf_xmc.rewrite_phrases(LABELS), embedding_dim=8, device="cpu"),
        "XMCEvaluator": hf_xmc.XMCEvaluator.from_data(data, "test"),
        "XMCTrainingArguments": mined.args,
        "XMCTrainer": mined,
        "HardNegativeMiner": hf_xmc.HardNegativeMiner(mined),
        "XMCCollator": mined.data_collator,
        "train_dataset": mined.train_dataset,
        "InBatchCollator": hf_xmc.InBatchCollator(encoder.preprocess),
        "relevance_matrix": hf_xmc.relevance_matrix(queries, LABELS),
        **{f"negatives, {mode}": trainer(queries, tmp_path, mode).negatives for mode in ("exact", "fresh", "bank")},
        **{kind: in_batch_dataset(queries, LABELS, positives=kind) for kind in ("padded", "ragged", "row")},
        "hard negatives": in_batch_dataset(queries, LABELS, hard_negatives=np.zeros((13, 2), dtype=int)),
    }
    for name in ("DecoupledSoftmaxLoss", "SoftTopKLoss", "SoftmaxLoss", "BCELoss"):
        values[name] = getattr(losses, name)()
        values[f"{name}, in batch"] = getattr(st_losses, name)(encoder)
    for name, value in values.items():
        assert type(pickle.loads(pickle.dumps(value))) is type(value), name
    assert pickle.loads(pickle.dumps(model)).predict("boat", 1) == model.predict("boat", 1)
    for name in hf_xmc.__all__:
        if callable(value := getattr(hf_xmc, name)):
            assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize(("start", "workers"), [("spawn", 1), ("fork", 2)])  # to spawn one takes many seconds
def test_workers_draw_new_positives_each_epoch_by_the_seed(start, workers, encoder):
    """At least six rows a worker and an epoch, each a choice of 11 labels: by chance none would agree."""
    rows = Dataset.from_dict({"text": [f"text {number}" for number in range(12)], "label_ids": [list(range(11))] * 12})
    rows = in_batch_dataset(rows, LABELS)
    collator = BaseDataCollator(preprocess_fn=encoder.preprocess)
    loader = DataLoader(
        rows,
        batch_size=3,
        collate_fn=collator,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(7),
    )
    drawn = torch.stack([torch.cat([batch["label"][:, 0] for batch in loader]) for _ in range(EPOCHS)])
    by_worker = drawn.view(EPOCHS, -1, workers, 3).transpose(1, 2).flatten(2)  # batches take turns
    streams = by_worker.flatten(0, 1).tolist()
    assert len({tuple(stream) for stream in streams}) == EPOCHS * workers
    assert len(set(drawn.flatten().tolist())) > 5

    base = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(7)))
    for worker in range(workers):
        torch.manual_seed(base + worker)
        epochs = range(EPOCHS)
        again = [int(rows[row]["label"][0]) for _ in epochs for row in range(12) if row // 3 % workers == worker]
        assert again == by_worker[:, worker].flatten().tolist()


@pytest.mark.parametrize("kind", ["padded", "ragged", "row"])
def test_positives_are_the_same_for_the_same_seed(kind, queries):
    rows = in_batch_dataset(queries, LABELS, positives=kind)

    def draws(seed):
        torch.manual_seed(seed)
        return [rows[:]["positive"] for _ in range(4)]

    assert draws(0) == draws(0) != draws(1)
    assert len({tuple(epoch) for epoch in draws(0)}) == 4
    with_labels = [ids for ids in POSITIVES if ids]
    for epoch in draws(2):
        assert all(text in [LABELS[label] for label in ids] for text, ids in zip(epoch, with_labels, strict=True))
