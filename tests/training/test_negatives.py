"""Which labels take part in a step, and which of their columns are positives."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert, make_bert_encoder, make_static_encoder

from hf_xmc.losses.modules import DecoupledSoftmaxLoss
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.mined_negatives import MinedNegatives
from hf_xmc.training.negatives import BatchQueries

POSITIVES = torch.tensor([[3, -100], [10, 0]])


@pytest.fixture(params=["static", "bert"])
def any_encoder(request, tmp_path):
    still = make_static_encoder() if request.param == "static" else make_bert_encoder(make_bert(tmp_path, dropout=0.0))
    return still.eval()


def step(encoder, positives=POSITIVES, weights=None):
    queries = encoder.encode([f"text {i}" for i in range(len(positives))], convert_to_tensor=True).clone()
    return BatchQueries(queries, positives, weights, torch.arange(len(positives)))


def texts(encoder, label_ids):
    return encoder.encode([LABELS[label] for label in label_ids], convert_to_tensor=True)


@pytest.mark.parametrize("size", [None, 1, 4, 11, 100])
def test_every_label_has_one_column_and_positives_refer_to_it(any_encoder, size):
    negatives = AllLabels(TokenizedLabels(any_encoder, LABELS, chunk_size=size))
    candidates = negatives.select(any_encoder, step(any_encoder))
    assert sorted(candidates.label_ids.tolist()) == list(range(11))
    assert candidates.positives[0, 1] == -100
    columns = negatives.embed(any_encoder, candidates)
    torch.testing.assert_close(columns[candidates.positives[[0, 1, 1], [0, 0, 1]]], texts(any_encoder, [3, 10, 0]))


def test_mined_pool_holds_positives_shortlist_and_random_labels(any_encoder):
    negatives = MinedNegatives(TokenizedLabels(any_encoder, LABELS), num_queries=2, num_hard=2)
    negatives.shortlist = torch.tensor([[7, 8, -1], [3, -1, -1]], dtype=torch.int32)
    candidates = negatives.select(any_encoder, step(any_encoder))
    assert sorted(candidates.label_ids.tolist()) == [0, 3, 7, 8, 10]
    columns = negatives.embed(any_encoder, candidates)
    torch.testing.assert_close(columns[candidates.positives[[0, 1, 1], [0, 0, 1]]], texts(any_encoder, [3, 10, 0]))

    negatives.num_random = 500
    assert len(negatives.select(any_encoder, step(any_encoder)).label_ids) == 11


def test_pool_without_labels_has_no_columns(any_encoder):
    table, none = TokenizedLabels(any_encoder, LABELS), torch.full((2, 2), -100)
    for negatives in (
        MinedNegatives(table, num_queries=2, num_hard=2),
        LabelBank(table, DecoupledSoftmaxLoss(), 0.3, 4, False),
    ):
        candidates = negatives.select(any_encoder, step(any_encoder, none))
        assert torch.equal(candidates.positives, none)
        embeddings = negatives.embed(any_encoder, candidates)
        assert embeddings.shape == (0, 16)
        queries = torch.ones(2, 16, requires_grad=True)
        loss = DecoupledSoftmaxLoss()(queries, embeddings, candidates.positives, None, candidates.shard)
        loss.backward()
        assert loss == queries.grad.norm() == 0


def test_queries_of_another_data_set_have_no_hard_negatives_of_this_one(any_encoder):
    negatives = MinedNegatives(TokenizedLabels(any_encoder, LABELS), num_queries=2, num_hard=2)
    negatives.shortlist = torch.tensor([[7, 8], [5, 6]], dtype=torch.int32)
    candidates = negatives.select(any_encoder, step(any_encoder)._replace(rows=None))
    assert sorted(candidates.label_ids.tolist()) == [0, 3, 10]


def test_parameters_unfrozen_later_are_trained_by_labels_too(bert_folder):
    encoder = make_bert_encoder(bert_folder).eval()
    negatives = AllLabels(TokenizedLabels(encoder, LABELS), fraction=1.0)
    words = encoder[0].model.get_input_embeddings().weight
    for free in (False, True):
        words.requires_grad_(free)
        negatives.embed(encoder, negatives.select(encoder, step(encoder))).sum().backward()
        assert (words.grad is not None) == free


def test_undrawn_positive_is_masked_when_another_query_brings_it(any_encoder):
    negatives = MinedNegatives(TokenizedLabels(any_encoder, LABELS), num_queries=2, num_hard=1)
    negatives.shortlist = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    drawn = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # of the second query's 10 and 0 only 10
    candidates = negatives.select(any_encoder, step(any_encoder, weights=drawn))
    assert sorted(candidates.label_ids.tolist()) == [0, 3, 10]
    assert candidates.label_ids[candidates.positives[1]].tolist() == [10, 0]
    negatives.shortlist[0, 0] = 5
    candidates = negatives.select(any_encoder, step(any_encoder, weights=drawn))
    assert candidates.positives[1, 1] == -100, "a label outside the pool has no column"


def bank_of(encoder, fraction, max_age=4, normalised=False):
    return LabelBank(
        TokenizedLabels(encoder, LABELS, chunk_size=3), DecoupledSoftmaxLoss(), fraction, max_age, normalised
    )


def test_bank_always_samples_positives_and_weights_other_labels(any_encoder):
    bank = bank_of(any_encoder, fraction=0.3)
    torch.manual_seed(0)
    for _ in range(5):
        candidates = bank.select(any_encoder, step(any_encoder))
        label_ids = candidates.label_ids.tolist()
        assert {0, 3, 10} < set(label_ids)
        assert len(label_ids) == 3 + 4  # and ceil(0.3 * 11) more
        weights = dict(zip(label_ids, candidates.label_weights.tolist(), strict=True))
        assert weights[0] == weights[3] == weights[10] == 1
        assert all(weight >= 1 for weight in weights.values())
    columns = bank.embed(any_encoder, candidates)
    torch.testing.assert_close(columns[candidates.positives[[0, 1, 1], [0, 0, 1]]], texts(any_encoder, [3, 10, 0]))


def test_bank_gives_the_exact_loss_when_all_labels_are_sampled(any_encoder):
    bank, everything = bank_of(any_encoder, fraction=1.0), AllLabels(TokenizedLabels(any_encoder, LABELS))
    batch, values = step(any_encoder), []
    for negatives in (bank, everything):
        candidates = negatives.select(any_encoder, batch)
        labels = negatives.embed(any_encoder, candidates)
        loss = DecoupledSoftmaxLoss()
        values.append(
            loss(batch.embeddings, labels, candidates.positives, None, candidates.shard, candidates.label_weights)
        )
    torch.testing.assert_close(*values)


def test_mean_normaliser_of_many_samples_equals_that_of_all_labels(any_encoder):
    """Even with a bank that has nothing to do with the encoder: it proposes, it does not score."""
    bank, batch = bank_of(any_encoder, fraction=0.3), step(any_encoder)
    bank.select(any_encoder, batch)
    torch.manual_seed(0)
    sums, labels = [], texts(any_encoder, range(11))
    for _ in range(500):
        bank.embeddings = torch.randn(11, batch.embeddings.shape[1]).to(torch.bfloat16)
        candidates = bank.select(any_encoder, batch)
        scores = batch.embeddings @ labels[candidates.label_ids].T / 10
        sums.append((scores.exp() * candidates.label_weights).sum(1))
    sums = torch.stack(sums)
    expected = (batch.embeddings @ labels.T / 10).exp().sum(1)
    assert (sums.std(0) > 0.02 * expected).all(), "nothing was sampled"
    assert ((sums.mean(0) - expected).abs() < 5 * sums.std(0) / len(sums) ** 0.5).all()


def query_control_variate(negatives, encoder, batch):
    """Of a step, at the queries: what the sampled labels give, and what the others add."""
    candidates = negatives.select(encoder, batch)
    labels, queries = negatives.embed(encoder, candidates).detach(), batch.embeddings.clone().requires_grad_()
    loss = DecoupledSoftmaxLoss()(
        queries, labels, candidates.positives, None, candidates.shard, candidates.label_weights
    )
    (gradient,) = torch.autograd.grad(loss, queries)
    return (
        gradient,
        gradient if candidates.query_control_variate is None else gradient + candidates.query_control_variate,
    )


def test_fresh_bank_gives_queries_the_gradient_of_all_labels(any_encoder):
    """Whatever is drawn."""
    batch = step(any_encoder)
    exact, _ = query_control_variate(AllLabels(TokenizedLabels(any_encoder, LABELS)), any_encoder, batch)
    torch.manual_seed(0)
    for _ in range(5):
        of_sample, corrected = query_control_variate(bank_of(any_encoder, fraction=0.2), any_encoder, batch)
        assert (of_sample - exact).norm() > 0.05 * exact.norm(), "the sample missed nothing"
        assert (corrected - exact).norm() < 0.01 * exact.norm()  # the bank is in bfloat16


def how_often(bank, label, encoder, batch, draws=200):
    torch.manual_seed(0)
    remembered, drawn = bank.embeddings.clone(), 0
    for _ in range(draws):
        bank.embeddings, bank.num_refreshed = remembered.clone(), 0
        drawn += label in bank.select(encoder, batch).label_ids
    return drawn / draws


def test_label_of_low_importance_is_still_sampled():
    encoder = make_static_encoder().eval()
    bank, batch = bank_of(encoder, fraction=0.3), step(encoder)
    bank.select(encoder, batch)
    cold = int(np.flatnonzero(bank.label_ids == 7)[0])
    bank.embeddings[cold] = (-1e4 * batch.embeddings.sum(0)).to(torch.bfloat16)  # its share of the normaliser is 0
    assert 0 < how_often(bank, 7, encoder, batch) < 0.5


@pytest.mark.parametrize(("normalised", "expected"), [(False, True), (True, False)])
def test_bank_ignores_the_radial_gradient_of_unit_vectors(normalised, expected):
    encoder = make_static_encoder().eval()
    bank, query = bank_of(encoder, fraction=0.3, normalised=normalised), torch.ones(4) / 2
    batch = BatchQueries(query.repeat(2, 1), POSITIVES, None, torch.arange(2))
    bank.embeddings = torch.eye(4).repeat(3, 1)[:11].to(torch.bfloat16)
    along = int(np.flatnonzero(bank.label_ids == 7)[0])
    bank.embeddings[along] = query.to(torch.bfloat16)  # the hottest label, whose gradient lies along it
    assert (how_often(bank, 7, encoder, batch) > 0.5) == expected


@pytest.mark.parametrize("normalised", [False, True])
def test_no_gradient_passes_through_the_sampling_of_the_bank(any_encoder, normalised):
    bank = bank_of(any_encoder, fraction=0.5, normalised=normalised)
    candidates = bank.select(any_encoder, step(any_encoder))
    assert not candidates.label_weights.requires_grad
    assert not candidates.query_control_variate.requires_grad
    assert not bank.embeddings.requires_grad
    assert bank.embed(any_encoder, candidates).requires_grad


@pytest.mark.parametrize("max_age", [1, 4, 11, 100])
def test_bank_holds_no_embedding_older_than_max_age(max_age):
    encoder = make_static_encoder()
    bank = bank_of(encoder, fraction=0.1, max_age=max_age)
    for age in range(max_age + 1):
        candidates = bank.select(encoder, step(encoder))
        if age == 0:
            with torch.no_grad():
                encoder[0].embedding.weight.add_(1.0)  # from here on what is remembered is old
        bank.embed(encoder, candidates)
    fresh = texts(encoder, bank.label_ids).to(torch.bfloat16)
    assert torch.equal(bank.embeddings, fresh)


def test_bank_stores_the_embeddings_of_a_step():
    encoder = make_static_encoder()
    bank = bank_of(encoder, fraction=0.2, max_age=100)
    bank.select(encoder, step(encoder))
    with torch.no_grad():
        encoder[0].embedding.weight.add_(1.0)
    candidates = bank.select(encoder, step(encoder))
    renewed = {bank.label_ids[1]}
    bank.embed(encoder, candidates)
    fresh = (bank.embeddings == texts(encoder, bank.label_ids).to(torch.bfloat16)).all(1)
    assert set(bank.label_ids[fresh.numpy()].tolist()) == set(candidates.label_ids.tolist()) | renewed


def test_bank_refuses_a_state_of_another_shape(any_encoder):
    bank = bank_of(any_encoder, fraction=0.5)
    with pytest.raises(ValueError, match="holds 5 labels of this process, which has 11"):
        bank.load_state_dict({"embeddings": torch.zeros(5, 16), "next": torch.tensor(0)})
    mined = MinedNegatives(TokenizedLabels(any_encoder, LABELS), num_queries=2)
    with pytest.raises(ValueError, match="for 3 queries, but there are 2 training queries"):
        mined.load_state_dict({"shortlist": torch.zeros(3, 1)})


def test_random_negatives_are_drawn_from_all_labels():
    encoder = make_static_encoder()
    mined = MinedNegatives(TokenizedLabels(encoder, LABELS), num_queries=2, num_random=3)
    torch.manual_seed(0)
    drawn = [mined.select(encoder, step(encoder)).label_ids for _ in range(60)]
    assert set(np.concatenate(drawn).tolist()) == set(range(11))
    assert max(map(len, drawn)) <= 6
