"""The recipes of the paper's data sets: their settings, the files they begin with, and what they are said to cost."""

import gzip
import json
import math

import numpy as np
import pytest
import scipy.sparse as sp
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import dataset_layouts
from helpers.tiny import RECIPES
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import XMCModel, load_xmc, losses
from hf_xmc.experiment.encoders import build_encoder, build_loss
from hf_xmc.experiment.options import parse

PAPER = RECIPES / "paper"
# From the configuration files of the paper's code: tokens, cosines, temperature, batch, learning rate.
TABLE = {
    "eurlex-4k": (128, True, 0.05, 512, 5e-5),
    "lf-amazontitles-131k": (32, True, 0.05, 3000, 3e-4),
    "lf-wikipedia-500k": (128, False, 1.0, 768, 7e-5),
    "lf-amazontitles-1.3m": (32, False, 1.0, 3000, 3e-4),
}
OVER = ["softmax", "soft-top-5", "soft-top-100", "hard-negatives"]


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    """A DistilBERT of two small layers, as transformers saves one: no pooling, no modules.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("distilbert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "boat", "car", "animal", "the", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=128).save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(words), dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def files(name, over=None):
    names = [name] if over is None else [name, over]
    if over == "hard-negatives" and name == "lf-wikipedia-500k":
        names.append("lf-wikipedia-500k-hard-negatives")
    return [str(PAPER / f"{one}.yaml") for one in names]


def test_every_recipe_file_has_a_test():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*TABLE, *OVER, "lf-wikipedia-500k-hard-negatives"}


@pytest.mark.parametrize("over", [None, *OVER])
@pytest.mark.parametrize("name", TABLE)
def test_settings_equal_those_of_the_paper(name, over, distilbert, tmp_path):
    where = ["--data", "x", "--output_dir", str(tmp_path), "--model", str(distilbert), "--use_cpu", "true"]
    recipe, args, _ = parse([*files(name, over), *where])
    tokens, cosines, temperature, batch, rate = TABLE[name]
    if over == "hard-negatives" and name == "lf-wikipedia-500k":
        rate = 2e-5
    assert (recipe.max_seq_length, recipe.normalize, recipe.temperature) == (tokens, cosines, temperature)
    assert (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs) == (batch, rate, 100)
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == ("linear", 0.1, 0.01)
    assert args.bf16
    assert args.eval_steps * args.num_train_epochs == pytest.approx(
        1 if name == "lf-wikipedia-500k" and over != "hard-negatives" else 5
    )
    mined = over == "hard-negatives"
    assert args.label_mode == ("mined" if mined else "exact")
    if mined:
        assert args.num_hard_negatives == (5 if name == "lf-wikipedia-500k" else 1)
        assert (recipe.mining_start, recipe.mining_every) == (5, 5)
    assert args.num_positives == {"softmax": None, "soft-top-5": 5, "soft-top-100": 100}.get(over, 1)

    encoder = build_encoder(recipe, data=None, seed=args.seed)
    assert encoder[1].pooling_mode == "cls"
    assert encoder.max_seq_length == tokens
    assert isinstance(encoder[-1], Normalize) == cosines
    loss = build_loss(recipe)
    assert loss.temperature == temperature
    kind = {"softmax": losses.SoftmaxLoss, "soft-top-5": losses.SoftTopKLoss, "soft-top-100": losses.SoftTopKLoss}
    assert type(loss) is kind.get(over, losses.DecoupledSoftmaxLoss)
    if isinstance(loss, losses.SoftTopKLoss):
        assert (loss.k, loss.alpha) == (5 if over == "soft-top-5" else 100, 2)


@pytest.mark.parametrize("over", [None, "soft-top-5", "hard-negatives"])
def test_recipe_trains_from_a_plain_distilbert(over, script, distilbert, tmp_path):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_reference(tmp_path / "data")
    where = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--model", str(distilbert)]
    small = ["--num_train_epochs", "12", "--per_device_train_batch_size", "4", "--validation_size", "0.3"]
    here = ["--use_cpu", "true", "--bf16", "false", "--eval_steps", "6", "--save_steps", "6"]
    script("train").main([*files("eurlex-4k", over), *where, *small, *here])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "memory" not in metrics
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert sum("eval_nDCG@5" in entry for entry in history) >= 2
    model = XMCModel.from_pretrained(tmp_path / "out" / "model")
    assert np.linalg.norm(model.embed(["a red boat"]).numpy()) == pytest.approx(1, abs=1e-5)
    assert model.encoder[1].pooling_mode == "cls"


def test_null_removes_a_setting_and_flags_take_precedence(tmp_path):
    (tmp_path / "a.yaml").write_text("num_positives: 1\nlearning_rate: 0.5\nseed: 3\n")
    (tmp_path / "b.yaml").write_text("num_positives: null\nlearning_rate: 0.25\n")
    where = ["--data", "x", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, args, _ = parse([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), *where, "--seed", "7"])
    assert (args.num_positives, args.learning_rate, args.seed) == (None, 0.25, 7)


@pytest.mark.parametrize("number", [1, 4, 8, 16])
def test_launch_configurations_start_the_stated_number_of_processes(number):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{number}-gpu.yaml"))
    assert config.num_processes == number
    assert config.num_machines == (2 if number == 16 else 1)
    assert config.mixed_precision == "bf16"


# The public files: a byte of U+2028 within a text, spaces around a title, a description beside it, an empty title,
# entities, a query without labels, a filter pair named twice, a label with two arrows, files gzipped and not.
AMAZON_LABELS = [{"uid": "B1", "title": " Boat ", "content": "long"}, {"uid": "B2", "title": "R&amp;B", "content": ""}]
AMAZON_QUERIES = [
    {"uid": "Q1", "title": "Red Boat\u2028Set\n", "content": "a text", "target_ind": [0, 1], "target_rel": [1.0, 1.0]},
    {"uid": "Q2", "title": "", "content": "only a text", "target_ind": [1], "target_rel": [1.0]},
    {"uid": "Q3", "title": "Caf\u00e9", "content": "", "target_ind": [], "target_rel": []},
]


def write(path, records):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    path.write_bytes(lines)


def run_raw(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["raw.py", *map(str, arguments)])
    script("raw").main()
    return load_xmc(arguments[2])


def test_amazon_titles_are_read_without_descriptions(script, monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "lbl.json.gz", AMAZON_LABELS)
    write(raw / "trn.json.gz", AMAZON_QUERIES)
    write(raw / "tst.json", AMAZON_QUERIES[:1])
    (raw / "filter_labels_train.txt").write_text("0 0\n2 1\n")
    (raw / "filter_labels_test.txt").write_text("0 1\n0 1\n")
    data = run_raw(script, monkeypatch, "titles", raw, tmp_path / "out")
    assert list(data.labels["text"]) == ["Boat", "R&amp;B"]
    assert list(data.labels["uid"]) == ["B1", "B2"]
    assert list(data.train["text"]) == ["Red Boat\u2028Set", "", "Caf\u00e9"]
    assert data.train["label_ids"][:] == [[0, 1], [1], []]
    assert data.filter_pairs["test"].tolist() == [[0, 1]]
    assert data.load_report["train: empty texts"] == 1
    assert data.load_report["train: queries without labels"] == 1
    assert data.load_report["filter_labels_test.txt: repeated pairs"] == 1


def test_wikipedia_is_cleaned_as_the_paper_does(script, monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "Yf.txt").write_text("0->Ships of the U.S. Navy\n1->Births->1961 births\nCaf\u00e9s\n")
    queries = [
        {"uid": "1", "title": "USS Maine", "content": "A ship,  of\tv1.0 \u2014 sunk!", "target_ind": [0, 2]},
        {"uid": "2", "title": "???", "content": "", "target_ind": [1]},
    ]
    write(raw / "trn.raw.json.gz", queries)
    write(raw / "tst.raw.json.gz", queries[:1])
    data = run_raw(script, monkeypatch, "wikipedia", raw, tmp_path / "out")
    assert list(data.labels["text"]) == ["ships of the u.s. navy", "1961 births", "caf s"]
    assert list(data.train["text"]) == ["uss maine uss maine a ship of v1.0 sunk", ""]
    assert data.train["label_ids"][:] == [[0, 2], [1]]


@pytest.mark.parametrize(
    "names",
    [("train_raw_texts.txt", "test_raw_texts.txt", "label_map.txt"), ("X.trn.txt", "X.tst.txt", "output-items.txt")],
)
def test_eurlex_reads_both_files(names, script, monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, lines in zip(
        names, (["commission regulation", "council decision\u0085of"], ["x"], ["fish", "wine"]), strict=True
    ):
        (raw / name).write_bytes("".join(line + "\n" for line in lines).encode())
    sp.save_npz(raw / "Y.trn.npz", sp.csr_matrix([[1.0, 1.0], [0.0, 1.0]], dtype=np.float32))
    sp.save_npz(raw / "Y.tst.npz", sp.csr_matrix([[1.0, 0.0]], dtype=np.float32))
    data = run_raw(script, monkeypatch, "eurlex", raw, tmp_path / "out")
    assert list(data.train["text"]) == ["commission regulation", "council decision\u0085of"]
    assert data.train["label_ids"][:] == [[0, 1], [1]]
    assert list(data.labels["text"]) == ["fish", "wine"]


def test_faults_of_the_public_files_are_named(script, monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(ValueError, match=r"must contain lbl.json, got \[\]"):
        run_raw(script, monkeypatch, "titles", raw, tmp_path / "out")
    write(raw / "lbl.json.gz", [AMAZON_LABELS[0], {"uid": "B2", "content": "no title"}])
    with pytest.raises(ValueError, match=r"lbl.json.gz:2: title must be a string, got None"):
        run_raw(script, monkeypatch, "titles", raw, tmp_path / "out")


def test_cost_equals_a_hand_computed_value(script):
    cost = script("cost")
    encoder = cost.Encoder(parameters=1000, layers=1, width=10, heads=1)
    recipe = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "label_mode": "exact", "num_positives": 1}
    found = cost.estimate(cost.Sizes(10, 100, 2, 5), recipe, gpus=2, tflops=1e-12, encoder=encoder)
    queries = 3 * 8 * (2400 + 4 * 2 * 10)  # 4 queries of 2 tokens, forward and backward
    labels = 4 * 250 * (2400 + 4 * 5 * 10)  # half of the labels, forward twice and backward
    loss = 1.23 * 3 * 2 * 8 * 50 * 10  # 8 queries against half of the labels, three products
    seconds = queries + labels + loss
    assert found.seconds == pytest.approx(seconds)
    assert found.hours == pytest.approx(3 * math.ceil(10 / 8) * seconds / 3600)
    assert found.label_share == pytest.approx(labels / seconds)
    kept = 8 * (34 * 10 + 5 * 2) + 8192 * (34 * 10 + 5 * 5)
    assert found.gib * 2**30 == pytest.approx(16 * 1000 + kept + 2 * 4 * 10 * (50 + 8) + 2**28)
    fresh = cost.estimate(
        cost.Sizes(10, 100, 2, 5),
        recipe | {"label_mode": "fresh", "label_sample_fraction": 0.5},
        2,
        1e-12,
        encoder,
    )
    assert seconds - fresh.seconds == pytest.approx(labels * (1 - 2.5 / 4))
    pool = cost.estimate(
        cost.Sizes(10, 100, 2, 5), recipe | {"label_mode": "mined", "num_hard_negatives": 2}, 2, 1e-12, encoder
    )
    assert pool.label_share * pool.seconds == pytest.approx(4 * 12 * 5 * (2400 + 4 * 5 * 10))


def test_every_data_set_states_its_sizes(script):
    cost = script("cost")
    assert set(cost.DATA) == set(TABLE)
    for name in TABLE:
        assert cost.settings(name) == yaml.safe_load((PAPER / f"{name}.yaml").read_text())
