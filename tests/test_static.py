"""The encoder that needs no download."""

import pytest
import torch

from hf_xmc import static_encoder


def test_the_embedding_is_the_mean_of_its_tokens_and_case_does_not_matter():
    encoder = static_encoder(["a red boat", "a blue car"], embedding_dim=8, vocab_size=100)
    red, boat, both = encoder.encode(["red", "boat", "RED boat"], convert_to_tensor=True)
    torch.testing.assert_close((red + boat) / 2, both)
    assert encoder.similarity_fn_name == "dot"


def test_the_same_seed_gives_the_same_encoder():
    texts = ["a red boat", "a blue car"]
    one, same, other = (static_encoder(texts, embedding_dim=8, seed=seed)[0].embedding.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_texts_without_a_word():
    with pytest.raises(ValueError, match="no word was found in the texts"):
        static_encoder(["", "  "])
