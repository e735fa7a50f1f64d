"""With `model_init`, every run and every search trial starts afresh; without it, a second run continues."""

import copy

import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from helpers.training import tiny_arguments
from transformers import TrainerCallback

from hf_xmc import HardNegativeMiner, XMCTrainer, losses, st_losses

MODES = {
    "exact": {},
    "fresh": {"label_sample_fraction": 0.3},
    "bank": {"label_sample_fraction": 0.3, "label_bank_max_age": 5},
    "mined": {"num_hard_negatives": 2, "num_random_negatives": 2, "num_positives": 1},
}


class Weights(TrainerCallback):
    """The weights at the end of every run."""

    def __init__(self):
        self.seen = []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))


def trainer_of(folder, queries, model=None, loss=None, model_init=None, mining=False, **settings):
    args = tiny_arguments(folder, **{"max_steps": 3, **settings})
    trainer = XMCTrainer(model, args, queries, labels=LABELS, loss=loss, eval_dataset=queries, model_init=model_init)
    trainer.add_callback(weights := Weights())
    if mining:
        trainer.add_callback(HardNegativeMiner(trainer))
    return trainer, weights


@pytest.mark.parametrize("mode", MODES)
def test_second_run_with_model_init_equals_the_first(mode, queries, bert_folder, tmp_path):
    """Dropout on. What a bank remembers and what was mined are forgotten."""
    trainer, weights = trainer_of(
        tmp_path,
        queries,
        model_init=lambda: make_bert_encoder(bert_folder),
        mining=mode == "mined",
        label_mode=mode,
        **MODES[mode],
    )
    before = make_bert_encoder(bert_folder)
    trainer.train()
    trainer.train()
    first, second = weights.seen
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.cat([p.flatten() for p in before.parameters()]))


def test_new_model_of_model_init_shares_no_part_with_the_old_one(queries, tmp_path):
    """Tokens of labels, prompts, similarity, loss, optimizer: nothing is left of the model before."""
    made = []

    def model_init():
        texts = [*LABELS, "text about and"] if len(made) < 2 else [*LABELS, *queries["text"], "boat boat"]
        encoder = make_static_encoder()
        encoder[0] = type(encoder[0])(make_tokenizer(texts), embedding_dim=16)
        encoder.prompts = {"query": f"text {len(made)} ", "document": f"about {len(made)} "}
        made.append(encoder)
        return encoder

    loss = losses.BCELoss(-3.0)
    trainer, _ = trainer_of(tmp_path, queries, loss=loss, model_init=model_init)
    for _ in range(2):
        trainer.train()
        encoder = made[-1]
        assert trainer.model is encoder
        assert encoder.similarity_fn_name == "dot"
        assert trainer.loss is loss
        assert loss.model is encoder
        assert trainer.watch.loss is loss
        assert trainer.data_collator.preprocess_fn == encoder.preprocess
        expected = encoder.preprocess(LABELS, prompt=encoder.prompts["document"], task="document")
        assert trainer.negatives.table.tokens.tolist() == expected["input_ids"].tolist()
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in [*encoder.parameters(), loss.bias, loss.log_scale]}
    assert len(made) == 4


def make_tokenizer(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(["[UNK]", *(word for text in texts for word in text.split())])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("kind", ["instance", "class", "factory", "learned before"])
def test_loss_starts_every_run_as_it_was_given(kind, queries, tmp_path):
    given = losses.BCELoss(-3.0)
    if kind == "learned before":
        given.bias.data.fill_(-2.5)
    start = {"instance": -3.0, "class": -10.0, "factory": -4.0, "learned before": -2.5}[kind]
    loss = {"class": losses.BCELoss, "factory": lambda model: losses.BCELoss(-4.0)}.get(kind, given)
    trainer, weights = trainer_of(tmp_path, queries, loss=loss, model_init=lambda: make_static_encoder(8))
    assert trainer.loss.bias.item() == start
    learned = []
    for _ in range(2):
        trainer.train()
        learned.append(trainer.loss.bias.item())
    assert learned[0] == learned[1] != start
    assert torch.equal(*weights.seen)
    assert (trainer.loss is given) == (kind in ("instance", "learned before"))


def test_loss_factory_is_called_once_for_each_model(queries, tmp_path):
    models = []
    trainer, _ = trainer_of(
        tmp_path, queries, make_static_encoder(), loss=lambda model: models.append(model) or losses.SoftmaxLoss()
    )
    trainer.train()
    assert models == [trainer.model]
    with pytest.raises(ValueError, match=r"Use hf_xmc\.losses\.SoftmaxLoss\(\)"):
        trainer_of(tmp_path, queries, make_static_encoder(), loss=st_losses.SoftmaxLoss)


TRIALS = [
    {"label_mode": "fresh", "label_sample_fraction": 0.2, "learning_rate": 0.1, "seed": 7},
    {"label_mode": "bank", "label_sample_fraction": 0.4, "num_positives": 1},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    {"label_mode": "mined", "num_random_negatives": 3, "seed": 8},
]


def test_search_gives_the_weights_of_separate_runs(queries, tmp_path):
    """The second trial has no rate of its own, and the third no mode: no trial leaves its settings to the next."""

    def model_init(trial=None):
        encoder = make_static_encoder()
        torch.nn.init.normal_(encoder[0].embedding.weight)  # with the seed of the trial
        return encoder

    trainer, weights = trainer_of(tmp_path / "search", queries, loss=losses.SoftmaxLoss(), model_init=model_init)
    arguments = copy.copy(vars(trainer.args))
    best = trainer.hyperparameter_search(
        lambda trial: TRIALS[trial.number],
        compute_objective=lambda metrics: float(weights.seen[-1].sum()),
        n_trials=len(TRIALS),
        backend="optuna",
    )
    for settings, found in zip(TRIALS, weights.seen, strict=True):
        alone, expected = trainer_of(
            tmp_path / "alone",
            queries,
            loss=losses.SoftmaxLoss(),
            model_init=model_init,
            **settings,
        )
        alone.train()
        assert torch.equal(found, expected.seen[0]), settings
    assert best.objective == min(float(found.sum()) for found in weights.seen)
    assert vars(trainer.args) == arguments
    trainer.train()
    plain, expected = trainer_of(tmp_path / "plain", queries, loss=losses.SoftmaxLoss(), model_init=model_init)
    plain.train()
    assert torch.equal(weights.seen[-1], expected.seen[0])


def test_second_run_without_model_init_continues_the_first(queries, tmp_path):
    """From the weights, the bank and the bias that it has; a model that is given starts no other way."""
    trainer, weights = trainer_of(
        tmp_path, queries, make_static_encoder(), losses.SoftmaxLoss(), label_mode="bank", label_sample_fraction=0.3
    )
    negatives = trainer.negatives
    start = trainer.model[0].embedding.weight.detach().flatten().clone()
    trainer.train()
    assert trainer.negatives is negatives
    turn = negatives.next
    trainer.train()
    assert trainer.negatives is negatives
    assert negatives.next != turn
    first, second = weights.seen
    assert 0 < (first - start).norm() < (second - start).norm()


def test_persistent_workers_read_texts_for_the_current_model(queries, tmp_path):
    prompts = ["", "red ", "dog "]

    def with_a_new_prompt():
        encoder = make_static_encoder()
        encoder.prompts = {"query": prompts[0], "document": ""}
        return encoder

    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer, _ = trainer_of(tmp_path, queries, model_init=with_a_new_prompt, max_steps=1, **workers)
    for _ in range(2):
        del prompts[0]
        trainer.train()
        found = trainer.evaluate()["eval_loss"]
        afresh, _ = trainer_of(tmp_path, queries, trainer.model)
        assert found == pytest.approx(afresh.evaluate()["eval_loss"], rel=1e-5)
