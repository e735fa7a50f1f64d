"""A static encoder starts from the embeddings that a pretrained encoder has of its words."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert, make_bert_encoder, make_static_encoder

from hf_xmc import XMCData, phrase_encoder, rewrite_phrases, standalone_encoder, static_encoder, train
from hf_xmc.encoders.pretrained_start import start_from
from hf_xmc.experiment.options import parse

TEXTS = rewrite_phrases([*LABELS, "a sailing boat", "an old oak tree", "sailing boats"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_bert_encoder(make_bert(tmp_path_factory.mktemp("bert"), dropout=0.3)).eval()


def started(pretrained, dim, std=0.5):
    encoder = phrase_encoder(TEXTS, embedding_dim=dim, device="cpu")
    before = encoder[0].embedding.weight.detach().clone()
    start_from(encoder, pretrained, std)
    return encoder, before, encoder[0].embedding.weight.detach()


def test_words_keep_the_pretrained_products_and_pairs_are_means(pretrained):
    encoder, before, table = started(pretrained, 16)
    vocab = encoder[0].tokenizer.get_vocab()
    used = [token for token, row in vocab.items() if before[row].any()]
    words = [token for token in used if "_" not in token]
    wanted = pretrained.encode([word.removeprefix("##") for word in words], normalize_embeddings=True)
    wanted = wanted - wanted.mean(0)
    wanted *= 0.5 / np.sqrt(np.square(wanted).mean())
    found = table[[vocab[word] for word in words]].numpy()
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-4)  # as turned, not changed
    assert np.square(found).mean() == pytest.approx(0.25, rel=1e-4)
    pairs = [token for token in used if "_" in token]
    assert "sailing_boat" in pairs
    for pair in pairs:
        one, other = pair.split("_")
        torch.testing.assert_close(table[vocab[pair]], (table[vocab[one]] + table[vocab[other]]) / 2)


def test_tokens_of_no_text_stay_at_zero(pretrained):
    _, before, table = started(pretrained, 16)
    unused = ~before.any(1)
    assert unused.sum() > 3
    assert not table[unused].any()


def test_fewer_dimensions_keep_the_most_of_the_products(pretrained):
    whole, few = started(pretrained, 16)[2], started(pretrained, 5)[2]
    scale = (few.square().sum() / whole[:, :5].square().sum()).sqrt()
    torch.testing.assert_close(few.abs(), (scale * whole[:, :5]).abs(), atol=1e-4, rtol=1e-3)
    assert (whole.square().sum(0).diff() <= 1e-4).all()  # the axes are in the order of their variance


def test_more_dimensions_keep_their_random_values(pretrained):
    _, before, table = started(pretrained, 20)
    torch.testing.assert_close(table[:, 16:], before[:, 16:])
    assert (table[:, :16] != before[:, :16]).any()


def test_the_pretrained_encoder_does_not_change(pretrained):
    before = pretrained.encode(LABELS)
    started(pretrained, 16)
    np.testing.assert_array_equal(pretrained.encode(LABELS), before)


def test_byte_pairs_start_from_their_text(pretrained):
    encoder = static_encoder(LABELS, embedding_dim=16, device="cpu")
    used = {
        token: row for token, row in encoder[0].tokenizer.get_vocab().items() if encoder[0].embedding.weight[row].any()
    }
    start_from(encoder, pretrained, 0.5)
    wanted = pretrained.encode(list(used), normalize_embeddings=True)
    wanted = wanted - wanted.mean(0)
    found = encoder[0].embedding.weight.detach()[list(used.values())].numpy()
    scale = 0.5 / np.sqrt(np.square(wanted).mean())
    np.testing.assert_allclose(found @ found.T, scale**2 * wanted @ wanted.T, atol=1e-4)


def test_an_encoder_with_layers_is_refused(pretrained):
    with pytest.raises(ValueError, match="must be a single StaticEmbedding, got Transformer, Pooling"):
        start_from(pretrained, pretrained, 0.5)
    with pytest.raises(ValueError, match="must be a single StaticEmbedding, got Transformer, Pooling"):
        start_from(standalone_encoder(phrase_encoder(TEXTS, device="cpu")), pretrained, 0.5)


def test_setting_is_refused_for_an_encoder_with_pretrained_vectors(tmp_path):
    with pytest.raises(
        ValueError, match="`start_from` needs a model built from the data: static or phrases, got 'bert'"
    ):
        parse(["--data", "d", "--output_dir", str(tmp_path), "--model", "bert", "--start_from", "minilm"])


@pytest.mark.parametrize("encoder", ["static", "phrases"])
def test_training_starts_from_a_saved_encoder(tmp_path, encoder):
    make_static_encoder().save(str(tmp_path / "pretrained"))
    data = XMCData.from_lists(LABELS * 3, [[label] for label in LABELS * 3])  # no word is rare, so no letters are read
    settings = {"embedding_dim": 16, "memory": False, "learning_rate": 1e-12, "label_vectors": 0.0, "use_cpu": True}
    settings |= {"output_dir": tmp_path / "run", "start_from": str(tmp_path / "pretrained"), "validation_size": 0}
    model = train(data, encoder, **settings)
    found = model.embed(["red", "boat", "tree"])
    wanted = make_static_encoder().encode(["red", "boat", "tree"], normalize_embeddings=True)
    products = [(table[:1] - table[1:]) @ (table[:1] - table[1:]).T for table in (found, wanted)]  # of differences
    np.testing.assert_allclose(products[0] / products[0][0, 0], products[1] / products[1][0, 0], atol=1e-3)
