"""Labels with several texts: every part numbers labels alike, and a label scores as the best of its texts."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.dataset_layouts import write_hub, write_jsonl, write_parquet
from helpers.losses import TRAINED
from helpers.tiny import (
    LABELS,
    POSITIVES,
    best_of_texts,
    make_bert,
    make_bert_encoder,
    make_static_encoder,
    relevance_of,
    several_texts,
)

from hf_xmc import (
    HardNegativeMiner,
    XMCData,
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    XMCTrainingArguments,
    cli,
    in_batch_dataset,
    load_xmc,
    losses,
    mine_hard_negatives,
    relevance_matrix,
    static_encoder,
    with_phrases,
)
from hf_xmc.data.labels import LabelTexts, label_numbers
from hf_xmc.losses import functional
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.mined_negatives import MinedNegatives
from hf_xmc.training.negatives import BatchQueries

TABLE, LABEL_OF = several_texts()
EVERYTHING = {"label_sample_fraction": 1.0, "num_hard_negatives": 11, "label_chunk_size": 3}


def arguments(folder, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 7,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "learning_rate_mapping": {},
    }
    return XMCTrainingArguments(str(folder), **{**defaults, **settings})


def graded(queries):
    return queries.add_column("label_scores", [[1.0 + i % 2 for i in ids] for ids in queries["label_ids"]])


class Recording(XMCTrainer):
    batch = None

    def compute_loss(self, model, inputs, *rest, **kwargs):
        self.batch = copy.deepcopy(inputs)
        self.rng = torch.get_rng_state()
        return super().compute_loss(model, inputs, *rest, **kwargs)


def queries_of(encoder, batch):
    features = {name.removeprefix("text_"): value for name, value in batch.items() if name.startswith("text_")}
    return encoder(features)["sentence_embedding"]


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("still"), dropout=0.0)


EXACT = [(name, mode, "static") for name in TRAINED for mode in ("exact", "fresh", "mined")]
WEIGHED = [(name, "bank", "static") for name, (loss, _) in TRAINED.items() if loss.supports_label_weights]
IN_CHUNKS = [("soft top-k", "exact"), ("bce", "fresh"), ("softmax", "bank"), ("decoupled", "mined")]


@pytest.mark.parametrize(("name", "mode", "kind"), [*EXACT, *WEIGHED, *[(*case, "bert") for case in IN_CHUNKS]])
def test_training_step_takes_the_gradient_of_the_best_texts(name, mode, kind, queries, still_bert, tmp_path):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    exact = copy.deepcopy(encoder).double()
    loss, formula = TRAINED[name]
    args = arguments(tmp_path, label_mode=mode, **EVERYTHING)
    trainer = Recording(encoder, args, graded(queries), labels=TABLE, loss=copy.deepcopy(loss))
    if mode == "mined":
        trainer.add_callback(HardNegativeMiner(trainer, depth=11))
    before = {name: weight.detach().clone() for name, weight in encoder.named_parameters()}
    trainer.train()

    texts = exact(exact.preprocess(list(TABLE["text"])))["sentence_embedding"]
    scores = best_of_texts(queries_of(exact, trainer.batch) @ texts.T, LABEL_OF)
    formula(scores, trainer.batch["label"], trainer.batch["label_weights"].double()).backward()
    expected = {name: weight.grad for name, weight in exact.named_parameters() if weight.grad is not None}
    assert max(float(gradient.norm()) for gradient in expected.values()) > 0.01
    for weight, gradient in expected.items():
        moved = before[weight] - dict(encoder.named_parameters())[weight].detach()
        torch.testing.assert_close(
            moved.double(), gradient, rtol=1e-3, atol=1e-5, msg=lambda said, w=weight: f"{w}: {said}"
        )


@pytest.mark.parametrize("size", [None, 3])
def test_training_step_uses_the_same_dropout_in_loss_and_gradient(size, queries, bert_folder, tmp_path):
    encoder = make_bert_encoder(bert_folder).double()
    args = arguments(tmp_path, label_mode="exact", label_chunk_size=size)
    trainer = Recording(encoder, args, graded(queries), labels=TABLE)
    before = copy.deepcopy(encoder)
    trainer.train()

    torch.set_rng_state(trainer.rng)
    given = queries_of(before.train(), trainer.batch)
    rows, chunks = trainer.negatives.rows, trainer.negatives.chunks
    texts = torch.cat([before(dict(chunk))["sentence_embedding"] for chunk in chunks])
    together = np.argsort(LABEL_OF, kind="stable")  # the trainer's table has the texts of a label together
    scores = best_of_texts(given @ texts.T, np.array(LABEL_OF)[together][rows].tolist())
    functional.decoupled_softmax_loss(
        scores, trainer.batch["label"], trainer.batch["label_weights"].double()
    ).backward()
    for name, weight in before.named_parameters():
        if weight.grad is not None:
            moved = weight.detach() - dict(encoder.named_parameters())[name].detach()
            torch.testing.assert_close(moved, weight.grad, rtol=1e-9, atol=1e-12)
    assert sum(float(weight.grad.norm()) for weight in before.parameters() if weight.grad is not None) > 0.01


def test_training_is_the_same_with_and_without_uids_if_each_label_has_one_text(queries, tmp_path):
    """Bit for bit."""
    with_ids = Dataset.from_dict({"uid": [f"L{i}" for i in range(11)], "text": LABELS})
    for mode in ("exact", "bank"):
        trained = []
        for labels in (LABELS, with_ids):
            args = arguments(tmp_path, label_mode=mode, label_sample_fraction=0.3, max_steps=2)
            trainer = XMCTrainer(make_static_encoder(), args, queries, labels=labels)
            assert trainer.negatives.table.text_counts is None
            trainer.train()
            trained.append(trainer.model[0].embedding.weight.detach())
        assert torch.equal(*trained)


def table_of(encoder, size=3):
    texts, _ = LabelTexts.of(TABLE)
    return TokenizedLabels(encoder, texts.texts["text"], text_counts=texts.text_counts, chunk_size=size)


def batch_of(encoder):
    positives = torch.tensor([[3, -100], [10, 0]])
    return BatchQueries(
        encoder.encode(["text 1", "text 2"], convert_to_tensor=True).clone(), positives, None, torch.arange(2)
    )


def all_texts_of(label_ids):
    table, _ = LabelTexts.of(TABLE)
    return [
        text for label in label_ids for text, of in zip(table.texts["text"], table.label_of, strict=True) if of == label
    ]


@pytest.mark.parametrize("kind", ["static", "bert"])
def test_negatives_score_all_texts_of_a_label_together(kind, still_bert):
    encoder = (make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)).eval()
    table, step = table_of(encoder), batch_of(encoder)
    mined = MinedNegatives(table, num_queries=2, num_hard=2)
    mined.shortlist = torch.tensor([[7, 8, -1], [3, -1, -1]], dtype=torch.int32)
    torch.manual_seed(0)
    bank = LabelBank(table, losses.DecoupledSoftmaxLoss(), 0.3, 4, False)
    for negatives in (AllLabels(table), AllLabels(table, fraction=1.0), mined, bank):
        candidates = negatives.select(encoder, step)
        assert {0, 3, 10} < set(candidates.label_ids.tolist())
        texts = all_texts_of(candidates.label_ids)
        assert candidates.text_counts.tolist() == [len(all_texts_of([label])) for label in candidates.label_ids]
        torch.testing.assert_close(negatives.embed(encoder, candidates), encoder.encode(texts, convert_to_tensor=True))
        assert candidates.label_ids[candidates.positives[[0, 1, 1], [0, 0, 1]]].tolist() == [3, 10, 0]
    assert sorted(mined.select(encoder, step).label_ids.tolist()) == [0, 3, 7, 8, 10]
    assert len(bank.select(encoder, step).label_ids) == 3 + 4  # and ceil(0.3 * 11) more
    assert bank.embeddings.shape[0] == len(TABLE)


def test_label_bank_estimates_the_normalizer_without_bias():
    """The bank draws labels, and each stands for one over its probability."""
    encoder = make_static_encoder().eval()
    bank, step = LabelBank(table_of(encoder), losses.SoftmaxLoss(), 0.3, 4, False), batch_of(encoder)
    bank.select(encoder, step)
    sums, texts = (
        [],
        {label: encoder.encode(all_texts_of([label]), convert_to_tensor=True) for label in range(11)},
    )
    score = torch.stack([(step.embeddings @ texts[label].T / 10).max(1).values for label in range(11)], dim=1)
    torch.manual_seed(0)
    for _ in range(200):
        bank.embeddings = torch.randn(len(TABLE), 16).to(torch.bfloat16)
        candidates = bank.select(encoder, step)
        sums.append((score[:, candidates.label_ids].exp() * candidates.label_weights).sum(1))
    sums, expected = torch.stack(sums), score.exp().sum(1)
    assert (sums.std(0) > 0.02 * expected).all(), "nothing was sampled"
    assert ((sums.mean(0) - expected).abs() < 5 * sums.std(0) / len(sums) ** 0.5).all()


def test_fresh_label_bank_corrects_the_query_gradient():
    encoder = make_static_encoder().eval()
    step, table, gradients = batch_of(encoder), table_of(encoder), []
    torch.manual_seed(0)
    for negatives in (AllLabels(table), LabelBank(table, losses.SoftmaxLoss(), 0.2, 4, False)):
        candidates, given = negatives.select(encoder, step), step.embeddings.clone().requires_grad_()
        texts = negatives.embed(encoder, candidates).detach()
        for alone, of in (
            (candidates._replace(query_control_variate=None), texts),
            (candidates, texts),
            (candidates, texts.bfloat16().float()),
        ):
            value = alone.loss(losses.SoftmaxLoss(), given, of, None)
            gradients.append(torch.autograd.grad(value, given)[0])
    exact, _, rounded, of_sample, corrected, _ = gradients
    assert (of_sample - exact).norm() > 0.1 * exact.norm(), "the sample missed nothing"
    assert (corrected - exact).norm() < 2 * (rounded - exact).norm(), "the bank is in bfloat16"


def test_hard_negatives_are_ranked_by_their_best_text(encoder, queries):
    scores = (
        encoder.encode(queries["text"], convert_to_tensor=True)
        @ encoder.encode(TABLE["text"], convert_to_tensor=True).T
    )
    scores = best_of_texts(scores, LABEL_OF)
    for row, ids in enumerate(POSITIVES):
        scores[row, ids] = -torch.inf
    found = mine_hard_negatives(encoder, queries, TABLE, depth=5)
    assert torch.equal(found, scores.topk(5, dim=1).indices.int())


@pytest.fixture
def data(queries):
    return XMCData(queries, TABLE, test=queries, filter_pairs={"test": np.array([[0, 1], [12, 4]])})


def test_data_set_counts_labels_and_not_texts(data):
    assert (data.num_labels, len(data.labels)) == (11, 20)
    assert data.label_of.tolist() == LABEL_OF
    assert data.relevance("train").toarray().tolist() == relevance_of(POSITIVES).toarray().tolist()
    assert data.label_counts().tolist() == [sum(label in ids for ids in POSITIVES) for label in range(11)]
    assert len(data.weight_positives(1.0).train[0]["label_scores"]) == 2
    assert data.carve_validation(3).num_labels == 11
    assert with_phrases(data).label_of.tolist() == LABEL_OF
    too_many = data.train.add_item({"text": "x", "label_ids": [11]})
    with pytest.raises(ValueError, match="11, but there are only 11 labels"):
        XMCData(too_many, TABLE).relevance("train")
    with pytest.raises(ValueError, match="label 1 has no uid"):
        XMCData(data.train, Dataset.from_dict({"uid": ["a", None], "text": ["x", "y"]}))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_hub])
def test_every_table_layout_may_have_several_texts_per_label(write, tmp_path):
    write(tmp_path)
    rows = [{"uid": "L1", "text": "motor car"}, {"uid": "L0", "text": "vessel"}]
    if write is write_jsonl:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / "labels.jsonl"
        path.write_text(lines + path.read_text())
    else:
        path = tmp_path / ("labels.parquet" if write is write_parquet else "data/labels.parquet")
        Dataset.from_list(rows + Dataset.from_parquet(str(path), cache_dir=tmp_path / "cache").to_list()).to_parquet(
            path
        )
    data = load_xmc(tmp_path)
    assert data.labels["uid"][:] == ["L1", "L0", "L0", "L1", "L2", "L3", "L4"]
    assert data.label_of.tolist() == [0, 1, 1, 0, 2, 3, 4]
    assert (data.num_labels, data.relevance("train").shape[1]) == (5, 5)
    assert data.load_report["labels: texts beyond the first of their label"] == 2
    data.save(tmp_path / "prepared")
    again = load_xmc(tmp_path / "prepared")
    assert again.labels[:] == data.labels[:]
    assert (again.num_labels, again.load_report) == (5, data.load_report)
    assert again.filter_pairs["test"].tolist() == data.filter_pairs["test"].tolist()


@pytest.mark.parametrize(
    ("name", "row"), [("train", {"text": "x", "label_ids": [5]}), ("filter_pairs", {"row": 0, "label": 5})]
)
def test_text_row_is_refused_as_a_label_id(name, row, tmp_path):
    write_jsonl(tmp_path)
    for file, line in (("labels", {"uid": "L1", "text": "motor car"}), (name, row)):
        with (tmp_path / f"{file}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"there are only 5 labels|there are 3 rows and 5 labels"):
        load_xmc(tmp_path)


def test_evaluator_ranks_labels_by_their_best_text(encoder, data):
    evaluator = XMCEvaluator.from_data(data, "test")
    found = evaluator.predict(encoder)
    scores = (
        encoder.encode(data.test["text"], convert_to_tensor=True)
        @ encoder.encode(TABLE["text"], convert_to_tensor=True).T
    )
    scores = best_of_texts(scores, LABEL_OF)
    scores[0, 1] = scores[12, 4] = -torch.inf
    assert found.label_ids[:, :9].tolist() == scores.argsort(1, descending=True)[:, :9].tolist()
    assert evaluator.get_config_dict() == {"num_queries": 13, "num_labels": 11}
    model = XMCModel(encoder, TABLE).search(list(data.test["text"]), 11, exclude=data.filter_pairs["test"])
    assert model.label_ids.tolist() == found.label_ids[:, :11].tolist()


def test_in_batch_dataset_draws_texts_and_keeps_label_ids(queries):
    torch.manual_seed(0)
    hard = np.full((13, 1), 0)
    rows = in_batch_dataset(queries, TABLE, hard_negatives=hard, positives="ragged")
    texts_of = {label: all_texts_of([label]) for label in range(11)}
    drawn = {label: set() for label in range(11)}
    for _ in range(60):
        for number, row in zip((i for i, ids in enumerate(POSITIVES) if ids), rows, strict=True):
            positive, negative, *known = row["label"]
            assert row["positive"] in texts_of[positive]
            assert known == sorted(POSITIVES[number])
            assert row["negative_1"] in (texts_of[0] if negative == 0 else [""])
            assert negative == (-100 if 0 in known else 0)
            drawn[positive].add(row["positive"])
            drawn[0].add(row["negative_1"])
    assert all(found - {""} == set(texts_of[label]) for label, found in drawn.items()), "some text is never drawn"
    assert relevance_matrix(queries, TABLE).toarray().tolist() == relevance_of(POSITIVES).toarray().tolist()


def test_in_batch_labels_with_equal_texts_are_merged():
    labels = Dataset.from_dict({"uid": [*"abcab"], "text": ["boat", "ship", "boat", "ship", "boat"]})
    queries = Dataset.from_dict({"text": ["x", "y"], "label_ids": [[1, 2], [0]]})
    assert relevance_matrix(queries, labels).toarray().tolist() == [[1, 0, 1], [1, 0, 0]]


def test_training_model_and_command_line_number_labels_alike(tmp_path):
    """Numbered in the order in which ids first occur, wherever a label's other texts stand."""
    labels = Dataset.from_dict(
        {"uid": ["u9", "u9", "u2", "u3", "u2"], "text": ["boats", "vessels", "cats", "dogs", "kittens"]}
    )
    assert label_numbers(labels).tolist() == [0, 0, 1, 2, 1]
    rows = {"text": ["a boat sails", "my pet purrs", "the hound barks"], "label_ids": [[0], [1], [2]]}
    train = Dataset.from_dict({name: values * 4 for name, values in rows.items()})
    words = [*train["text"], *labels["text"]]
    encoder = static_encoder(words, embedding_dim=16, device="cpu")
    args = arguments(tmp_path, optim="adamw_torch", learning_rate=0.05, max_steps=20, label_mode="exact")
    data = XMCData(train, labels, test=train)
    XMCTrainer(encoder, args, train, labels=labels).train()
    model = XMCModel(encoder, labels)
    expected = ["u9", "u2", "u3"]
    assert [found[0].uid for found in model.predict(rows["text"], 1)] == expected
    assert XMCEvaluator.from_data(data, "test")(encoder)["P@1"] == 1
    model.remember(train)
    assert [found[0].uid for found in model.predict(rows["text"], 1)] == expected
    assert [
        model.explain(text, label).nearest[0].text for text, label in zip(rows["text"], expected, strict=True)
    ] == rows["text"]
    assert model.tune_memory(train)["validation"]["nDCG@5"] == 1
    model.calibrate(train, 1)
    assert model.predict(rows["text"][1], 1)[0].score == 1


def test_training_refuses_a_label_id_out_of_range(queries, tmp_path):
    beyond = Dataset.from_dict({"text": ["x"] * 7, "label_ids": [[11]] * 7})
    with pytest.raises(ValueError, match="row 0: label id 11, but there are only 11 labels"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), beyond, labels=TABLE)


def test_recipe_trains_measures_and_records_seen_labels(script, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data")
    rows = [
        {"uid": "L9", "text": "never seen"},
        {"uid": "L4", "text": "azure"},
        {"uid": "L9", "text": "new"},
    ]
    with (tmp_path / "data" / "labels.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    where = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    small = ["--embedding_dim", "8", "--num_train_epochs", "2", "--validation_size", "0.3"]
    script("train").main([*where, *small, "--report_to", "none", "--model", "phrases"])
    model = XMCModel.from_pretrained(tmp_path / "out" / "model")
    assert model.labels["uid"][:] == ["L0", "L1", "L2", "L3", "L4", "L9"]
    assert [*zip(model.label_texts.texts["uid"], model.label_texts.texts["text"], strict=True)][4:] == [
        ("L4", "blue"),
        ("L4", "azure"),
        ("L9", "never seen"),
        ("L9", "new"),
    ]
    assert model.labels["seen"][:][-1] is False
    assert sum(model.labels["seen"]) >= 3
    assert model.memory.num_labels == 6
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "out" / "model"), str(tmp_path / "data")]) == 0
    printed, metrics = json.loads(capsys.readouterr().out), json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert printed["P@1"] == pytest.approx(metrics["memory"]["P@1"], abs=1e-6)
    labels = ["--labels", str(tmp_path / "data"), "--output_dir", str(tmp_path / "again")]
    assert cli.main(["index", str(tmp_path / "out" / "model"), *labels]) == 0
    assert json.loads(capsys.readouterr().out)["num_labels"] == 6


@pytest.mark.parametrize("ids", [[0, 0, 1], ["0", "0", "1"], ["a1", "a1", "a2"]])
def test_numeric_uids_may_repeat_if_they_are_label_ids(ids, tmp_path):
    labels = Dataset.from_dict({"uid": ids, "text": ["boat", "vessel", "car"]})
    train = Dataset.from_dict({"text": ["x", "y"], "label_ids": [[0], [1]]})
    labels.to_parquet(tmp_path / "labels.parquet")
    train.to_parquet(tmp_path / "train.parquet")
    assert load_xmc(tmp_path).num_labels == XMCData(train, labels).num_labels == 2


def test_ambiguous_numeric_uids_are_refused_with_their_row(tmp_path):
    labels = Dataset.from_dict({"uid": [0, 0, 2, 1], "text": ["boat", "vessel", "car", "cat"]})
    train = Dataset.from_dict({"text": ["x", "y"], "label_ids": [[0], [1]]})
    with pytest.raises(ValueError, match="labels, row 2: uid is 2, and the numbers of uid are not"):
        XMCData(train, labels)


def test_label_bank_of_several_texts_resumes_its_state(queries, tmp_path):
    args = arguments(
        tmp_path, label_mode="bank", label_sample_fraction=0.3, max_steps=4, save_strategy="steps", save_steps=2
    )
    through = XMCTrainer(make_static_encoder(), args, queries, labels=TABLE)
    through.train()
    resumed = XMCTrainer(make_static_encoder(), args, queries, labels=TABLE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.negatives.embeddings) == len(TABLE)
    assert torch.equal(through.model[0].embedding.weight, resumed.model[0].embedding.weight)
    with pytest.raises(ValueError, match="holds 5 label texts of this process, which has 20"):
        resumed.negatives.load_state_dict({"embeddings": torch.zeros(5, 16), "next": torch.tensor(0)})
