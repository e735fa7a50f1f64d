"""Queries and labels are embedded and compared as by the encoder itself."""

import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, make_bert_encoder, make_heads, make_router, make_static_encoder, relevance_of
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import (
    XMCEvaluator,
    XMCModel,
    mine_hard_negatives,
    phrase_encoder,
    rewrite_phrases,
    standalone_encoder,
)
from hf_xmc.encoders.encode import compares_by_cosine, encode_labels, encode_queries

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


@pytest.fixture(params=["static", "phrases", "bert", "router", "heads", "prompt", "default prompt", "cut"])
def encoder(request, bert_folder):
    return {
        "static": make_static_encoder,
        "phrases": lambda: standalone_encoder(phrase_encoder(rewrite_phrases([*TEXTS, *TEXTS]), embedding_dim=16)),
        "bert": lambda: make_bert_encoder(bert_folder).train(),  # dropout must be off
        "router": lambda: router(make_router(bert_folder)),
        "heads": lambda: make_heads(bert_folder),
        "prompt": lambda: prompted(make_bert_encoder(bert_folder)),
        "default prompt": lambda: default_prompt(make_bert_encoder(bert_folder)),
        "cut": lambda: cut(make_static_encoder()),
    }[request.param]()


def test_products_equal_the_similarity_of_the_encoder(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    for name in ("cosine", "dot"):
        encoder.similarity_fn_name = name
        queries, labels = encode_queries(encoder, TEXTS, 8), encode_labels(encoder, LABELS, 8)
        expected = encoder.similarity(encoder.encode_query(TEXTS), encoder.encode_document(LABELS))
        torch.testing.assert_close(queries @ labels.T, expected)
    assert not torch.allclose(labels.norm(dim=1), torch.ones(11), rtol=0.1)
    encoder.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="compares by euclidean distance"):
        encode_labels(encoder, LABELS, 8)


def test_cosine_encoders_give_unit_vectors_for_empty_texts_and_half_precision(bert_folder):
    encoder = make_static_encoder().half()
    encoder.similarity_fn_name = "cosine"
    labels = encode_labels(encoder, [" ", *LABELS], 8)
    assert labels.dtype == torch.float16
    assert labels[0].norm() == 0
    torch.testing.assert_close(labels[1:].float().norm(dim=1), torch.ones(11), rtol=1e-3, atol=1e-3)
    cut = make_bert_encoder(bert_folder)
    cut.append(Normalize())
    cut.truncate_dim = 5
    torch.testing.assert_close(encode_labels(cut, LABELS, 8).norm(dim=1), torch.ones(11))


def test_model_and_evaluator_rank_by_the_similarity_of_the_encoder(bert_folder):
    encoder = make_bert_encoder(bert_folder)  # compares by the cosine, and has no module that normalises
    queries, documents = encoder.encode_query(TEXTS), encoder.encode_document(LABELS)
    cosines = encoder.similarity(queries, documents).sort(descending=True)
    products = (torch.from_numpy(queries) @ torch.from_numpy(documents).T).argsort(descending=True)
    assert not torch.equal(cosines.indices, products)
    model = XMCModel(encoder, LABELS, documents)
    assert model.search(TEXTS, 11).label_ids.tolist() == cosines.indices.tolist()
    with pytest.raises(ValueError, match="`norm` must be None for an encoder that compares by the cosine, got 2"):
        model.add_labels(["pine"], norm=2)
    model = XMCModel(encoder, LABELS)
    model.rename_label("4", LABELS[4])
    model.remove_labels(["10"])
    model.add_labels([LABELS[10]])
    for long_text in ("truncate", "mean"):
        model.long_text = long_text
        found = model.search(TEXTS, 11)
        assert found.label_ids.tolist() == cosines.indices.tolist()
        torch.testing.assert_close(torch.from_numpy(found.scores), cosines.values)
    evaluator = XMCEvaluator(TEXTS, relevance_of([[0], [1]]), LABELS)
    assert evaluator.predict(encoder).label_ids[:, :5].tolist() == cosines.indices[:, :5].tolist()
    mined = mine_hard_negatives(encoder, Dataset.from_dict({"text": TEXTS, "label_ids": [[], []]}), LABELS, 11)
    assert torch.equal(mined.long(), cosines.indices)


def test_encode_queries_equals_encode_query_for_one_text_and_several(encoder):
    expected = encoder.encode_query(TEXTS, convert_to_tensor=True)
    if compares_by_cosine(encoder):
        expected = torch.nn.functional.normalize(expected)
    found = encode_queries(encoder, TEXTS[:1], 8)
    torch.testing.assert_close(found, expected[:1])
    assert not found.requires_grad
    torch.testing.assert_close(encode_queries(encoder, TEXTS, 8), expected)
    assert len(encode_queries(encoder, [], 8)) == 0
