"""The losses in the stock trainer: gradients of the formula, excluded positives, caching and processes."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.in_batch import (
    BIAS,
    LOSSES,
    TEMPERATURE,
    arguments,
    assert_same_weights,
    hard_negatives,
    one_step_after,
    rows,
)
from helpers.tiny import LABELS, POSITIVES, make_bert_encoder, make_static_encoder, relevance_of
from helpers.training import StockRecording
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from hf_xmc import (
    InBatchCollator,
    XMCData,
    XMCEvaluator,
    in_batch_dataset,
    losses,
    relevance_matrix,
    st_losses,
)
from hf_xmc.losses import functional

# Two losses, one of them with learned parameters, on all cells, and the others on one cell each.
CELLS = [
    ("static", {}, 1, dot_score, False),
    ("static", {}, 2, cos_sim, True),
    ("static", {}, 1, euclidean_sim, True),
    ("bert", {}, 1, cos_sim, True),
    ("bert", {}, 2, dot_score, False),
    ("bert", {"mini_batch_size": 4}, 1, cos_sim, True),
    ("bert", {"mini_batch_size": 4}, 2, dot_score, False),
    ("bert", {"mini_batch_num_tokens": 20}, 1, euclidean_sim, False),
    ("bert", {"mini_batch_num_tokens": 20}, 2, cos_sim, True),
]
GRID = [(name, *cell) for name in ("decoupled", "bce") for cell in CELLS]
GRID += [("softmax", *CELLS[5]), ("soft top-k", *CELLS[8])]


@pytest.mark.parametrize(("name", "kind", "cache", "accumulation", "similarity", "negatives"), GRID)
def test_step_has_the_gradient_of_the_formula(
    name, kind, cache, accumulation, similarity, negatives, queries, still_bert, tmp_path
):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    before = copy.deepcopy(encoder)
    make, _, own = LOSSES[name]
    loss = make(encoder, temperature=TEMPERATURE, similarity_fct=similarity, **own, **cache)
    dataset = rows(queries, hard_negatives=hard_negatives() if negatives else None)
    trainer = StockRecording(encoder, arguments(tmp_path, gradient_accumulation_steps=accumulation), dataset, loss=loss)
    trainer.train()
    assert len(trainer.batches) == accumulation
    expected, largest = one_step_after(before, name, [[batch] for batch in trainer.batches], similarity)
    assert largest > 0.01
    assert_same_weights(dict(loss.named_parameters()), expected)


def gradients(encoder, loss, features, label, forward=None):
    encoder.zero_grad()
    loss.zero_grad()
    torch.manual_seed(3)
    value = (forward or loss)([dict(column) for column in features], label)
    (value / 2).backward()
    return value.item(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def collated(encoder, dataset, size=6):
    columns = [name for name in dataset.column_names if name != "label"]
    features = [encoder.preprocess(dataset[:size][name]) for name in columns]
    return features, torch.tensor(dataset[:size]["label"])


@pytest.mark.parametrize("name", LOSSES)
def test_caching_leaves_the_gradient_the_same_with_dropout(name, queries, bert_folder):
    """One mini-batch draws the masks that the plain pass draws; several must replay their own."""
    encoder = make_bert_encoder(bert_folder).train()
    features, label = collated(encoder, rows(queries))
    make, _, settings = LOSSES[name]
    plain = gradients(encoder, make(encoder, **settings), features, label)
    cached = gradients(encoder, make(encoder, mini_batch_size=100, **settings), features, label)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert cached[1].keys() == plain[1].keys()
    for parameter, gradient in plain[1].items():
        torch.testing.assert_close(cached[1][parameter], gradient, rtol=1e-3, atol=1e-5)
    value, _ = gradients(encoder, make(encoder, mini_batch_size=2, **settings), features, label)
    assert value != pytest.approx(plain[0], rel=1e-5), "dropout is off"


@pytest.mark.parametrize("name", LOSSES)
def test_mini_batches_replay_their_own_masks(name, queries, bert_folder):
    """What is cached equals the same mini-batches embedded with a gradient, all kept, with the same dropout."""
    encoder = make_bert_encoder(bert_folder).train()
    features, label = collated(encoder, rows(queries, hard_negatives=hard_negatives(1)))
    make, _, settings = LOSSES[name]
    cached = gradients(encoder, make(encoder, mini_batch_size=4, **settings), features, label)
    loss = make(encoder, **settings)

    def embed(column, start):
        width = int(column["attention_mask"][start : start + 4].sum(1).max())  # mini-batches hold no needless padding
        part = {k: v[start : start + 4, :width] if torch.is_tensor(v) else v for k, v in column.items()}
        return encoder(part)["sentence_embedding"]

    def kept(features, label):
        return loss.calculate_loss([[embed(column, start) for start in (0, 4)] for column in features], label)

    plain = gradients(encoder, loss, features, label, forward=kept)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert cached[1].keys() == plain[1].keys()
    assert max(float(gradient.norm()) for gradient in plain[1].values()) > 0.01
    for parameter, gradient in plain[1].items():
        torch.testing.assert_close(cached[1][parameter], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("positives", ["ragged", "row"])
def test_three_forms_of_positives_train_the_same(positives, queries, tmp_path):
    """Label 11 has the text of label 0: they are one, in whichever way it is told."""
    labels = [*LABELS, LABELS[0]]
    ids = [[11 if i == 0 and row % 2 else i for i in known] for row, known in enumerate(POSITIVES)]
    queries = queries.remove_columns("label_ids").add_column("label_ids", ids)

    def trained(positives, collator=None, **settings):
        torch.manual_seed(7)
        drawn = in_batch_dataset(queries, labels, hard_negatives=hard_negatives(1), positives=positives)
        dataset = Dataset.from_list([drawn[i] for i in range(len(drawn))])
        encoder = make_static_encoder()
        loss = st_losses.DecoupledSoftmaxLoss(encoder, **settings)
        collator = collator and collator(preprocess_fn=encoder.preprocess, router_mapping={}, prompts={})
        trainer = StockRecording(encoder, arguments(tmp_path, max_steps=2), dataset, loss=loss, data_collator=collator)
        trainer.train()
        return dict(encoder.named_parameters()), [label.shape[1] for _, label in trainer.batches]

    if positives == "ragged":
        got, widths = trained("ragged", InBatchCollator)
    else:
        got, widths = trained("row", relevance=relevance_matrix(queries, labels))
    expected, padded = trained("padded")
    assert_same_weights(got, expected)
    assert max(widths) <= max(padded)
    assert not torch.equal(expected["0.embedding.weight"], make_static_encoder()[0].embedding.weight)


@pytest.mark.parametrize("cache", [{}, {"mini_batch_size": 4}], ids=["plain", "cached"])
@pytest.mark.parametrize("name", LOSSES)
def test_matryoshka_loss_is_the_sum_over_the_dimensions(name, cache, queries, still_bert):
    encoder = make_bert_encoder(still_bert)
    features, label = collated(encoder, rows(queries))
    make, formula, settings = LOSSES[name]
    inner = make(encoder, temperature=TEMPERATURE, **settings, **cache)
    got = gradients(encoder, MatryoshkaLoss(encoder, inner, matryoshka_dims=[16, 5]), features, label)
    exact = copy.deepcopy(encoder).double()
    queries, candidates = (exact(dict(column))["sentence_embedding"] for column in features)
    chosen, positives = st_losses.match_positives(label[:, 0], label[:, 1:])
    learned = {"loss.bias": torch.tensor(BIAS).double(), "loss.log_scale": torch.tensor(0.0).double()}
    total = sum(
        formula(cos_sim(queries[:, :dim], candidates[chosen, :dim]) / TEMPERATURE, positives, learned)
        for dim in (16, 5)
    )
    assert got[0] == pytest.approx(total.item(), rel=1e-5)
    (total / 2).backward()
    gradients_of = {n.split("model.", 1)[1]: g for n, g in got[1].items() if "model." in n}
    found = 0
    for parameter, weight in exact.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradients_of[parameter].double(), weight.grad, rtol=1e-3, atol=1e-5)
            found += float(weight.grad.norm()) > 0.01
    assert found > 5


def test_known_positive_is_no_negative_and_a_repeated_label_counts_once():
    encoder = make_static_encoder()
    queries = Dataset.from_dict({"text": ["a red boat", "a boat", "a dog"], "label_ids": [[0, 7], [0], [4]]})
    features, label = collated(encoder, rows(queries))
    label[0, 0] = 0
    features[1] = encoder.preprocess(["boat", "boat", "dog"])
    value = st_losses.DecoupledSoftmaxLoss(encoder, temperature=0.5)(features, label)
    queries, boat, dog = (encoder.encode(t, convert_to_tensor=True) for t in (queries["text"][:], "boat", "dog"))
    scores = cos_sim(queries, torch.stack([boat, dog])) / 0.5
    expected = functional.decoupled_softmax_loss(scores, torch.tensor([[0], [0], [1]]))
    torch.testing.assert_close(value, expected)


def test_labels_with_equal_texts_count_as_one():
    queries = Dataset.from_dict({"text": ["a", "b", "c"], "label_ids": [[0], [2], []]})
    dataset = rows_of(queries, ["boat", "car", "boat"])
    assert [row["label"] for row in dataset] == [[0, 0], [0, 0]]


def rows_of(queries, labels):
    dataset = in_batch_dataset(queries, labels)
    return [dataset[i] for i in range(len(dataset))]


def test_positives_are_redrawn_and_all_of_them_occur(queries):
    torch.manual_seed(0)
    dataset = in_batch_dataset(queries, LABELS)
    seen = {dataset[11 - 1]["positive"] for _ in range(60)}  # the query of labels 0, 8 and 3
    assert seen == {"boat", "blue", "animal"}
    torch.manual_seed(0)
    again = [dataset[3]["positive"] for _ in range(9)]
    torch.manual_seed(0)
    assert [dataset[3]["positive"] for _ in range(9)] == again


def test_hard_negative_that_is_a_positive_is_not_used(queries):
    negatives = np.array([[ids[0] if ids else 0, 5] for ids in POSITIVES])
    for row in rows(queries, hard_negatives=negatives):
        _, first, second, *known = row["label"]
        assert first == -100
        assert row["negative_1"] == ""
        assert second == (-100 if 5 in known else 5)


@pytest.mark.parametrize("cache", [{}, {"mini_batch_size": 4}], ids=["plain", "cached"])
def test_stock_trainer_applies_prompts_and_routers(cache, queries, still_bert, tmp_path):
    """Queries take their prompt and their route, labels theirs; the gradient is that of the formula."""
    first, second = make_bert_encoder(still_bert), make_bert_encoder(still_bert)
    router = Router.for_query_document(query_modules=list(first), document_modules=list(second))
    encoder = SentenceTransformer(modules=[router], device="cpu")
    before = copy.deepcopy(encoder)
    args = arguments(
        tmp_path, router_mapping={"anchor": "query", "positive": "document"}, prompts={"anchor": "text about "}
    )
    loss = st_losses.DecoupledSoftmaxLoss(encoder, temperature=TEMPERATURE, **cache)
    dataset = rows(queries)
    trainer = StockRecording(encoder, args, dataset, loss=loss)
    trainer.train()
    ((asked, answers), _) = trainer.batches[0]
    assert (asked["task"], answers["task"]) == ("query", "document")
    plain = encoder.preprocess(dataset["anchor"], task="query")["input_ids"]
    assert asked["input_ids"].shape[1] == plain.shape[1] + 2, "the prompt is missing"
    expected, _ = one_step_after(before, "decoupled", [trainer.batches], cos_sim)
    assert_same_weights(dict(loss.named_parameters()), expected)
    moved = {n for n, p in before.named_parameters() if not torch.equal(p.double(), expected[f"model.{n}"])}
    assert {name.split(".")[2] for name in moved} == {"query", "document"}


def test_every_epoch_draws_new_positives(queries, tmp_path):
    encoder = make_static_encoder()
    dataset = in_batch_dataset(queries, LABELS)
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=6, learning_rate=0.1)
    trainer = StockRecording(encoder, args, dataset, loss=st_losses.DecoupledSoftmaxLoss(encoder))
    trainer.train()
    drawn = {}
    for _, label in trainer.batches:
        for first, *known in label.tolist():
            drawn.setdefault(tuple(known), []).append(first)
    assert all(len(labels) % 6 == 0 for labels in drawn.values())
    assert all(label in known for known, labels in drawn.items() for label in labels)
    assert len(set(drawn[(0, 3, 8)])) > 1


def test_card_of_the_stock_trainer_names_loss_and_metrics(queries, tmp_path):
    encoder = make_static_encoder()
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}), validation=queries)
    args = arguments(
        tmp_path / "run",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="P@5",
    )
    trainer = SentenceTransformerTrainer(
        encoder,
        args,
        in_batch_dataset(queries, LABELS),
        loss=st_losses.DecoupledSoftmaxLoss(encoder, temperature=0.1),
        evaluator=XMCEvaluator.from_data(data, "validation"),
    )
    trainer.train()
    seen = [entry["eval_P@5"] for entry in trainer.state.log_history if "eval_P@5" in entry]
    assert len(seen) == 2
    assert trainer.state.best_metric == max(seen)
    encoder.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    for piece in (
        "DecoupledSoftmaxLoss",
        '"temperature": 0.1',
        "2310.10636",
        "P@5",
        "nDCG@5",
        "type: extreme-multilabel-classification",
    ):
        assert piece in card, piece


def test_invalid_input_is_named_in_the_error(queries, bert_folder):
    encoder = make_static_encoder()
    features, label = collated(encoder, rows(queries))
    loss = st_losses.DecoupledSoftmaxLoss(encoder)
    with pytest.raises(ValueError, match="`label` must be a column of at least 2 integers per row"):
        loss(features, None)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(6,\)"):
        loss(features, label[:, 0])
    with pytest.raises(ValueError, match="at least one of candidates, got 1 column"):
        loss(features[:1], label)
    with pytest.raises(ValueError, match="every id is -100"):
        loss(features, torch.full((6, 2), -100))
    with pytest.raises(ValueError, match="a row number below 13, got 2 numbers and row numbers up to 99"):
        st_losses.DecoupledSoftmaxLoss(encoder, relevance=relevance_of(POSITIVES))(features, torch.full((6, 2), 99))
    with pytest.raises(ValueError, match="`similarity_fct` must be a function, such as"):
        st_losses.DecoupledSoftmaxLoss(encoder, similarity_fct="cosine")
    with pytest.raises(ValueError, match="cannot be split into mini-batches"):
        st_losses.DecoupledSoftmaxLoss(encoder, mini_batch_size=4)
    with pytest.raises(ValueError, match="mini_batch_num_tokens must be at least 1, got 0"):
        st_losses.DecoupledSoftmaxLoss(make_bert_encoder(bert_folder), mini_batch_num_tokens=0)
    with pytest.raises(ValueError, match="`positives` must be one of padded, ragged, row, got 'sparse'"):
        in_batch_dataset(queries, LABELS, positives="sparse")
    with pytest.raises(ValueError, match="queries, row 0: label id 1, but there are only 1 labels"):
        in_batch_dataset(queries, LABELS[:1])
    with pytest.raises(ValueError, match="`hard_negatives` must have 13 rows, one per query, got 2"):
        in_batch_dataset(queries, LABELS, hard_negatives=np.zeros((2, 1), dtype=int))
    negatives = np.full((13, 2), -100)
    assert in_batch_dataset(queries, LABELS, hard_negatives=negatives)[0]["negative_1"] == ""
    assert in_batch_dataset(queries, LABELS, hard_negatives=torch.from_numpy(negatives))[0]["negative_1"] == ""
    negatives[5, 1] = 11
    with pytest.raises(ValueError, match="hard_negatives, row 5, has label id 11, but there are only 11 labels"):
        in_batch_dataset(queries, LABELS, hard_negatives=negatives)


def test_softmax_with_one_positive_equals_multiple_negatives_ranking():
    encoder = make_static_encoder()
    features = [encoder.preprocess(texts) for texts in (["a dog", "the cat", "car"], ["dog", "cat", "car"])]
    label = torch.tensor([[4, 4], [5, 5], [2, 2]])
    theirs = MultipleNegativesRankingLoss(encoder)([dict(f) for f in features], None)
    torch.testing.assert_close(st_losses.SoftmaxLoss(encoder)([dict(f) for f in features], label), theirs)


ALL = ["DecoupledSoftmaxLoss", "SoftmaxLoss", "SoftTopKLoss", "BCELoss"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("given", [(), (0.05,)])
def test_in_batch_loss_names_the_other_import_without_a_model(name, given):
    with pytest.raises(
        ValueError, match=rf"st_losses\.{name} must be the encoder to train.*hf_xmc\.losses\.{name}\(\)"
    ):
        getattr(st_losses, name)(*given)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["instance", "class"])
def test_stock_trainer_refuses_a_loss_of_all_labels_when_constructed(name, kind, queries, tmp_path):
    loss = getattr(losses, name)
    with pytest.raises(ValueError, match=rf"hf_xmc\.st_losses\.{name}\(model\)"):
        SentenceTransformerTrainer(
            make_static_encoder(), arguments(tmp_path), rows(queries), loss=loss() if kind == "instance" else loss
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("similarity", "normalised", "expected"),
    [(cos_sim, False, 0.05), (dot_score, True, 0.05), (euclidean_sim, True, 0.05), (dot_score, False, 1.0)],
)
def test_in_batch_temperature_follows_the_similarity(name, similarity, normalised, expected):
    encoder = make_static_encoder()
    if normalised:
        encoder.append(Normalize())
    make = getattr(st_losses, name)
    assert make(encoder, similarity_fct=similarity).get_config_dict()["temperature"] == expected
    assert make(encoder, similarity_fct=similarity, temperature=0.3).get_config_dict()["temperature"] == 0.3
