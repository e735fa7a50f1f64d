"""Run by ``torchrun``: some steps of training for each case; every process writes what it ended with.

PYTHONPATH=tests torchrun --nproc_per_node 2 tests/helpers/distributed_steps.py BERT_FOLDER OUTPUT_FOLDER
"""

import copy
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.tiny import (
    LABELS,
    POSITIVES,
    make_bert_encoder,
    make_heads,
    make_router,
    make_router_with_frozen_labels,
    make_static_encoder,
    several_texts,
)
from hf_xmc import HardNegativeMiner, XMCTrainer, XMCTrainingArguments, distributed, losses
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.negatives import BatchQueries

GLOBAL_BATCH, STEPS = 6, 6  # of 13 queries, against 11 labels
TWICE = {"gradient_accumulation_steps": 2}
TOWERS = {"encoder": make_router, "router_mapping": {"text": "query"}}  # one for queries and one for labels
FROZEN = {**TOWERS, "encoder": make_router_with_frozen_labels}
TEXTS = {"labels": several_texts()[0]}
CASES = {
    "decoupled": (losses.DecoupledSoftmaxLoss, {}),
    "decoupled in chunks": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 2}),
    "decoupled, accumulated": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 3, **TWICE}),
    "softmax": (losses.SoftmaxLoss, {"label_chunk_size": 3}),
    "softmax, accumulated": (losses.SoftmaxLoss, {"label_chunk_tokens": 7, **TWICE}),
    "soft top-k": (losses.SoftTopKLoss, {"label_chunk_size": 2}),
    "soft top-k, accumulated": (losses.SoftTopKLoss, {"label_chunk_size": 4, **TWICE}),
    "bce": (losses.BCELoss, {}),
    "bce, accumulated": (losses.BCELoss, {"label_chunk_size": 3, **TWICE}),
    "fresh": (losses.SoftTopKLoss, {"label_mode": "fresh", "label_sample_fraction": 1.0, "label_chunk_size": 2}),
    "fresh, accumulated": (losses.BCELoss, {"label_mode": "fresh", "label_sample_fraction": 1.0, **TWICE}),
    "bank": (losses.DecoupledSoftmaxLoss, {"label_mode": "bank", "label_sample_fraction": 1.0, "label_chunk_size": 3}),
    "mined": (losses.SoftmaxLoss, {"label_mode": "mined", "num_hard_negatives": 11, "label_chunk_size": 2}),
    "two towers": (losses.DecoupledSoftmaxLoss, {"label_mode": "exact", **TOWERS}),
    "two towers in chunks, accumulated": (losses.SoftTopKLoss, {"label_chunk_size": 2, **TOWERS, **TWICE}),
    "two towers, fresh": (losses.DecoupledSoftmaxLoss, {"label_mode": "fresh", "label_sample_fraction": 1.0, **TOWERS}),
    "two towers, labels frozen": (losses.DecoupledSoftmaxLoss, {"label_mode": "exact", **FROZEN}),
    "two towers, labels frozen, fresh": (losses.DecoupledSoftmaxLoss, {"label_mode": "fresh", **FROZEN}),
    "two heads": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 2, **TOWERS, "encoder": make_heads}),
    "texts": (losses.SoftTopKLoss, {"label_chunk_size": 3, **TEXTS, **TWICE}),
    "texts, fresh": (
        losses.BCELoss,
        {"label_mode": "fresh", "label_sample_fraction": 1.0, "label_chunk_size": 2, **TEXTS},
    ),
    "texts, bank": (losses.SoftmaxLoss, {"label_mode": "bank", "label_sample_fraction": 1.0, **TEXTS}),
    "texts, mined": (losses.DecoupledSoftmaxLoss, {"label_mode": "mined", "num_hard_negatives": 11, **TEXTS}),
    "two towers, bank": (losses.SoftmaxLoss, {"label_mode": "bank", "label_sample_fraction": 1.0, **TOWERS, **TWICE}),
}
STATIC = {
    "encoder": lambda bert_folder: make_static_encoder(),
    "label_mode": "sampled",
    "label_sample_fraction": 1.0,
    "sparse_updates": True,
    "optim": XMCTrainingArguments.__dataclass_fields__["optim"].default,
}
CASES["static, sampled"] = losses.DecoupledSoftmaxLoss, STATIC
CASES["static, sampled, accumulated"] = losses.SoftmaxLoss, {**STATIC, "label_chunk_size": 3, **TWICE}
CASES["label vectors"] = losses.DecoupledSoftmaxLoss, {"label_vectors": 0.5, **TWICE}
CASES["label vectors, texts, mined"] = (
    losses.DecoupledSoftmaxLoss,
    {"label_mode": "mined", "num_hard_negatives": 11, "label_vectors": 0.5, **TEXTS},
)
CASES["static, sampled, label vectors"] = losses.DecoupledSoftmaxLoss, {**STATIC, "label_vectors": 0.5, **TWICE}
VOTES = {"vote_loss": 0.5, "vote_queries": 0}  # of the batch alone, because each process draws its own further queries
CASES["votes"] = losses.SoftmaxLoss, {**VOTES, **TWICE}
CASES["static, sampled, votes"] = losses.DecoupledSoftmaxLoss, {**STATIC, **VOTES}
RAGGED = {"label_chunk_size": 2, "dataloader_drop_last": False}


def queries():
    return Dataset.from_dict(
        {
            "text": [f"text {i} about {' and '.join(LABELS[p] for p in ids)}" for i, ids in enumerate(POSITIVES)],
            "label_ids": POSITIVES,
            "label_scores": [[1 + i % 3 for i in ids] for ids in POSITIVES],  # whole numbers, as grades are
        }
    )


class Recorder(TrainerCallback):
    """The gradients of the first update, and every loss."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.losses, self.batches = trainer, None, [], []
        compute_loss = trainer.compute_loss

        def recorded(model, inputs, *args, **kwargs):
            self.batches.append(copy.deepcopy(inputs))
            loss = compute_loss(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

        trainer.compute_loss = recorded

    def on_pre_optimizer_step(self, *args, **kwargs):
        if self.gradients is None:
            named = self.trainer.loss.named_parameters()
            self.gradients = {name: p.grad.clone().to_dense() for name, p in named if p.grad is not None}


def make_encoder(bert_folder, settings):
    return settings.get("encoder", make_bert_encoder)(bert_folder)


def train(bert_folder, folder, loss, settings, world_size, rows=None):
    encoder = make_encoder(bert_folder, settings)
    labels = settings.get("labels", LABELS)
    settings = {name: value for name, value in settings.items() if name not in ("encoder", "labels")}
    args = XMCTrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": GLOBAL_BATCH // world_size,
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "dataloader_drop_last": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "label_mode": "exact",
            **settings,
        },
    )
    trainer = XMCTrainer(encoder, args, rows or queries(), labels=labels, loss=loss())
    if args.label_mode == "mined" and args.num_hard_negatives:
        trainer.add_callback(HardNegativeMiner(trainer, depth=11))
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return {
        "weights": {name: p.detach() for name, p in trainer.loss.named_parameters()},
        "gradients": recorder.gradients,
        "losses": recorder.losses,
        "batches": recorder.batches,
        "world_size": trainer.accelerator.num_processes,
        "vectors": trainer.label_vectors(),
        "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    }


def clipped_vectors(bert_folder, folder, world_size):
    """Updates whose norm, over the vectors of all processes, is above the maximum."""
    settings = {"label_vectors": 0.5, "max_grad_norm": 0.05, "logging_steps": 1}
    return train(bert_folder, folder, losses.DecoupledSoftmaxLoss, settings, world_size)


def one_label(bert_folder, folder, world_size):
    """Queries of one label, and no negatives: fewer labels in a step than there are processes."""
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(GLOBAL_BATCH)], "label_ids": [[4]] * GLOBAL_BATCH})
    settings = {"label_mode": "mined", "num_hard_negatives": 0}
    return train(bert_folder, folder, losses.BCELoss, settings, world_size, rows)


def evaluations(bert_folder, folder):
    """The loss with batches of 1 and of 4 a process, the last of which the sampler fills up with the first queries."""
    found = {}
    for mode, size in [("exact", 1), ("exact", 4), ("bank", 4), ("mined", 1)]:
        settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "label_chunk_size": 2}
        args = XMCTrainingArguments(str(folder), per_device_eval_batch_size=size, label_mode=mode, **settings)
        encoder = make_bert_encoder(bert_folder)
        trainer = XMCTrainer(encoder, args, queries(), eval_dataset=queries(), labels=LABELS)
        found[f"{mode} {size}"] = trainer.evaluate()["eval_loss"]
    return found


def second_run(bert_folder, folder):
    """How far a second run with `model_init` ends from the first: two towers, of which DDP sees one pass."""
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    args = XMCTrainingArguments(str(folder), router_mapping=TOWERS["router_mapping"], label_mode="exact", **settings)
    trainer = XMCTrainer(None, args, queries(), labels=LABELS, model_init=lambda: make_router(bert_folder))
    ends, runs = [], []
    for _ in range(2):
        trainer.train()
        runs.append(trainer.session.run)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in make_router(bert_folder).parameters()])
    return {"moved": float((ends[0] - start).norm()), "apart": float((ends[1] - ends[0]).norm()), "runs": runs}


def collectives():
    """Ragged rows and columns, gathered; a gradient through the gathering; labels that do not divide."""
    rank, size = distributed.rank(), distributed.world_size()
    mine = torch.full((rank + 1, rank + 2), float(rank))
    queries = torch.full((rank + 1, 3), 1.0, requires_grad=True)
    gathered = distributed.gather_queries(queries)
    (gathered * (rank + 1) * torch.arange(len(gathered))[:, None]).sum().backward()
    return {"rows": distributed.gather_rows(mine, fill=-1), "gradient": queries.grad, "size": size}


def query_gradients(bert_folder):
    """Of all labels, of a sample of them, and of the sample as the bank corrects it; this process's parts."""
    encoder = make_bert_encoder(bert_folder).eval()
    table, loss = TokenizedLabels(encoder, LABELS, chunk_size=2), losses.DecoupledSoftmaxLoss()
    positives = torch.tensor([[0], [0], [2]])
    embeddings = encoder.encode([f"text {i}" for i in range(len(positives))], convert_to_tensor=True).clone()
    found = []
    for negatives in (AllLabels(table), LabelBank(table, loss, 0.3, 4, False)):
        torch.manual_seed(0)
        queries = embeddings.clone().requires_grad_()
        candidates = negatives.select(encoder, BatchQueries(embeddings, positives, None, None))
        labels = negatives.embed(encoder, candidates).detach()
        value = loss(queries, labels, candidates.positives, None, candidates.shard, candidates.label_weights)
        found.append(*torch.autograd.grad(value, queries))
    return [*found, found[1] + candidates.query_control_variate]


def main(bert_folder, output_folder, *chosen):
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = {}
    for name, (loss, settings) in CASES.items():
        if chosen and name not in chosen:
            continue
        results[name] = train(bert_folder, Path(output_folder) / "run", loss, settings, world_size)
        del results[name]["batches"]
    if chosen:
        torch.save(results, Path(output_folder) / f"rank{rank}.pt")
        return
    ragged = train(bert_folder, Path(output_folder) / "run", losses.DecoupledSoftmaxLoss, RAGGED, world_size)
    results["ragged"] = {"losses": ragged["losses"], "weights": ragged["weights"]}
    results["one label"] = one_label(bert_folder, Path(output_folder) / "run", world_size)
    results["evaluations"] = evaluations(bert_folder, Path(output_folder) / "run")
    results["second run"] = second_run(bert_folder, Path(output_folder) / "run")
    results["clipped vectors"] = clipped_vectors(bert_folder, Path(output_folder) / "run", world_size)
    results["collectives"] = collectives()
    results["query gradients"] = query_gradients(bert_folder)
    torch.save(results, Path(output_folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
