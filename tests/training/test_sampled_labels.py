"""The positives of a batch and a sample of the other labels, drawn by the gradients of earlier steps."""

import math

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, best_of_texts, make_static_encoder, several_texts
from helpers.training import tiny_arguments

from hf_xmc import XMCTrainer, losses
from hf_xmc.losses import functional
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.negatives import BatchQueries
from hf_xmc.training.sampled_labels import DECAY, FLOOR, SampledLabels

POSITIVES = torch.tensor([[3, -100], [10, 0]])


def sampled_of(fraction, encoder=None, texts=LABELS, counts=None):
    encoder = encoder or make_static_encoder()
    return SampledLabels(TokenizedLabels(encoder, texts, text_counts=counts), fraction, normalised=False)


def batch_of(encoder, positives=POSITIVES):
    queries = encoder.encode([f"text {i} about a boat" for i in range(len(positives))], convert_to_tensor=True)
    return BatchQueries(queries.clone(), positives, None, None)


def test_positives_are_selected_for_sure_and_weigh_one():
    torch.manual_seed(0)
    negatives = sampled_of(0.2)
    for _ in range(20):
        selected = negatives.select(None, batch_of(negatives.table.encoder))
        assert len(selected.label_ids) == 3 + math.ceil(0.2 * 11)
        columns = selected.positives[[0, 1, 1], [0, 0, 1]]
        assert selected.label_ids[columns].tolist() == [3, 10, 0]
        assert selected.label_weights[columns].tolist() == [1, 1, 1]
        assert selected.positives[0, 1] == -100


def test_weights_make_every_sum_over_labels_unbiased():
    torch.manual_seed(0)
    negatives = sampled_of(0.3)
    negatives.importance = torch.tensor([5.0, 0.1, 3.0, 2.0, torch.nan, 0.0, 1.0, 1.0, 8.0, 0.5, 4.0])
    batch, values = batch_of(negatives.table.encoder), torch.arange(1.0, 12.0)
    draws = []
    for _ in range(1000):
        selected = negatives.select(None, batch)
        draws.append(float((selected.label_weights * values[selected.label_ids]).sum()))
    error = np.std(draws) / len(draws) ** 0.5
    assert error < 2
    assert np.mean(draws) == pytest.approx(values.sum().item(), abs=4 * error)


def test_labels_are_drawn_in_proportion_to_their_importance():
    negatives = sampled_of(0.1)
    negatives.importance = torch.tensor([9.0, 1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0, 7.0, torch.nan, 9.0])
    mean = negatives.importance.nanmean()
    importance = negatives.importance.nan_to_num(float(mean)) + FLOOR * mean
    importance[[0, 3, 10]] = 0  # the positives
    expected = 2 * importance / importance.sum()  # 2 of 11 labels are drawn
    selected = negatives.select(None, batch_of(negatives.table.encoder))
    drawn = ~np.isin(selected.label_ids, [0, 3, 10])
    weights = selected.label_weights[drawn].float()
    torch.testing.assert_close(weights, 1 / expected[selected.label_ids[drawn]])


@pytest.mark.parametrize("several", [False, True])
def test_the_gradient_with_all_labels_drawn_is_that_of_the_formula(several):
    table, label_of = several_texts()
    order = np.argsort(label_of, kind="stable")
    texts = [table["text"][row] for row in order] if several else LABELS
    counts = np.bincount(label_of) if several else None
    encoder = make_static_encoder().double()
    negatives, batch = sampled_of(1.0, encoder, texts, counts), batch_of(encoder)
    queries = batch.embeddings.double().requires_grad_()
    selected = negatives.select(encoder, batch)
    value = selected.loss(losses.DecoupledSoftmaxLoss(), queries, negatives.embed(encoder, selected), None)
    value.backward()
    got = [value.detach(), queries.grad, encoder[0].embedding.weight.grad]

    other, others = make_static_encoder().double(), batch.embeddings.double().requires_grad_()
    labels = other({**other.preprocess(texts)})["sentence_embedding"]
    scores = best_of_texts(others @ labels.T, sorted(label_of)) if several else others @ labels.T
    expected = functional.decoupled_softmax_loss(scores, POSITIVES)
    expected.backward()
    torch.testing.assert_close(got, [expected.detach(), others.grad, other[0].embedding.weight.grad])


def test_importance_is_an_average_of_gradient_norms_without_weights():
    torch.manual_seed(0)
    encoder = make_static_encoder()
    negatives, batch = sampled_of(0.3, encoder), batch_of(encoder)
    selected = negatives.select(encoder, batch)
    embeddings, gradient = negatives.embed(encoder, selected), torch.randn(len(selected.label_ids), 16)
    embeddings.backward(gradient)
    norms = gradient.norm(dim=1) / selected.label_weights.float()
    torch.testing.assert_close(negatives.importance[selected.label_ids], norms)
    others = np.setdiff1d(np.arange(11), selected.label_ids)
    assert negatives.importance[others].isnan().all()
    negatives.embed(encoder, selected).backward(3 * gradient)
    torch.testing.assert_close(negatives.importance[selected.label_ids], DECAY * norms + (1 - DECAY) * 3 * norms)


def test_the_norms_of_all_texts_of_a_label_count():
    table, label_of = several_texts()
    texts = [table["text"][row] for row in np.argsort(label_of, kind="stable")]
    encoder, counts = make_static_encoder(), np.bincount(label_of)
    negatives = sampled_of(1.0, encoder, texts, counts)
    embeddings = negatives.embed(encoder, negatives.select(encoder, batch_of(encoder)))
    embeddings.backward(torch.full_like(embeddings, 0.25))  # a norm of 1
    assert negatives.importance.tolist() == counts.tolist()


def test_a_gradient_that_is_no_number_leaves_the_importance_alone():
    encoder = make_static_encoder()
    negatives = sampled_of(1.0, encoder)
    selected = negatives.select(encoder, batch_of(encoder))
    gradient = torch.ones(11, 16)
    gradient[4] = torch.inf
    negatives.embed(encoder, selected).backward(gradient)
    assert negatives.importance.isnan().nonzero().flatten().tolist() == [4]


def test_a_state_is_restored_and_that_of_other_labels_refused():
    negatives, other = sampled_of(0.5), sampled_of(0.5)
    negatives.importance = torch.rand(11)
    other.load_state_dict(negatives.state_dict())
    assert torch.equal(other.importance, negatives.importance)
    with pytest.raises(ValueError, match="gradient norms of 11 labels of this process, which has 3"):
        sampled_of(0.5, texts=LABELS[:3]).load_state_dict(negatives.state_dict())


def test_a_loss_without_label_weights_is_refused(queries, tmp_path):
    args = tiny_arguments(tmp_path, label_mode="sampled")
    with pytest.raises(ValueError, match="label_mode `sampled` needs a loss that supports label weights, got BCELoss"):
        XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, loss=losses.BCELoss())


def test_the_log_line_says_how_many_labels_a_step_scores(queries, tmp_path):
    args = tiny_arguments(tmp_path, label_mode="sampled", label_sample_fraction=0.1, per_device_train_batch_size=2)
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
    assert "scores 2 queries on 1 process against at most 4 of 11 labels" in trainer.describe_step()
