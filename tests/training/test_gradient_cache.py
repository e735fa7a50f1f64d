"""Embedding labels in chunks, or embedding a sample again, leaves the gradient the same."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert, make_bert_encoder
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc.encoders.forward import embed
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.gradient_cache import embed_in_chunks, embed_sampled, gradient_norms, parameters_reached

WEIGHTS = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))


def table_of(encoder, **settings):
    table = TokenizedLabels(encoder, LABELS, **settings)
    ordered = table.by_length(np.arange(11))
    return table, ordered, [features for _, features in table.chunks(ordered)]


def gradients(encoder, embed_them, seed=2):
    encoder.zero_grad()
    torch.manual_seed(seed)
    embeddings = embed_them()
    (embeddings * WEIGHTS).sum().backward()
    return embeddings.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 4, 7])
def test_chunks_leave_the_gradient_the_same_with_dropout(bert_folder, size):
    """A label is embedded twice; the second time must draw the same dropout mask as the first."""
    encoder = make_bert_encoder(bert_folder).train()
    _, _, chunks = table_of(encoder, chunk_size=size)
    embeddings, cached = gradients(encoder, lambda: embed_in_chunks(encoder, chunks))
    again, direct = gradients(encoder, lambda: torch.cat([embed(encoder, chunk) for chunk in chunks]))
    other_mask, _ = gradients(encoder, lambda: torch.cat([embed(encoder, chunk) for chunk in chunks[::-1]]).flip(0))
    assert torch.equal(embeddings, again)
    assert not torch.equal(embeddings.sort(0).values, other_mask.sort(0).values), "dropout is off"
    for name, gradient in direct.items():
        torch.testing.assert_close(cached[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(float(gradient.norm()) for gradient in direct.values()) > 1


@pytest.fixture
def sampler(tmp_path, request):
    encoder = make_bert_encoder(make_bert(tmp_path, dropout=0.0)).double().train()
    if request.param:
        encoder.append(Normalize())
    table, ordered, chunks = table_of(encoder, chunk_size=4)
    chunks_of = lambda rows: table.chunks(ordered[rows.numpy()])  # noqa: E731
    embedded = lambda share: embed_sampled(encoder, list(encoder.parameters()), chunks, chunks_of, share, request.param)  # noqa: E731
    return encoder, embedded, lambda: torch.cat([embed(encoder, chunk) for chunk in chunks])


@pytest.mark.parametrize("sampler", [False, True], indirect=True)
def test_gradient_is_exact_when_all_labels_are_sampled(sampler):
    encoder, embedded, plain = sampler
    embeddings, found = gradients(encoder, lambda: embedded(1.0))
    expected_embeddings, expected = gradients(encoder, plain)
    assert torch.equal(embeddings, expected_embeddings)
    assert found.keys() == expected.keys()
    assert sum(float(gradient.norm()) for gradient in expected.values()) > 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sampler", [False, True], indirect=True)
def test_mean_gradient_of_many_samples_is_exact(sampler):
    """An error that shrinks with the square root of the number of draws: no bias."""
    encoder, embedded, plain = sampler
    flat = lambda found: torch.cat([found[name].flatten() for name in sorted(found)])  # noqa: E731
    exact = flat(gradients(encoder, plain)[1])
    draws = torch.stack([flat(gradients(encoder, lambda: embedded(0.3), seed)[1]) for seed in range(400)])
    spread = (draws - exact).norm(dim=1).square().mean().sqrt()
    assert float(spread / exact.norm()) > 0.1, "nothing was sampled"
    error = (draws.mean(0) - exact).norm()
    assert float(error / spread) < 3 / 20  # 1 / sqrt(400) expected, systematic draws are no worse


def test_only_sampled_labels_are_embedded_again(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    table, ordered, chunks = table_of(encoder, chunk_size=4)
    seen = []

    def chunks_of(rows):
        seen.extend(rows.tolist())
        return table.chunks(ordered[rows.numpy()])

    gradients(encoder, lambda: embed_sampled(encoder, list(encoder.parameters()), chunks, chunks_of, 0.25, False))
    assert len(seen) == 3  # of 11, rounded up


def test_importance_of_a_unit_vector_ignores_the_radial_gradient():
    along, across = torch.tensor([[0.6, 0.8], [0.6, 0.8]]), torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    torch.testing.assert_close(gradient_norms(5 * across, along), torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(gradient_norms(5 * across), torch.tensor([5.0, 5.0]))


def test_reached_parameters_exclude_an_unused_pooler(bert_folder):
    encoder = make_bert_encoder(bert_folder).train()
    table, _, _ = table_of(encoder)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reached = parameters_reached(encoder, table.features(np.array([1])))
    assert torch.equal(torch.get_rng_state(), before)
    missing = {name for name, p in encoder.named_parameters() if not any(p is q for q in reached)}
    assert missing == {"0.model.pooler.dense.weight", "0.model.pooler.dense.bias"}


class LeftOut(torch.nn.Module):
    """A layer that is left out in training."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, features):
        if not self.training:
            features["sentence_embedding"] = self.layer(features["sentence_embedding"])
        return features


def test_reached_parameters_include_layers_that_layerdrop_skips(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    encoder.append(LeftOut())
    encoder.train()
    encoder[0].eval()  # as one that is not trained
    modes = [module.training for module in encoder.modules()]
    table, _, _ = table_of(encoder)
    reached = parameters_reached(encoder, table.features(np.array([1])))
    assert any(weight is encoder[2].layer.weight for weight in reached)
    assert [module.training for module in encoder.modules()] == modes
    encoder.requires_grad_(False)
    assert parameters_reached(encoder, table.features(np.array([1]))) == []
