"""The loss of votes: its value and gradient, the queries that it draws, and what a training with it changes."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, make_bert_encoder, make_static_encoder
from helpers.training import tiny_arguments
from helpers.votes import mean_of_votes

from hf_xmc import XMCTrainer, XMCTrainingArguments
from hf_xmc.padding import pad
from hf_xmc.training.negatives import BatchQueries
from hf_xmc.training.vote_loss import VoteLoss, loss_of_votes

QUERIES = Dataset.from_dict(
    {
        "text": [" and ".join(LABELS[p] for p in ids) + f" {row}" for row, ids in enumerate(POSITIVES)],
        "label_ids": POSITIVES,
    }
)


def vote_loss(encoder, queries=QUERIES, num_drawn=100, chunk_size=2):
    def features_of(texts, rows):
        return encoder.preprocess(texts)

    return VoteLoss(queries, len(LABELS), features_of, num_drawn, chunk_size)


def test_value_is_the_one_computed_by_hand():
    relevance = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).to_sparse()
    scores = torch.tensor([[2.0, 1.0, 1.0], [-torch.inf, 0.0, 0.0]]).log()  # votes of 2/4, 1/4, 1/4 and of 0, 1/2, 1/2
    positives, weights = torch.tensor([[0, 1], [0, -100]]), torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    first = -(np.log(3 / 4) + 3 * np.log(2 / 4)) / 4
    assert loss_of_votes(scores[:1], relevance, positives[:1], weights[:1]).item() == pytest.approx(first)
    scores[1] = torch.tensor([-torch.inf, 0.0, 0.0])
    both = (first - np.log(1 / 2)) / 2
    assert loss_of_votes(scores, relevance, positives, weights).item() == pytest.approx(both)


def test_a_positive_that_no_other_query_has_does_not_count():
    relevance = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).to_sparse()
    scores = torch.tensor([[-torch.inf, 0.0]], requires_grad=True)
    value = loss_of_votes(scores, relevance, torch.tensor([[0, 1]]))
    value.backward()
    assert value.item() == 0.0
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["static", "transformer"])
def test_gradient_is_that_of_the_formula(kind, bert_folder):
    """In float64, with weights and drawn queries."""
    encoder = (make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)).double().eval()
    votes = vote_loss(encoder)
    rows = np.array([0, 3, 5])
    positives = pad([POSITIVES[row] for row in rows])
    weights = torch.rand(positives.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1

    def embedded(some):
        return encoder(encoder.preprocess([QUERIES["text"][int(row)] for row in some]))["sentence_embedding"]

    torch.manual_seed(1)
    queries = embedded(rows)
    value = votes(encoder, BatchQueries(queries.detach(), positives, weights, torch.from_numpy(rows)), queries)
    got = torch.autograd.grad(value, list(encoder.parameters()), allow_unused=True)
    torch.manual_seed(1)
    drawn = votes.draw(rows, len(rows))
    assert len(drawn) > 0
    expected = mean_of_votes(embedded(rows), positives, weights, embedded(drawn), [POSITIVES[row] for row in drawn])
    gradients = torch.autograd.grad(expected, list(encoder.parameters()), allow_unused=True)
    assert max(float(g.norm()) for g in gradients if g is not None) > 0.01
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(got, gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_drawn_queries_share_a_label_and_are_not_in_the_batch():
    labels = np.random.default_rng(0).integers(0, 60, (400, 3))
    queries = Dataset.from_dict({"text": [str(n) for n in range(400)], "label_ids": labels.tolist()})
    votes = VoteLoss(queries, 60, None, 40, 8)
    rows = np.arange(0, 400, 20)
    torch.manual_seed(0)
    drawn = votes.draw(rows, len(rows))
    assert len(drawn) == 40
    assert not set(drawn) & set(rows)
    wanted = set(labels[rows].ravel())
    assert all(set(labels[row]) & wanted for row in drawn)
    torch.manual_seed(0)
    assert np.array_equal(drawn, votes.draw(rows, len(rows)))
    assert not np.array_equal(drawn, votes.draw(rows, len(rows)))


def test_a_label_that_the_batch_has_anyway_draws_no_query():
    labels = [[0, 1 + row // 2] for row in range(100)]  # label 0 is everywhere, the others occur twice
    queries = Dataset.from_dict({"text": [str(n) for n in range(100)], "label_ids": labels})
    votes = VoteLoss(queries, 51, None, 1000, 8)
    found = set()
    for _ in range(20):
        found |= set(votes.draw(np.array([0, 10]), 20).tolist())
    assert found == {1, 11}


def test_training_moves_queries_with_the_same_labels_together(tmp_path):
    ends = {}
    for weight in (0.0, 5.0):
        encoder = make_static_encoder()
        args = tiny_arguments(
            tmp_path, max_steps=60, learning_rate=0.02, vote_loss=weight, per_device_train_batch_size=4
        )
        XMCTrainer(encoder, args, QUERIES, labels=LABELS).train()
        queries = encoder.encode(QUERIES["text"], convert_to_tensor=True)
        ends[weight] = float(mean_of_votes(queries, pad(POSITIVES)))
    assert ends[5.0] < 0.9 * ends[0.0]


def test_a_query_without_others_has_no_loss():
    encoder = make_static_encoder()
    votes = vote_loss(encoder, num_drawn=0)
    queries = torch.randn(1, 16, requires_grad=True)
    batch = BatchQueries(queries.detach(), torch.tensor([POSITIVES[0]]), None, torch.tensor([0]))
    value = votes(encoder, batch, queries)
    value.backward()
    assert value.item() == 0.0
    assert not queries.grad.any()


def test_weight_zero_changes_nothing(tmp_path):
    ends = []
    for settings in ({}, {"vote_loss": 0.0, "vote_queries": 7}):
        encoder = make_static_encoder()
        XMCTrainer(encoder, tiny_arguments(tmp_path, max_steps=3, **settings), QUERIES, labels=LABELS).train()
        ends.append(encoder[0].embedding.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(("start", "wanted"), [(0.5, [3, 4, 5]), (0.4, [3, 4, 5]), (0.0, [0, 1, 2, 3, 4, 5])])
def test_votes_begin_after_the_given_fraction_of_the_steps(start, wanted, tmp_path, monkeypatch):
    args = tiny_arguments(tmp_path, max_steps=6, vote_loss=1.0, vote_start=start)
    trainer, voted = XMCTrainer(make_static_encoder(), args, QUERIES, labels=LABELS), []
    votes = VoteLoss.__call__
    monkeypatch.setattr(VoteLoss, "__call__", lambda *given: voted.append(trainer.state.global_step) or votes(*given))
    trainer.train()
    assert voted == wanted


@pytest.mark.parametrize(("kind", "passes"), [("static", 1), ("transformer", 3)])
def test_a_static_encoder_embeds_all_drawn_queries_at_once(kind, passes, bert_folder, tmp_path):
    """In chunks, each drawn query would be embedded a second time, to save memory that a transformer needs."""
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)
    args = tiny_arguments(tmp_path, max_steps=1, vote_loss=1.0, per_device_train_batch_size=2)
    trainer = XMCTrainer(encoder, args, QUERIES, labels=LABELS)
    trainer.get_train_dataloader()
    calls = []
    trainer.votes.features_of = lambda texts, rows: calls.append(len(texts)) or encoder.preprocess(texts)
    drawn = np.arange(5)
    assert trainer.votes._embed(encoder, drawn, torch.device("cpu")).shape[0] == 5
    assert len(calls) == passes


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_an_impossible_start_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="vote_start must be at least 0 and below 1, got"):
        XMCTrainingArguments(str(tmp_path), vote_start=value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much"])
def test_an_impossible_weight_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="vote_loss must be a finite number of at least 0, got"):
        XMCTrainingArguments(str(tmp_path), vote_loss=value)


def test_a_negative_number_of_queries_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vote_queries must be at least 0, got -1"):
        XMCTrainingArguments(str(tmp_path), vote_queries=-1)
