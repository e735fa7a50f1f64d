"""Encoders in bfloat16, float16 and float64 train, save and search like those in float32."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder, relevance_of
from helpers.training import tiny_arguments
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import (
    FaissIndex,
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    XMCTrainingArguments,
    mine_hard_negatives,
    phrase_encoder,
    rewrite_phrases,
    standalone_encoder,
)
from hf_xmc.encoders.encode import encode_labels, encode_queries
from hf_xmc.search.exact import LabelIndex

TEXTS = ["text 1 about boat and sailing boat", "text 4 about animal"]
STORED = {torch.bfloat16: torch.float32, torch.float16: torch.float16, torch.float64: torch.float32}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def dtype(request):
    return request.param


@pytest.fixture(params=["static", "bert", "cosine"])
def encoder(request, bert_folder, dtype):
    encoder = make_static_encoder() if request.param == "static" else make_bert_encoder(bert_folder)
    encoder.similarity_fn_name = "cosine" if request.param == "cosine" else "dot"
    return encoder.to(dtype)


def test_products_equal_the_similarity_in_every_precision(encoder, dtype):
    labels, queries = encode_labels(encoder, LABELS, 4), encode_queries(encoder, TEXTS, 4)
    assert labels.dtype == queries.dtype == encode_queries(encoder, TEXTS[:1], 4).dtype == STORED[dtype]
    documents, texts = (
        part(x, convert_to_tensor=True).float()
        for part, x in zip((encoder.encode_document, encoder.encode_query), (LABELS, TEXTS), strict=True)
    )
    torch.testing.assert_close(
        queries.float() @ labels.float().T, encoder.similarity(texts, documents), rtol=2e-3, atol=2e-3
    )


def test_encode_labels_restores_rounded_norms(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    encoder.append(Normalize())
    encoder.bfloat16()
    rounded = encoder.encode_document(LABELS, convert_to_tensor=True).float().norm(dim=1)
    assert (rounded - 1).abs().max() > 1e-4
    torch.testing.assert_close(encode_labels(encoder, LABELS, 4).norm(dim=1), torch.ones(11), rtol=0, atol=1e-3)


def test_model_changes_saves_and_predicts_in_every_precision(encoder, dtype, tmp_path, queries):
    model = XMCModel(encoder, LABELS)
    assert model.index.embeddings.dtype == STORED[dtype]
    model.add_labels(["red car"])
    model.rename_label("3", "old dog")
    expected = XMCModel(encoder, [*LABELS[:3], "old dog", *LABELS[4:], "red car"])
    torch.testing.assert_close(model.index.embeddings, expected.index.embeddings)
    model.remember(queries.map(lambda row: {"text": f"old {row['text']}"}))
    model.calibrate(queries)
    found = model.predict(TEXTS, top_k=3)
    assert model.explain(TEXTS[0], found[0][0].uid).score == pytest.approx(found[0][0].score, abs=1e-5)
    model.save_pretrained(tmp_path)
    again = XMCModel.from_pretrained(tmp_path, device="cpu")
    assert again.encoder.dtype == dtype
    assert torch.equal(again.index.embeddings, model.index.embeddings)
    for ours, theirs in zip(found, again.predict(TEXTS, top_k=3), strict=True):
        assert [one.uid for one in ours] == [one.uid for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-3)
    for long_text in ("mean", "max"):
        again.long_text = long_text
        assert len(again.predict(["text about boat " * 30])[0]) == 5


def test_evaluator_and_mining_work_in_every_precision(encoder, queries):
    ranked = LabelIndex(encode_labels(encoder, LABELS, 4)).search(encode_queries(encoder, queries["text"], 32), 11)
    evaluator = XMCEvaluator(TEXTS, relevance_of([[0], [1]]), LABELS)
    assert 0 <= evaluator(encoder)["P@1"] <= 1
    best = [label for label in ranked.label_ids[2] if label != 2]
    assert mine_hard_negatives(encoder, queries, LABELS, 3)[2].tolist() == best[:3]


@pytest.mark.parametrize("encoder", ["static", "bert"], indirect=True)
@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_encoder_trains_in_every_label_mode_and_precision(encoder, dtype, queries, tmp_path, mode):
    args = tiny_arguments(tmp_path, label_mode=mode, label_sample_fraction=0.5, num_random_negatives=4, max_steps=2)
    before = encoder.encode_document(LABELS, convert_to_tensor=True)
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS)
    trainer.train()
    assert {weight.dtype for weight in encoder.parameters()} == {dtype}
    assert all(weight.isfinite().all() for weight in encoder.parameters())
    assert (encoder.encode_document(LABELS, convert_to_tensor=True) - before).abs().max() > 0.01
    assert np.isfinite(trainer.evaluate(queries)["eval_loss"])


def test_given_embeddings_are_accepted_in_half_precision(encoder, dtype):
    embeddings = encoder.encode_document(LABELS, convert_to_tensor=True)
    assert embeddings.dtype == dtype
    given, computed = XMCModel(encoder, LABELS, embeddings), XMCModel(encoder, LABELS)
    assert given.search(TEXTS, 11).label_ids.tolist() == computed.search(TEXTS, 11).label_ids.tolist()
    if dtype == torch.float64:
        with pytest.raises(ValueError, match=r"of float32 or float16, got .* of torch.float64"):
            LabelIndex(embeddings)
        return
    index = LabelIndex(embeddings)
    assert index.embeddings.dtype == STORED[dtype]
    assert torch.equal(index.embeddings, embeddings.to(STORED[dtype]))
    index.add(embeddings[:2].float())
    index.replace([0], embeddings[1:2])
    assert torch.equal(index.embeddings[0].float(), embeddings[1].float())
    fast = FaissIndex(embeddings, "Flat")
    assert (
        fast.search(embeddings[3:4], 3).label_ids.tolist()
        == LabelIndex(embeddings).search(embeddings[3:4].float(), 3).label_ids.tolist()
    )


def test_standalone_encoder_works_in_every_precision(dtype, tmp_path):
    trained = phrase_encoder(rewrite_phrases([*LABELS, *TEXTS] * 2), embedding_dim=16, device="cpu").to(dtype)
    plain = standalone_encoder(trained)
    assert plain.dtype == dtype
    torch.testing.assert_close(
        plain.encode_query(TEXTS, convert_to_tensor=True).float(),
        trained.encode_query(rewrite_phrases(TEXTS), convert_to_tensor=True).float(),
        rtol=0.02,
        atol=0.02,
    )
    model = XMCModel(plain, LABELS)
    model.save_pretrained(tmp_path)
    again = XMCModel.from_pretrained(tmp_path, device="cpu")
    assert again.encoder.dtype == dtype
    assert again.predict(TEXTS) == model.predict(TEXTS)


def test_memory_holds_queries_whose_norm_exceeds_half_precision(queries):
    encoder = make_static_encoder()
    with torch.no_grad():
        encoder[0].embedding.weight.mul_(1e6)
    model = XMCModel(encoder.bfloat16(), LABELS)
    model.remember(queries)
    torch.testing.assert_close(model.memory.index.embeddings.float().norm(dim=1), torch.ones(13), rtol=0, atol=2e-3)


def test_model_trained_in_mixed_precision_embeds_the_same_after_loading(bert_folder, queries, tmp_path):
    ends = []
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": True}
    args = XMCTrainingArguments(str(tmp_path / "run"), max_steps=1, learning_rate=0.01, **settings)
    trainer = XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS)
    for _ in range(2):
        trainer.train()
        model = XMCModel(trainer.model, LABELS)
        model.save_pretrained(tmp_path / "model")
        loaded = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
        assert torch.equal(XMCModel(loaded.encoder, LABELS).index.embeddings, model.index.embeddings)
        assert loaded.predict(TEXTS) == model.predict(TEXTS)
        ends.append(model.index.embeddings)
    assert (ends[0] - ends[1]).norm() > 0.001, "the second training did nothing"


def test_push_during_a_mixed_precision_run_has_full_precision(bert_folder, queries, tmp_path, monkeypatch):
    pushed = []
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": True}
    args = XMCTrainingArguments(str(tmp_path), max_steps=2, save_steps=1, learning_rate=0.01, **settings)
    trainer = XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS)
    monkeypatch.setattr(XMCModel, "push_to_hub", lambda model, *_, **__: pushed.append(model.index.embeddings))
    stock, wrapped = trainer._save_checkpoint, []

    def save(model, trial):
        stock(model, trial)
        trainer.push_to_hub()
        wrapped.append("forward" in vars(trainer.model))

    trainer._save_checkpoint = save
    trainer.train()
    assert wrapped == [True, True], "the run does not go on in mixed precision"
    plain = make_bert_encoder(bert_folder)
    plain.load_state_dict(trainer.model.state_dict())
    plain.similarity_fn_name = "dot"
    assert torch.equal(pushed[-1], XMCModel(plain, LABELS).index.embeddings)
