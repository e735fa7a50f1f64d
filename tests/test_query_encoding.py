"""One query is embedded as `encode_query` does it, whatever the encoder."""

import pytest
import torch
from conftest import make_bert_encoder, make_router, make_static_encoder

from hf_xmc import phrase_encoder, standalone, write_phrases
from hf_xmc.query_encoding import encode_queries

TEXTS = ["a red boat", "old oak tree"]


def prompted(encoder):
    encoder.prompts["query"] = "old "
    return encoder


def default_prompt(encoder):
    encoder.prompts["words"] = "red "
    encoder.default_prompt_name = "words"
    del encoder.prompts["query"]
    return encoder


def router(encoder):
    encoder[0].default_route = "document"
    torch.nn.init.ones_(encoder[0].sub_modules["document"][0].auto_model.embeddings.word_embeddings.weight)
    return encoder


def cut(encoder):
    encoder.truncate_dim = 5
    return encoder


@pytest.fixture(params=["static", "phrases", "bert", "router", "prompt", "default prompt", "cut"])
def encoder(request, bert_folder):
    return {
        "static": make_static_encoder,
        "phrases": lambda: standalone(phrase_encoder(write_phrases([*TEXTS, *TEXTS]), embedding_dim=16)),
        "bert": lambda: make_bert_encoder(bert_folder).train(),  # dropout must be off
        "router": lambda: router(make_router(bert_folder)),
        "prompt": lambda: prompted(make_bert_encoder(bert_folder)),
        "default prompt": lambda: default_prompt(make_bert_encoder(bert_folder)),
        "cut": lambda: cut(make_static_encoder()),
    }[request.param]()


def test_one_query_and_several_are_embedded_as_the_encoder_does_it(encoder):
    found = encode_queries(encoder, TEXTS[:1], 8)
    torch.testing.assert_close(found, encoder.encode_query(TEXTS[:1], convert_to_tensor=True))
    assert not found.requires_grad
    torch.testing.assert_close(encode_queries(encoder, TEXTS, 8), encoder.encode_query(TEXTS, convert_to_tensor=True))
    assert len(encode_queries(encoder, [], 8)) == 0
