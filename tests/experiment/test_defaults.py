"""Settings that follow from the encoder, the data and a preset, unless they are given."""

from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.tiny import RECIPES
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import XMCData, XMCTrainingArguments, static_encoder
from hf_xmc.experiment import defaults
from hf_xmc.experiment.defaults import choose, refits, validation_size
from hf_xmc.experiment.encoders import build_loss
from hf_xmc.experiment.settings import PRESETS, from_dict


def make_data(num_queries, text="a boat"):
    train = Dataset.from_dict({"text": [text] * num_queries, "label_ids": [[0]] * num_queries})
    return XMCData(train=train, labels=Dataset.from_dict({"text": ["boat"]}))


def chosen(encoder, data, tmp_path, **values):
    settings, args, given = from_dict({"data": "x", "output_dir": str(tmp_path), "use_cpu": True, **values})
    return choose(settings, args, given, data, encoder), args


@pytest.fixture
def static():
    return static_encoder(["a boat", "a cat"], embedding_dim=4)


def test_no_setting_equals_the_recipe_for_static_encoders(static, tmp_path):
    settings, args = chosen(static, make_data(80_000), tmp_path)
    recipe = yaml.safe_load((RECIPES / "static.yaml").read_text())
    assert (args.report_to, recipe.pop("report_to")) == ([], "none")
    found = {name: getattr(settings if hasattr(settings, name) else args, name) for name in recipe}
    assert found == recipe


@pytest.mark.parametrize(
    ("number", "batch"), [(20, 32), (480, 32), (960, 64), (15_359, 512), (15_360, 1024), (10**5, 1024)]
)
def test_batches_shrink_when_an_epoch_would_have_few_steps(static, number, batch, tmp_path):
    assert chosen(static, make_data(number), tmp_path)[1].per_device_train_batch_size == batch


def test_transformers_have_smaller_rates_and_cosines_a_temperature(bert_folder, tmp_path, caplog):
    encoder = SentenceTransformer(str(bert_folder), device="cpu")
    with caplog.at_level("INFO"):
        settings, args = chosen(encoder, make_data(80_000), tmp_path, model="x")
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (5e-5, 64, 3)
    assert (settings.temperature, settings.rarity) == (1.0, 0.0)
    assert "learning_rate 5e-05 (a transformer, 3750 steps)" in caplog.text
    _, args = chosen(encoder, make_data(80_000), tmp_path, model="x", preset="fast")
    assert (args.learning_rate, args.num_train_epochs) == (6.3e-5, 1)  # 1250 steps
    encoder.append(Normalize())
    assert chosen(encoder, make_data(80), tmp_path, model="x")[0].temperature == 0.05


def test_the_maximum_length_is_that_of_nearly_all_texts(bert_folder, tmp_path):
    encoder = SentenceTransformer(str(bert_folder), device="cpu")
    limit = encoder.max_seq_length
    assert limit > 16
    assert chosen(encoder, make_data(50, "boat " * 5), tmp_path)[0].max_seq_length == 16  # 5 words and two marks
    assert encoder.max_seq_length == 16
    encoder.max_seq_length = limit
    assert chosen(encoder, make_data(50, "boat " * 2 * limit), tmp_path)[0].max_seq_length is None
    assert encoder.max_seq_length == limit


def test_given_settings_are_kept(static, tmp_path):
    given = {"learning_rate": 1.0, "per_device_train_batch_size": 7, "num_train_epochs": 9, "temperature": 3.0}
    settings, args = chosen(static, make_data(100), tmp_path, **given, embedding_dim=5, preset="fast")
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (1.0, 7, 9)
    assert (settings.temperature, settings.embedding_dim) == (3.0, 5)
    assert settings.num_phrases == PRESETS["fast"]["num_phrases"]


def test_presets_grow(static, tmp_path):
    found = [chosen(static, make_data(100), tmp_path, preset=name) for name in ("fast", "default", "best")]
    sizes = [(settings.embedding_dim, settings.num_phrases, args.num_train_epochs) for settings, args in found]
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(ValueError, match="`preset` must be one of fast, default, best, got 'x'"):
        from_dict({"data": "x", "output_dir": str(tmp_path), "preset": "x"})


@pytest.mark.parametrize(("number", "share"), [(500, 0.1), (2000, 0.05), (5000, 0.02), (10**5, 0.02)])
def test_a_hundred_queries_are_held_out_if_that_is_at_most_a_tenth(number, share, tmp_path):
    settings = from_dict({"data": "x", "output_dir": str(tmp_path)}).settings
    assert validation_size(settings, make_data(number)) == share
    settings = from_dict({"data": "x", "output_dir": str(tmp_path), "validation_size": 0.3}).settings
    assert validation_size(settings, make_data(number)) == 0.3


@pytest.mark.parametrize(("number", "share"), [(500, 0.2), (2000, 0.2), (5000, 0.08), (25_000, 0.02)])
def test_a_refit_holds_out_more_queries_because_it_trains_on_them_too(number, share, tmp_path):
    settings = from_dict({"data": "x", "output_dir": str(tmp_path), "refit": True}).settings
    assert validation_size(settings, make_data(number)) == share


@pytest.mark.parametrize(
    ("values", "number", "expected"),
    [
        ({}, 9999, True),
        ({}, 10_000, False),
        ({"refit": True}, 10_000, True),
        ({"refit": False}, 10, False),
        ({"model": "org/name"}, 10, False),
        ({"model": "org/name", "refit": True}, 10, True),
    ],
)
def test_a_model_of_few_texts_is_refit_by_default(values, number, expected, tmp_path):
    settings = from_dict({"data": "x", "output_dir": str(tmp_path), **values}).settings
    data = replace(make_data(number), test=make_data(3).train)
    assert refits(settings, data) is expected


@pytest.mark.parametrize(
    ("values", "number", "num_labels", "expected"),
    [
        ({}, 9999, 250, True),
        ({}, 10_000, 250, False),
        ({}, 9999, 251, False),
        ({"model": "org/name"}, 9999, 250, False),
        ({"classifiers": False}, 9999, 250, False),
        ({"classifiers": True}, 10_000, 251, True),
    ],
)
def test_few_texts_and_labels_have_classifiers_by_default(
    values, number, num_labels, expected, static, tmp_path, caplog
):
    data = replace(make_many_labels(num_labels), train=make_data(number).train)
    with caplog.at_level("INFO"):
        assert chosen(static, data, tmp_path, **values)[0].classifiers is expected
    said = f"classifiers True ({number} training queries, {num_labels} labels)"
    assert (said in caplog.text) == (expected and not values)


def test_classifiers_need_a_static_encoder_that_does_not_normalise(static, bert_folder, tmp_path):
    static.append(Normalize())
    assert chosen(static, make_data(20), tmp_path)[0].classifiers is False
    for encoder in (static, SentenceTransformer(str(bert_folder), device="cpu")):
        with pytest.raises(ValueError, match=r"^`classifiers` needs a static encoder .* (Normalize|Pooling)\b"):
            chosen(encoder, make_data(20), tmp_path, classifiers=True)
    short = static_encoder(["a boat", "a cat"], embedding_dim=4)
    short.truncate_dim = 3
    with pytest.raises(ValueError, match=r"got the modules StaticEmbedding and truncate_dim=3\. Leave it out"):
        chosen(short, make_data(20), tmp_path, classifiers=True)


def test_unknown_settings_are_refused_with_the_closest_name(tmp_path):
    with pytest.raises(TypeError, match=r"'learning_rat' is neither a setting.*Did you mean 'learning_rate'"):
        from_dict({"data": "x", "output_dir": str(tmp_path), "learning_rat": 1})


SAMPLED = {"label_mode": "sampled", "sparse_updates": True, "label_vectors": 0.25}
EXACT = {"label_mode": None, "sparse_updates": False, "learning_rate": 0.04, "label_vectors": 0.25}


def make_many_labels(number=1000):
    labels = Dataset.from_dict({"text": [f"boat {label}" for label in range(number)]})
    return XMCData(train=make_data(20).train, labels=labels)


def of(args, names):
    return {name: getattr(args, name) for name in names}


@pytest.mark.parametrize(
    ("preset", "epochs", "fraction", "rate"),
    [("fast", 4, 0.05, 0.08), ("default", 8, 0.1, 0.06), ("best", 8, 0.2, 0.06)],
)
def test_many_labels_are_sampled_in_bfloat16_if_the_cpu_is_fast_in_it(
    preset, epochs, fraction, rate, static, tmp_path, caplog, monkeypatch
):
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(defaults, "multiplies_bfloat16", lambda fast=fast: fast)
        with caplog.at_level("INFO"):
            settings, args = chosen(static, make_many_labels(), tmp_path, preset=preset)
        assert of(args, SAMPLED) == SAMPLED
        assert (args.num_train_epochs, args.label_sample_fraction, args.learning_rate) == (epochs, fraction, rate)
        assert settings.loss_dtype == dtype
        assert "label_mode sampled (a static encoder, 1000 labels)" in caplog.text
        assert "label_vectors 0.25 (a static encoder)" in caplog.text
    options = build_loss(replace(settings, loss_dtype="bfloat16")).options
    assert (options.score_dtype, options.gradient_dtype) == (torch.bfloat16, torch.bfloat16)
    options = build_loss(settings).options
    assert (options.score_dtype, options.gradient_dtype) == (None, None)


@pytest.mark.parametrize(
    ("preset", "number", "values"),
    [
        ("fast", 999, {}),
        ("default", 999, {}),
        ("default", 1000, {"label_mode": "bank"}),
        ("fast", 1000, {"weight_decay": 0.1}),
        ("fast", 1000, {"optim": "sgd"}),
    ],
)
def test_all_labels_are_scored_where_a_sample_gains_nothing_or_is_excluded(preset, number, values, static, tmp_path):
    settings, args = chosen(static, make_many_labels(number), tmp_path, preset=preset, **values)
    epochs = 4 if preset == "fast" else 8
    mode = values.get("label_mode")
    assert of(args, EXACT) == {**EXACT, "label_mode": mode}
    assert args.num_train_epochs == epochs
    assert settings.loss_dtype == "float32"


@pytest.mark.parametrize(("number", "epochs", "start"), [(24_999, 8, 0.0), (25_000, 4, 0.5)])
def test_few_queries_are_read_twice_as_often_and_vote_from_the_start(number, epochs, start, static, tmp_path):
    data = XMCData(train=make_data(number).train, labels=make_many_labels().labels)
    args = chosen(static, data, tmp_path)[1]
    assert (args.num_train_epochs, args.vote_start) == (epochs, start)
    assert chosen(static, data, tmp_path, vote_start=0.1)[1].vote_start == 0.1
    assert chosen(static, data, tmp_path, preset="fast")[1].num_train_epochs == 4


@pytest.mark.parametrize(("settings", "weight"), [({}, 0.5), ({"memory": False}, 0.0), ({"preset": "fast"}, 0.0)])
def test_votes_are_trained_if_there_will_be_a_memory(settings, weight, static, tmp_path):
    assert chosen(static, make_data(100), tmp_path, **settings)[1].vote_loss == weight


def test_several_gpus_score_all_labels_and_the_log_says_why(static, tmp_path, caplog, monkeypatch):
    settings, args, given = from_dict({"data": "x", "output_dir": str(tmp_path), "use_cpu": True, "preset": "fast"})
    monkeypatch.setattr(XMCTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(XMCTrainingArguments, "world_size", 2)
    with caplog.at_level("INFO"):
        settings = choose(settings, args, given, make_many_labels(), static)
    assert of(args, EXACT) == {**EXACT, "label_mode": "exact"}
    assert "label_mode exact (several GPUs, which do not add up sparse gradients)" in caplog.text
    assert settings.loss_dtype == "float32"


def test_steps_and_a_rate_that_are_given_are_kept_with_a_sample(static, tmp_path):
    _, args = chosen(static, make_many_labels(), tmp_path, preset="fast", max_steps=7, learning_rate=0.01)
    assert (args.label_mode, args.max_steps, args.learning_rate, args.num_train_epochs) == ("sampled", 7, 0.01, None)


def test_other_losses_score_all_labels_without_vectors(static, tmp_path):
    _, args = chosen(static, make_many_labels(), tmp_path, loss="bce")
    assert of(args, EXACT) == {**EXACT, "label_vectors": 0.0}


def test_transformers_have_no_label_vectors_unless_they_are_given(bert_folder, tmp_path):
    encoder = SentenceTransformer(str(bert_folder), device="cpu")
    assert chosen(encoder, make_many_labels(), tmp_path, model="x")[1].label_vectors == 0
    assert chosen(encoder, make_many_labels(), tmp_path, model="x", label_vectors=0.5)[1].label_vectors == 0.5


def test_a_precision_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`loss_dtype` must be one of auto, float32, bfloat16, got 'half'"):
        from_dict({"data": "x", "output_dir": str(tmp_path), "loss_dtype": "half"})
