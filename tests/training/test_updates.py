"""Sparse updates: what they change in a run, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from helpers.training import tiny_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_xmc import XMCTrainer, static_encoder
from hf_xmc.training import checks

SPARSE = {"sparse_updates": True, "label_mode": "sampled", "label_sample_fraction": 0.3}


def train(queries, folder, resume=None, encoder=None, **settings):
    args = tiny_arguments(folder, **{**SPARSE, "max_steps": 6, **settings})
    trainer = XMCTrainer(encoder or make_static_encoder(), args, queries, labels=LABELS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weight_of(trainer):
    return trainer.model[0].embedding.weight.detach()


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "sampled", "mined"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_falls_in_every_label_mode(mode, accumulation, queries, tmp_path):
    settings = {"label_mode": mode, "gradient_accumulation_steps": accumulation, "label_chunk_size": 4}
    trainer = train(queries, tmp_path, max_steps=0, **settings)
    before = trainer.evaluate(queries)["eval_loss"]
    trainer = train(queries, tmp_path, max_steps=20, **settings)
    assert trainer.evaluate(queries)["eval_loss"] < before - 0.3
    assert not trainer.model[0].embedding.sparse


@pytest.mark.parametrize("step", [3, 4])  # 3 batches per epoch: at its end, and within
def test_a_resumed_run_ends_bit_for_bit_as_the_other_did(step, queries, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = train(queries, tmp_path / "whole", **settings)
    resumed = train(queries, tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
    assert torch.equal(weight_of(resumed), weight_of(whole))
    assert not torch.equal(weight_of(whole), make_static_encoder()[0].embedding.weight)


def test_gradients_are_clipped(queries, tmp_path):
    """The second moment of the first step is that of the clipped gradient."""
    moments = []
    for norm in (0.0, 1e-3):
        trainer = train(queries, tmp_path, max_steps=1, max_grad_norm=norm)
        moments.append(trainer.optimizer.state_dict()["state"][0]["second_moment"].sum())
        assert trainer.state.log_history[-1]["step"] == 1
    assert 0 < moments[1] < 1e-3 * moments[0]


class Largest(TorchDispatchMode):
    """The number of elements of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        known = {id(leaf) for leaf in tree_leaves((arguments, settings))}
        result = function(*arguments, **(settings or {}))
        for leaf in tree_leaves(result):
            fresh = isinstance(leaf, torch.Tensor) and id(leaf) not in known and leaf.layout == torch.strided
            if fresh and not leaf._is_view():
                self.size = max(self.size, leaf.numel())
        return result


@pytest.mark.parametrize("sparse", [True, False])
def test_a_step_allocates_nothing_of_the_size_of_the_table(sparse, queries, tmp_path):
    words = [f"{chr(97 + i)}{chr(97 + j)}{chr(97 + k)}" for i in range(20) for j in range(10) for k in range(10)]
    encoder = static_encoder([*LABELS, *words * 5], embedding_dim=16, vocab_size=5000, device="cpu")
    args = tiny_arguments(tmp_path, **{**SPARSE, "sparse_updates": sparse, "max_steps": 4})
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS)
    table, largest = encoder[0].embedding.weight.numel(), []
    step = trainer.training_step

    def watched(*arguments):
        with Largest() as mode:
            loss = step(*arguments)
        largest.append(mode.size)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert table > 16 * 2000
    assert (max(largest) < table / 10) == sparse
    sizes = [value.numel() for value in trainer.optimizer.state_dict()["state"][0].values()]
    assert (sum(sizes) < table / 4) == sparse  # two numbers for each row of 16


def test_several_gpus_are_refused(monkeypatch):
    args = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(checks.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="sparse_updates must be False on several processes with devices of type cuda"):
        checks.check_sparse_updates(args, make_static_encoder())


def test_an_encoder_without_a_table_is_refused(queries, bert_folder, tmp_path):
    args = tiny_arguments(tmp_path, sparse_updates=True)
    with pytest.raises(ValueError, match="sparse_updates must be False for an encoder without static embeddings"):
        XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_decay", 0.01), ("optim", "sgd"), ("optim_args", "foreach=True")],
)
def test_arguments_of_another_optimizer_are_refused(name, value, queries, tmp_path):
    args = tiny_arguments(tmp_path, sparse_updates=True, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be .* with sparse_updates, which update rows by RowAdam, got"):
        XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
