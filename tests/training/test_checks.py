"""Arguments of the stock trainer that XMCTrainer cannot honour are refused before training starts."""

import dataclasses

import pytest
import torch
from datasets import DatasetDict
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from helpers.training import tiny_arguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from transformers import TrainingArguments

from hf_xmc import XMCTrainer, XMCTrainingArguments, losses, st_losses
from hf_xmc.training import checks

REFUSED = {
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all",
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "enable_jit_checkpoint": True,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "label_names": ["label_ids"],
    "length_column_name": "size",
    "train_sampling_strategy": "group_by_length",
    "batch_sampler": "no_duplicates",
    "multi_dataset_batch_sampler": "round_robin",
    "ddp_static_graph": True,
    "router_mapping": {"text": "document"},
    "prompts": {"text": "about "},
}


def arguments(folder, **settings):
    return tiny_arguments(folder, **{"per_device_train_batch_size": 8, "learning_rate": 5e-5, **settings})


@pytest.mark.parametrize("name", REFUSED)
def test_argument_that_would_be_ignored_is_refused(name, tmp_path):
    shown = "`torch_compile` must be False" if name.startswith("torch_compile") else f"`{name}` must be "
    with pytest.raises(ValueError, match=shown):
        arguments(tmp_path, **{name: REFUSED[name]})


def test_every_refused_argument_has_a_case_and_its_default_passes(tmp_path):
    fields = {field.name for field in dataclasses.fields(XMCTrainingArguments)}
    assert set(checks.ARGUMENTS) <= fields
    assert set(checks.ARGUMENTS) - {"parallelism_config"} == set(REFUSED)
    assert arguments(tmp_path).label_names is None
    assert TrainingArguments(str(tmp_path), use_cpu=True).remove_unused_columns


@pytest.mark.parametrize(
    ("name", "value"), [("split_batches", True), ("dispatch_batches", True), ("even_batches", False)]
)
def test_accelerator_setting_that_would_be_ignored_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"accelerator_config: `{name}` must be .*, got {value}"):
        arguments(tmp_path, accelerator_config={name: value})


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizer_that_steps_in_the_backward_pass_is_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"`optim` must not update weights during the backward pass.*got {optim}"):
        arguments(tmp_path, optim=optim)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compute_metrics", lambda prediction: {}),
        ("preprocess_logits_for_metrics", lambda logits, labels: logits),
        ("data_collator", list),
        ("optimizer_cls_and_kwargs", (torch.optim.SGD, {"lr": 0.1})),
        ("processing_class", "another"),
        ("tokenizer", "another"),
        ("eval_dataset", [{"text": "a", "label_ids": [0]}]),
        ("eval_dataset", {"a": [{"text": "a", "label_ids": [0]}]}),
        ("eval_dataset", "iterable"),
        ("loss", {"train": losses.SoftmaxLoss()}),
    ],
)
def test_constructor_argument_that_would_be_ignored_is_refused(name, value, queries, tmp_path):
    if value == "another":
        value = make_static_encoder().tokenizer
    if value == "iterable":
        value = queries.to_iterable_dataset()
    with pytest.raises(ValueError, match=rf"{name}\S* (cannot|must) be "):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS, **{name: value})


def test_supported_arguments_are_accepted(queries, tmp_path):
    encoder = make_static_encoder()
    XMCTrainer(
        encoder,
        arguments(tmp_path, router_mapping={"text": "query"}, dataloader_drop_last=True, data_seed=3),
        queries,
        labels=LABELS,
        processing_class=encoder.tokenizer,
        eval_dataset=DatasetDict({"a": queries}),
        callbacks=[],
        evaluator=[],
    )


def test_learning_rates_are_refused_next_to_a_given_optimizer(queries, tmp_path):
    encoder = make_static_encoder()
    args = arguments(tmp_path, learning_rate_mapping={"embedding": 0.1})
    optimizers = torch.optim.SGD(encoder.parameters(), 0.1), None
    with pytest.raises(ValueError, match="`learning_rate_mapping` must be empty with a given optimizer"):
        XMCTrainer(encoder, args, queries, labels=LABELS, optimizers=optimizers)


class Sampler(DefaultBatchSampler):
    """A sampler of a user's own."""


def test_own_batch_sampler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_sampler` must be 'batch_sampler', got <class"):
        arguments(tmp_path, batch_sampler=Sampler)


@pytest.mark.parametrize("name", ["DecoupledSoftmaxLoss", "SoftmaxLoss", "SoftTopKLoss", "BCELoss"])
def test_trainer_refuses_an_in_batch_loss_when_constructed(name, queries, tmp_path):
    encoder, make = make_static_encoder(), getattr(st_losses, name)
    for loss in (make, make(encoder)):
        with pytest.raises(ValueError, match=rf"got hf_xmc\.st_losses\.{name},.* Use hf_xmc\.losses\.{name}\(\)"):
            XMCTrainer(encoder, arguments(tmp_path), queries, labels=LABELS, loss=loss)


def test_trainer_refuses_a_loss_that_takes_no_embeddings(queries, tmp_path):
    with pytest.raises(ValueError, match=r"`loss` must take queries, labels and positives.*MSELoss"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS, loss=torch.nn.MSELoss())


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_reentrant_checkpointing_is_refused_and_non_reentrant_works(mode, queries, bert_folder, tmp_path):
    settings = {"label_mode": mode, "label_chunk_size": 4, "max_steps": 1}
    with pytest.raises(ValueError, match=r"gradient_checkpointing_kwargs\): use_reentrant must be False"):
        arguments(
            tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, **settings
        )
    encoder = make_bert_encoder(bert_folder)
    encoder.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"gradient checkpointing of .*: use_reentrant must be False"):
        XMCTrainer(encoder, arguments(tmp_path, **settings), queries, labels=LABELS)
    ends = []
    for checkpointing in (False, True):
        encoder = make_bert_encoder(bert_folder)
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, optim="sgd", **settings)
        XMCTrainer(encoder, args, queries, labels=LABELS).train()
        ends.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


class SmallMemory(XMCTrainer):
    """Runs out of memory with more than 4 queries, in the second step of an attempt."""

    sizes = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.sizes = (*self.sizes, len(inputs["label"]))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if len(inputs["label"]) > 4 and self.state.global_step == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


@pytest.mark.parametrize(("mode", "given"), [("exact", True), ("bank", False), ("mined", False)])
def test_batch_is_made_smaller_and_the_run_restarts_when_memory_runs_out(mode, given, queries, bert_folder, tmp_path):
    """It ends bit for bit where a run with the small batch does; dropout is on."""
    settings = {"label_mode": mode, "label_sample_fraction": 0.5, "max_steps": 3, "num_random_negatives": 3}
    ends = []
    for trainer_class, size, more in (
        (SmallMemory, 6, {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 1}),
        (XMCTrainer, 4, {}),
    ):
        encoder = make_bert_encoder(bert_folder)
        optimizers = (torch.optim.Adam(encoder.parameters(), 0.01) if given else None, None)
        args = arguments(tmp_path / str(size), per_device_train_batch_size=size, **settings, **more)
        trainer = trainer_class(encoder, args, queries, labels=LABELS, loss=losses.SoftmaxLoss(), optimizers=optimizers)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
        if trainer_class is SmallMemory:
            assert trainer.sizes == (6, 6, 5, 5, 4, 4, 4)
            assert "Each step scores 4 queries on 1 process" in trainer.describe_step()
            assert trainer.state.train_batch_size == 4
            runs = {path.name: path for path in (tmp_path / "6").glob("checkpoint-*")}
            assert len(runs) == 3
    assert torch.equal(*ends)


def test_auto_find_batch_size_is_refused_on_several_processes(queries, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="`auto_find_batch_size` must be False on several processes"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path, auto_find_batch_size=True), queries, labels=LABELS)


def test_search_trial_is_checked_like_arguments(queries, tmp_path):
    trainer = XMCTrainer(None, arguments(tmp_path), queries, labels=LABELS, model_init=lambda: make_static_encoder(4))
    with pytest.raises(ValueError, match=r"label_sample_fraction must be greater than 0 and at most 1, got 0\.0"):
        trainer.hyperparameter_search(lambda trial: {"label_sample_fraction": 0.0}, n_trials=1, backend="optuna")
