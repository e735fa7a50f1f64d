"""The losses in the stock trainer: gradients of the formula, positives never negatives, caching and processes."""

import copy
import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LABELS, POSITIVES, make_bert, make_bert_encoder, make_static_encoder, relevance_of
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Router
from sentence_transformers.util import cos_sim, dot_score

from hf_xmc import ExtremeMultilabelClassificationEvaluator, XMCData, functional, st_losses

LOSSES = {
    "decoupled": (st_losses.DecoupledSoftmaxLoss, functional.decoupled_softmax_loss, {}),
    "softmax": (st_losses.SoftmaxLoss, functional.softmax_loss, {}),
    "soft top-k": (st_losses.SoftTopKLoss, lambda s, p: functional.soft_top_k_loss(s, p, 3), {"k": 3}),
    "bce": (st_losses.BCELoss, lambda s, p: functional.bce_loss(s, p, bias=-3.0), {"bias": -3.0}),
}


def rows(queries, **settings):
    """The data set, its positives drawn once and for all."""
    torch.manual_seed(7)
    drawn = st_losses.in_batch_dataset(queries, LABELS, **settings)
    return Dataset.from_list([drawn[i] for i in range(len(drawn))])


def hard_negatives():
    return np.random.default_rng(0).integers(-1, len(LABELS), (len(POSITIVES), 2)).clip(-100)


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("still"), dropout=0.0)


class Recording(SentenceTransformerTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def compute_loss(self, model, inputs, *rest, **kwargs):
        self.batches.append(copy.deepcopy(inputs))
        return super().compute_loss(model, inputs, *rest, **kwargs)


def arguments(folder, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 6,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return SentenceTransformerTrainingArguments(str(folder), **{**defaults, **settings})


def oracle(encoder, trainer, formula, similarity):
    """The float64 gradient, with a table of all labels where those of the batch have been put in their places."""
    exact = encoder.double()
    for batch in trainer.batches:
        features, label = trainer.collect_features(batch)
        queries, *candidates = (exact(column)["sentence_embedding"] for column in features)
        ids = label[:, : len(candidates)].T.reshape(-1).tolist()
        present = sorted({i for i in ids if i >= 0})
        chosen = torch.cat(candidates)[[ids.index(i) for i in present]]
        known = [[present.index(i) for i in row if i in present] for row in label[:, len(candidates) :].tolist()]
        width = max(map(len, known))
        positives = torch.tensor([row + [-100] * (width - len(row)) for row in known])
        (formula(similarity(queries, chosen) / 0.5, positives) / len(trainer.batches)).backward()
    return exact


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("kind", "cache", "accumulation", "similarity", "negatives"),
    [
        ("static", {}, 1, dot_score, False),
        ("static", {}, 2, cos_sim, True),
        ("bert", {}, 1, cos_sim, True),
        ("bert", {"mini_batch_size": 4}, 1, cos_sim, True),
        ("bert", {"mini_batch_size": 4}, 2, dot_score, False),
        ("bert", {"mini_batch_num_tokens": 20}, 1, cos_sim, False),
    ],
)
def test_a_step_is_the_gradient_of_the_formula(
    name, kind, cache, accumulation, similarity, negatives, queries, still_bert, tmp_path
):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    before = copy.deepcopy(encoder)
    make, formula, settings = LOSSES[name]
    loss = make(encoder, temperature=0.5, similarity_fct=similarity, **settings, **cache)
    dataset = rows(queries, hard_negatives=hard_negatives() if negatives else None)
    trainer = Recording(encoder, arguments(tmp_path, gradient_accumulation_steps=accumulation), dataset, loss=loss)
    trainer.train()
    assert len(trainer.batches) == accumulation
    exact = oracle(before, trainer, formula, similarity)
    for (parameter, after), start in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        expected = start if start.grad is None else start - start.grad
        torch.testing.assert_close(
            after.double(), expected, rtol=1e-4, atol=2e-5, msg=lambda text, parameter=parameter: f"{parameter}: {text}"
        )
    assert max(float(p.grad.norm()) for p in exact.parameters() if p.grad is not None) > 0.01


def gradients(encoder, loss, features, label):
    encoder.zero_grad()
    loss.zero_grad()
    torch.manual_seed(3)
    value = loss([dict(column) for column in features], label)
    (value / 2).backward()
    return value.item(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def collated(encoder, dataset, size=6):
    columns = [name for name in dataset.column_names if name != "label"]
    features = [encoder.preprocess(dataset[:size][name]) for name in columns]
    return features, torch.tensor(dataset[:size]["label"])


@pytest.mark.parametrize("name", LOSSES)
def test_caching_changes_no_gradient_with_dropout_on(name, queries, bert_folder):
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


def test_the_three_ways_to_tell_positives_are_one(queries):
    encoder = make_static_encoder()
    padded = rows(queries)
    features, label = collated(encoder, padded)
    kept = [row for row, ids in enumerate(POSITIVES) if ids]
    by_row = torch.tensor([[row, ids[0]] for row, ids in zip(kept, label.tolist(), strict=False)])
    expected = gradients(encoder, st_losses.DecoupledSoftmaxLoss(encoder), features, label)
    given = gradients(
        encoder, st_losses.DecoupledSoftmaxLoss(encoder, relevance=relevance_of(POSITIVES)), features, by_row
    )
    collator = st_losses.InBatchCollator(preprocess_fn=encoder.preprocess, router_mapping={}, prompts={})
    ragged = rows(queries, ragged=True)
    assert len({len(ids) for ids in ragged[:6]["label"]}) > 1
    batch = collator([ragged[i] for i in range(6)])
    collated_ragged = gradients(encoder, st_losses.DecoupledSoftmaxLoss(encoder), features, batch["label"])
    for got in (given, collated_ragged):
        assert got[0] == pytest.approx(expected[0], rel=1e-6)
        torch.testing.assert_close(got[1], expected[1])


def test_a_known_positive_is_no_negative_and_a_label_drawn_twice_counts_once():
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


def test_labels_with_equal_texts_are_one():
    queries = Dataset.from_dict({"text": ["a", "b", "c"], "label_ids": [[0], [2], []]})
    dataset = rows_of(queries, ["boat", "car", "boat"])
    assert [row["label"] for row in dataset] == [[0, 0], [0, 0]]


def rows_of(queries, labels):
    dataset = st_losses.in_batch_dataset(queries, labels)
    return [dataset[i] for i in range(len(dataset))]


def test_positives_are_drawn_anew_and_all_of_them_come(queries):
    torch.manual_seed(0)
    dataset = st_losses.in_batch_dataset(queries, LABELS)
    seen = {dataset[11 - 1]["positive"] for _ in range(60)}  # the query of labels 0, 8 and 3
    assert seen == {"boat", "blue", "animal"}
    torch.manual_seed(0)
    again = [dataset[3]["positive"] for _ in range(9)]
    torch.manual_seed(0)
    assert [dataset[3]["positive"] for _ in range(9)] == again


def test_a_hard_negative_that_is_a_positive_is_not_used(queries):
    negatives = np.array([[ids[0] if ids else 0, 5] for ids in POSITIVES])
    for row in rows(queries, hard_negatives=negatives):
        _, first, second, *known = row["label"]
        assert first == -100
        assert row["negative_1"] == ""
        assert second == (-100 if 5 in known else 5)


def test_prompts_routers_and_matryoshka(queries, still_bert, tmp_path):
    first, second = make_bert_encoder(still_bert), make_bert_encoder(still_bert)
    router = Router.for_query_document(query_modules=list(first), document_modules=list(second))
    encoder = SentenceTransformer(modules=[router], device="cpu", prompts={"query": "text about ", "document": ""})
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    inner = st_losses.DecoupledSoftmaxLoss(encoder, mini_batch_size=4)
    args = arguments(
        tmp_path,
        router_mapping={"anchor": "query", "positive": "document"},
        prompts={"anchor": "text about "},
        max_steps=2,
    )
    trainer = SentenceTransformerTrainer(
        encoder, args, rows(queries), loss=MatryoshkaLoss(encoder, inner, matryoshka_dims=[16, 8])
    )
    trainer.train()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert any("query" in name for name in moved)
    assert any("document" in name for name in moved)


def test_the_card_and_the_model_need_nothing_of_ours(queries, tmp_path):
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
        st_losses.in_batch_dataset(queries, LABELS),
        loss=st_losses.DecoupledSoftmaxLoss(encoder, temperature=0.1),
        evaluator=ExtremeMultilabelClassificationEvaluator.from_data(data, "validation"),
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
    code = "import sys; sys.modules['hf_xmc'] = None\n"
    code += "from sentence_transformers import SentenceTransformer as S; print(*S(sys.argv[1]).encode('boat').tolist())"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True)
    assert list(map(float, done.stdout.split())) == pytest.approx(encoder.encode("boat").tolist())


def test_bad_input_says_what_was_got(queries):
    encoder = make_static_encoder()
    features, label = collated(encoder, rows(queries))
    loss = st_losses.DecoupledSoftmaxLoss(encoder)
    with pytest.raises(ValueError, match="needs a column `label` of 2 or more integers a row"):
        loss(features, None)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(6,\)"):
        loss(features, label[:, 0])
    with pytest.raises(ValueError, match="one or more of candidates, got 1 column"):
        loss(features[:1], label)
    with pytest.raises(ValueError, match="every candidate's id is -100"):
        loss(features, torch.full((6, 2), -100))
    with pytest.raises(ValueError, match="a row below 13; got 2 numbers, rows up to 99"):
        st_losses.DecoupledSoftmaxLoss(encoder, relevance=relevance_of(POSITIVES))(features, torch.full((6, 2), 99))
    with pytest.raises(ValueError, match="similarity_fct is cos_sim or dot_score"):
        st_losses.DecoupledSoftmaxLoss(encoder, similarity_fct=torch.cdist)
    with pytest.raises(ValueError, match="cannot be split into mini-batches"):
        st_losses.DecoupledSoftmaxLoss(encoder, mini_batch_size=4)
    with pytest.raises(ValueError, match="hard_negatives has 2 rows, and there are 13 queries"):
        st_losses.in_batch_dataset(queries, LABELS, hard_negatives=np.zeros((2, 1), dtype=int))


def test_with_one_positive_each_softmax_is_the_loss_it_replaces():
    encoder = make_static_encoder()
    features = [encoder.preprocess(texts) for texts in (["a dog", "the cat", "car"], ["dog", "cat", "car"])]
    label = torch.tensor([[4, 4], [5, 5], [2, 2]])
    theirs = MultipleNegativesRankingLoss(encoder)([dict(f) for f in features], None)
    torch.testing.assert_close(st_losses.SoftmaxLoss(encoder)([dict(f) for f in features], label), theirs)


def test_the_doctests_hold():
    results = doctest.testmod(st_losses)
    assert results.attempted >= 3
    assert results.failed == 0
