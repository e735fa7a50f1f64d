"""Gradients of a static encoder that hold the rows of a batch and no others."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, make_static_encoder
from helpers.training import tiny_arguments
from torch.nn.utils import clip_grad_norm_

from hf_xmc import XMCTrainer, phrase_encoder
from hf_xmc.encoders.roles import preprocess
from hf_xmc.encoders.static import hold_unknown, release_unknown
from hf_xmc.training.gradient_cache import embed_in_chunks
from hf_xmc.training.sparse_gradients import clip_gradients, sparse_gradients

TEXTS = ["red boat", "", "boat boat dog", "\u2603", "\u2603 old oak tree", "cat", "", "sailing boat"]
ENCODERS = {  # the second one has an unknown token, which is held at zero
    "words": make_static_encoder,
    "phrases": lambda: phrase_encoder([*LABELS, *LABELS], embedding_dim=16, vocab_size=200, device="cpu"),
}


def embed_and_differentiate(kind, chunks, *, sparse):
    encoder = ENCODERS[kind]().double()
    features = [preprocess(encoder, texts, "query") for texts in chunks]
    with sparse_gradients(encoder, sparse):
        embeddings = embed_in_chunks(encoder, features)
        direction = torch.randn(embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (embeddings * direction).sum().backward()
    ids = torch.cat([part["input_ids"] for part in features])
    return embeddings.detach(), encoder[0].embedding.weight.grad, ids


@pytest.mark.parametrize("chunks", [[TEXTS], [TEXTS[:3], TEXTS[3:]], [[""], ["red"], ["red red"]], [["", ""]]])
@pytest.mark.parametrize("kind", ENCODERS)
def test_embeddings_and_gradients_equal_dense_ones(kind, chunks):
    expected, dense, ids = embed_and_differentiate(kind, chunks, sparse=False)
    embeddings, gradient, _ = embed_and_differentiate(kind, chunks, sparse=True)
    torch.testing.assert_close(embeddings, expected, rtol=1e-14, atol=0)  # without a factor for the unknown token
    assert not dense.is_sparse
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense(), dense, rtol=1e-12, atol=1e-15)
    assert bool(dense.any()) == bool(len(ids))


def test_the_unknown_token_counts_in_the_mean_and_has_no_gradient():
    encoder = ENCODERS["phrases"]()
    bag = encoder[0].embedding
    unknown = bag.padding_idx
    with sparse_gradients(encoder):
        features = {"input_ids": torch.tensor([unknown, 3, 3]), "offsets": torch.tensor([0])}
        embedding = encoder(dict(features))["sentence_embedding"]
        embedding.sum().backward()
    gradient = bag.weight.grad.to_dense()
    assert gradient[unknown].tolist() == [0.0] * 16
    torch.testing.assert_close(gradient[3], torch.full((16,), 2 / 3))
    torch.testing.assert_close(embedding[0], 2 / 3 * bag.weight[3])


def test_each_token_of_a_batch_has_one_row():
    _, gradient, ids = embed_and_differentiate("words", [["boat boat dog", "red boat"]], sparse=True)
    assert gradient._indices()[0].tolist() == sorted(set(ids.tolist()))


def stop_if(condition):
    if condition:
        raise RuntimeError("stop")


def test_bags_are_restored_after_an_error():
    encoder = make_static_encoder()
    bag = encoder[0].embedding
    with pytest.raises(RuntimeError, match="stop"), sparse_gradients(encoder):
        stop_if(bag.sparse)
    assert not bag.sparse
    assert "forward" not in vars(bag)
    encoder(preprocess(encoder, TEXTS, "query"))["sentence_embedding"].sum().backward()
    assert not bag.weight.grad.is_sparse


def test_embeddings_without_a_gradient_are_those_of_prediction():
    encoder = ENCODERS["phrases"]()
    features = preprocess(encoder, TEXTS, "query")
    with sparse_gradients(encoder), torch.no_grad():
        embeddings = encoder(features)["sentence_embedding"]
    np.testing.assert_allclose(embeddings.numpy(), encoder.encode_query(TEXTS), rtol=1e-6)


def test_a_bag_with_padding_of_its_own_leaves_it_out_of_the_mean():
    encoder = make_static_encoder()
    bag = encoder[0].embedding
    bag.padding_idx = 3
    with sparse_gradients(encoder):
        mean = bag(torch.tensor([3, 1, 2, 3]), torch.tensor([0]))
        mean.sum().backward()
    torch.testing.assert_close(mean[0], bag.weight[1:3].mean(0))
    assert bag.weight.grad.to_dense()[:4, 0].tolist() == [0, 0.5, 0.5, 0]
    assert bag.padding_idx == 3


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_gradients_are_clipped_as_torch_clips_dense_ones(max_norm, is_sparse):
    first, second, third = (torch.nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
    rows = torch.tensor([[0, 3, 0]])  # a row occurs twice: its norm is that of the sum
    gradient = torch.sparse_coo_tensor(
        rows, torch.tensor([[1.0, 2.0], [3.0, -1.0], [2.0, 2.0]]), (4, 2), check_invariants=True
    )
    first.grad, second.grad = gradient.to_dense(), torch.full((4, 2), 0.25)
    expected_norm = clip_grad_norm_([first, second, third], max_norm)
    expected = [first.grad, second.grad]
    first.grad, second.grad = gradient if is_sparse else gradient.to_dense(), torch.full((4, 2), 0.25)
    norm = clip_gradients([first, second, third], max_norm)
    torch.testing.assert_close(norm, expected_norm)
    assert float(norm) == pytest.approx((9 + 16 + 9 + 1 + 8 / 16) ** 0.5)
    assert first.grad.is_sparse == is_sparse
    torch.testing.assert_close([first.grad.to_dense(), second.grad], expected)


def test_the_norm_of_no_gradient_is_zero():
    assert float(clip_gradients([torch.nn.Parameter(torch.ones(2))], 1.0)) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_training_holds_the_unknown_token_and_then_releases_it(sparse, tmp_path, queries):
    read = Dataset.from_dict(
        {"text": [f"\u2603 {text}" for text in queries["text"]], "label_ids": queries["label_ids"]}
    )
    sampled = {"label_mode": "sampled", "label_sample_fraction": 0.3, "sparse_updates": True} if sparse else {}
    encoder = ENCODERS["phrases"]()
    bag, before = encoder[0].embedding, encoder[0].embedding.weight.detach().clone()
    unknown = bag.padding_idx
    assert unknown in encoder.preprocess(["\u2603"])["input_ids"]
    trainer = XMCTrainer(encoder, tiny_arguments(tmp_path, **sampled), read, labels=LABELS)
    for _ in range(2):
        bag.weight.data.copy_(before)
        trainer.train()
        assert not torch.equal(bag.weight, before)
        assert not bag.weight[unknown].any()
        assert bag.padding_idx is None
        assert not bag._forward_hooks


def test_a_user_can_hold_and_release_the_unknown_token():
    encoder = ENCODERS["phrases"]()
    bag = encoder[0].embedding
    expected, unknown = encoder.encode(TEXTS), bag.padding_idx
    release_unknown(encoder)
    assert (bag.padding_idx, len(bag._forward_hooks)) == (None, 0)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=1e-6)
    hold_unknown(encoder)
    hold_unknown(encoder)
    assert (bag.padding_idx, len(bag._forward_hooks)) == (unknown, 1)
