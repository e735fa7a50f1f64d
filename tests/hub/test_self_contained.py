"""What is saved loads on another machine: adapters are merged; what needs code or files from elsewhere is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.hub_server import Hub, point_client_at
from helpers.tampering import forge
from helpers.tiny import LABELS, make_bert_encoder, make_router, make_static_encoder
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import BertModel, BertTokenizerFast, Trainer

from hf_xmc import XMCData, XMCModel, XMCTrainer, XMCTrainingArguments, train
from hf_xmc.hub.self_contained import _unload, with_merged_adapters

TEXTS = ["a red boat", "old oak tree", "dog and cat"]
LORA = {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.3, "init_lora_weights": False}


@pytest.fixture
def bert(bert_folder):
    torch.manual_seed(0)
    return make_bert_encoder(bert_folder)


def tuned(encoder):
    """Every weight that was given to the encoder differs from its start, which is often an adapter of no effect."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def with_adapter(encoder, config):
    encoder.add_adapter(config)
    return tuned(encoder)


def assert_it_loads_elsewhere(encoder, folder):
    """Saved without a trace of the adapter, and without a change to the encoder."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = encoder.encode(TEXTS)
    model = XMCModel(encoder, LABELS)
    model.save_pretrained(folder)
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not [path for path in folder.rglob("*") if "adapter" in path.name]
    for loaded in (
        SentenceTransformer(str(folder), device="cpu"),
        XMCModel.from_pretrained(folder, device="cpu").encoder,
    ):
        assert not [name for name in loaded.state_dict() if "lora" in name or "base_layer" in name]
        torch.testing.assert_close(loaded.encode(TEXTS), expected, rtol=1e-4, atol=1e-5)
    again, here = XMCModel.from_pretrained(folder).predict(TEXTS), model.predict(TEXTS)
    assert [[p.uid for p in row] for row in again] == [[p.uid for p in row] for row in here]
    return expected


CONFIGS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ia3": IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
    "trained embeddings": LoraConfig(**LORA, modules_to_save=["word_embeddings"]),
    "trained tokens": LoraConfig(**LORA, trainable_token_indices=[5, 7]),
    "embeddings": LoraConfig(**{**LORA, "target_modules": ["word_embeddings", "dense"]}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapter_is_merged_when_saved(kind, bert, tmp_path):
    plain = bert.encode(TEXTS)
    encoder = with_adapter(bert, CONFIGS[kind])
    assert abs(assert_it_loads_elsewhere(encoder, tmp_path / "model") - plain).max() > 0.05, "the adapter has no effect"
    adapters = "IA3" if kind == "ia3" else "LORA"
    assert f"BertModel, with {adapters} adapters merged into its weights" in (tmp_path / "model/README.md").read_text()


def test_peft_model_is_merged_when_saved(bert, tmp_path):
    bert[0].model = get_peft_model(bert[0].model, LoraConfig(**LORA))
    assert_it_loads_elsewhere(tuned(bert), tmp_path / "model")


def test_only_active_adapters_are_merged(bert, tmp_path):
    plain = bert.encode(TEXTS)
    with_adapter(bert, LoraConfig(**LORA))
    bert.add_adapter(LoraConfig(**LORA), "second")
    tuned(bert)
    found = [assert_it_loads_elsewhere(bert, tmp_path / "second")]
    bert.set_adapter("default")
    found.append(assert_it_loads_elsewhere(bert, tmp_path / "first"))
    bert.set_adapter(["default", "second"])
    found.append(assert_it_loads_elsewhere(bert, tmp_path / "both"))
    bert.disable_adapters()
    disabled = assert_it_loads_elsewhere(bert, tmp_path / "none")
    torch.testing.assert_close(disabled, plain, rtol=1e-4, atol=1e-5)
    assert "adapters merged" not in (tmp_path / "none" / "README.md").read_text()
    assert all(abs(one - other).max() > 0.05 for one in found for other in found if one is not other)


def test_adapters_of_towers_and_shared_towers_are_merged(bert_folder, tmp_path):
    router = make_router(bert_folder)
    for tower in ("query", "document"):
        router[0].sub_modules[tower][0].model.add_adapter(LoraConfig(**LORA))
    shared = make_router(bert_folder)
    shared[0].sub_modules["document"][0] = shared[0].sub_modules["query"][0]
    shared[0].sub_modules["query"][0].model.add_adapter(LoraConfig(**LORA))
    merged = with_merged_adapters(shared)
    assert merged[0].sub_modules["query"][0] is merged[0].sub_modules["document"][0]
    for name, encoder in {"two": router, "one": shared}.items():
        expected = encoder.encode_query(TEXTS), encoder.encode_document(TEXTS)
        XMCModel(encoder, LABELS).save_pretrained(tmp_path / name)
        loaded = SentenceTransformer(str(tmp_path / name), device="cpu")
        torch.testing.assert_close((loaded.encode_query(TEXTS), loaded.encode_document(TEXTS)), expected)


def test_encoder_without_adapters_is_saved_unchanged(bert):
    assert with_merged_adapters(bert) is bert


def test_adapters_that_cannot_be_merged_are_refused_and_nothing_is_written(bert, tmp_path, monkeypatch):
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inner = bert[0].model
    bert[0].model = get_peft_model(inner, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    model = XMCModel.__new__(XMCModel)
    quantised = with_adapter(make_bert_encoder(inner.name_or_path), LoraConfig(**LORA))
    quantised[0].model.is_quantized = True
    failing = with_adapter(make_bert_encoder(inner.name_or_path), LoraConfig(**LORA))
    layer = failing[0].model.encoder.layer[0].attention.self.query
    monkeypatch.setattr(type(layer), "merge", lambda *_, **__: exec("raise NotImplementedError('not this kind')"))
    refusals = {"PROMPT_TUNING.*it puts tokens before each text": bert, "are quantised": quantised}
    refusals["NotImplementedError: not this kind.*Nothing was saved"] = failing
    for message, encoder in refusals.items():
        model = XMCModel(make_static_encoder(), LABELS)
        model.encoder = encoder
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "model")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class Doubling(Module):
    """A module of one's own: stock sentence-transformers would have to run code of this file."""

    def forward(self, features):
        return features | {"sentence_embedding": 2 * features["sentence_embedding"]}

    def save(self, output_path, *args, **kwargs):
        pass


def test_code_and_files_from_elsewhere_are_refused(bert, bert_folder, tmp_path, monkeypatch):
    own, other = (make_bert_encoder(bert_folder) for _ in range(2))
    own.append(Doubling())
    save = type(other[1]).save
    monkeypatch.setattr(
        type(other[1]), "save", lambda self, path, **kwargs: (save(self, path), Path(path, "extra.onnx").touch())
    )
    with pytest.raises(ValueError, match=r"saves 1_Pooling/extra.onnx, but a release may contain only"):
        XMCModel(other, LABELS).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(type(other[1]), "save", save)
    with pytest.raises(ValueError, match=r"modules.json names .*test_self_contained.Doubling, which is code"):
        XMCModel(own, LABELS).save_pretrained(tmp_path / "model")
    router = make_router(bert_folder)
    router[0].sub_modules["query"].append(Doubling())
    with pytest.raises(ValueError, match=r"router_config.json names .*test_self_contained.Doubling"):
        XMCModel(router, LABELS).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class OwnBert(BertModel):
    """A class that the Auto classes know only where it is registered."""


class OwnTokenizer(BertTokenizerFast):
    pass


def test_classes_that_loading_does_not_restore_are_refused(bert_folder, queries, tmp_path, monkeypatch):
    static = make_static_encoder(16)
    model = XMCModel(static, LABELS)
    wrong = {
        "test_self_contained.OwnBert": lambda encoder: setattr(encoder[0].model, "__class__", OwnBert),
        "test_self_contained.OwnTokenizer": lambda encoder: setattr(encoder[0].tokenizer, "__class__", OwnTokenizer),
        "module 2 is Doubled": lambda encoder: encoder.append(Dense(16, 16, activation_function=Doubled())),
        r"module 2 is LeakyReLU\(negative_slope=0.5\)": lambda encoder: encoder.append(
            Dense(16, 16, activation_function=torch.nn.LeakyReLU(0.5))
        ),
        "module 2 is <built-in method tanh": lambda encoder: encoder.append(
            Dense(16, 16, activation_function=torch.tanh)
        ),
    }
    for message, change in wrong.items():
        model.encoder = make_bert_encoder(bert_folder)
        change(model.encoder)
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    args = XMCTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", push_to_hub=True)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    with pytest.raises(ValueError, match="module 2 is <built-in method tanh"):  # before the first step
        XMCTrainer(model.encoder, args, queries, labels=LABELS)
    for activation in (None, torch.nn.GELU(), torch.nn.Tanh()):
        encoder = make_bert_encoder(bert_folder)
        encoder.append(Dense(16, 16, activation_function=activation))
        assert_it_loads_elsewhere(encoder, tmp_path / "model")


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_code_that_is_named_but_not_used_is_left_out(bert, tmp_path):
    """Many models of the Hub still name code that transformers has adopted since."""
    code = {"AutoModel": "org/code--modeling.Model"}
    bert[0].model.config.auto_map = bert[0].tokenizer.init_kwargs["auto_map"] = code
    assert_it_loads_elsewhere(bert, tmp_path / "model")
    assert not [path for path in (tmp_path / "model").rglob("*.json") if "org/code" in path.read_text()]


@pytest.mark.parametrize("kind", ["lora", "ia3", "trained tokens"])
def test_adapters_that_were_loaded_from_a_folder_are_merged_or_deleted(kind, bert, tmp_path):
    plain = bert.encode(TEXTS)
    expected = with_adapter(bert, CONFIGS[kind]).encode(TEXTS)
    bert.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(assert_it_loads_elsewhere(loaded, tmp_path / "model"), expected)
    loaded.delete_adapter("default")
    torch.testing.assert_close(assert_it_loads_elsewhere(loaded, tmp_path / "model"), plain)
    _unload(loaded[0].model)  # as a user may do, and transformers still has the names of the adapter's file
    torch.testing.assert_close(assert_it_loads_elsewhere(loaded, tmp_path / "model"), plain)


def doubling():
    encoder = make_static_encoder()
    encoder.append(Doubling())
    return encoder


@pytest.mark.parametrize("given", ["model", "model_init"])
def test_run_that_could_not_publish_its_model_is_refused_at_the_start(given, queries, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, *args, **kwargs: made.append(trainer))
    args = XMCTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", push_to_hub=True, hub_model_id="a/b")
    with pytest.raises(ValueError, match=r"modules.json names .*test_self_contained.Doubling, which is code"):
        XMCTrainer(
            **{given: doubling() if given == "model" else doubling}, args=args, train_dataset=queries, labels=LABELS
        )
    assert not made, "the repository was made"


def test_model_of_a_later_trial_is_checked(queries, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
    encoders = {"model": make_static_encoder()}
    args = XMCTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", push_to_hub=True, hub_model_id="a/b")
    trainer = XMCTrainer(None, args, queries, labels=LABELS, model_init=lambda: encoders["model"])
    encoders["model"] = doubling()
    with pytest.raises(ValueError, match=r"names .*test_self_contained.Doubling"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_train_refuses_an_encoder_that_cannot_be_saved_before_the_first_step(queries, tmp_path, monkeypatch):
    monkeypatch.setattr(XMCTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    data = XMCData(queries, Dataset.from_dict({"uid": LABELS, "text": LABELS}))
    with pytest.raises(ValueError, match=r"names .*test_self_contained.Doubling"):
        train(data, doubling(), output_dir=tmp_path, use_cpu=True, report_to="none")


def test_release_that_names_an_adapter_is_refused(bert, tmp_path):
    XMCModel(bert, LABELS).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ValueError, match="was not saved with the model"):
        XMCModel.from_pretrained(tmp_path / "model")
    forge(tmp_path / "model", {"adapter_config.json": b"{}"})
    with pytest.raises(ValueError, match=r"adapter_config.json.*: an adapter does not load without its base model"):
        XMCModel.from_pretrained(tmp_path / "model")


def test_run_with_an_adapter_resumes_and_its_release_loads_elsewhere(bert_folder, queries, tmp_path):
    def run(max_steps, resume=None):
        torch.manual_seed(0)
        encoder = make_bert_encoder(bert_folder)
        encoder.add_adapter(LoraConfig(r=2, target_modules=["query"]))
        args = XMCTrainingArguments(
            str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=max_steps, save_steps=1, learning_rate=0.1
        )
        trainer = XMCTrainer(encoder, args, queries, labels=LABELS)
        trainer.train(resume)
        return trainer.model

    run(1)
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").exists()
    resumed = run(2, resume=str(tmp_path / "run" / "checkpoint-1"))
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert_it_loads_elsewhere(resumed, tmp_path / "model")


def test_pushed_adapter_loads_without_its_base_model(bert_folder, tmp_path, monkeypatch):
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    shutil.copytree(bert_folder, tmp_path / "base")
    encoder = with_adapter(make_bert_encoder(tmp_path / "base"), LoraConfig(**LORA))
    model = XMCModel(encoder, LABELS)
    model.push_to_hub("org/lora", token="hf_test")
    shutil.rmtree(tmp_path / "base")
    assert not [name for name in hub.files("org/lora") if "adapter" in name]
    for offline in (False, True):
        cache = {"local_files_only": offline, "token": "hf_test"}
        pulled = XMCModel.from_pretrained("org/lora", cache_dir=tmp_path / "cache", device="cpu", **cache)
        stock = SentenceTransformer("org/lora", cache_folder=str(tmp_path / "cache"), device="cpu", **cache)
        for loaded in (pulled.encoder, stock):
            torch.testing.assert_close(loaded.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
        assert [row[0].uid for row in pulled.predict(TEXTS)] == [row[0].uid for row in model.predict(TEXTS)]
    hub.shutdown()
