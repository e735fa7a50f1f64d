"""Run by ``torchrun``: some steps of training for each case; every process writes what it ended with.

torchrun --nproc_per_node 2 tests/distributed_steps.py BERT_FOLDER OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from conftest import LABELS, POSITIVES, make_bert_encoder
from datasets import Dataset

from hf_xmc import XMCTrainer, XMCTrainingArguments, losses, sharding

GLOBAL_BATCH = 6  # of 13 queries, against 11 labels
CASES = {
    "decoupled": (losses.DecoupledSoftmaxLoss, {}),
    "decoupled in chunks": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 2}),
    "decoupled, accumulated": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 3, "gradient_accumulation_steps": 2}),
    "softmax": (losses.SoftmaxLoss, {}),
    "soft top-k": (losses.SoftTopKLoss, {"label_chunk_size": 2}),
    "bce": (losses.BCELoss, {}),
}


def train(bert_folder, folder, loss, settings, world_size):
    queries = Dataset.from_dict(
        {
            "text": [f"text {i} about {' and '.join(LABELS[p] for p in ids)}" for i, ids in enumerate(POSITIVES)],
            "label_ids": POSITIVES,
            "label_scores": [[1.0 + i % 3 for i in ids] for ids in POSITIVES],
        }
    )
    args = XMCTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        dataloader_drop_last=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS, loss=loss())
    values = []
    trainer.loss.register_forward_hook(lambda module, inputs, output: values.append(output.item()))
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.loss.named_parameters()}
    return {"weights": weights, "losses": values, "world_size": trainer.accelerator.num_processes}


def collectives():
    """Ragged rows and columns, gathered; a gradient through the gathering; labels that do not divide."""
    rank, size = sharding.rank(), sharding.world_size()
    mine = torch.full((rank + 1, rank + 2), float(rank))
    queries = torch.full((rank + 1, 3), 1.0, requires_grad=True)
    gathered = sharding.gather_queries(queries)
    (gathered * (rank + 1) * torch.arange(len(gathered))[:, None]).sum().backward()
    return {"rows": sharding.gather_rows(mine, fill=-1), "gradient": queries.grad, "size": size}


def main(bert_folder, output_folder):
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = {}
    for name, (loss, settings) in CASES.items():
        results[name] = train(bert_folder, Path(output_folder) / "run", loss, settings, world_size)
    results["collectives"] = collectives()
    torch.save(results, Path(output_folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
