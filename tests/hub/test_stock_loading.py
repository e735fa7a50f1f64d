"""Saved encoders load in sentence-transformers where this package cannot be imported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from helpers.in_batch import arguments
from helpers.tiny import LABELS, POSITIVES, make_static_encoder
from sentence_transformers import SentenceTransformerTrainer

from hf_xmc import XMCModel, in_batch_dataset, phrase_encoder, rewrite_phrases, st_losses, standalone_encoder
from hf_xmc.encoders.templates import MAX_WORDS

TEXTS = ["A red boat!", "the boat sails", "unseen words", "", "boat " * (MAX_WORDS + 9)]
PROGRAM = """if True:
    import json, sys
    sys.modules["hf_xmc"] = None  # importing it fails
    from sentence_transformers import SentenceTransformer
    texts, found = json.loads(sys.argv[1]), []
    for folder in sys.argv[2:]:
        encoder = SentenceTransformer(folder, device="cpu")
        found.append([encoder.similarity_fn_name, encoder.encode(texts).tolist()])
    try:
        import hf_xmc
    except ModuleNotFoundError:
        print(json.dumps(found))
"""


def save_model(folder):
    encoder = make_static_encoder()
    XMCModel(encoder, LABELS).save_pretrained(folder)
    return encoder.encode(TEXTS)


def save_phrase_encoder(folder):
    texts = ["a red boat", "a red boat sails", "the sea, under_the sun"]
    trained = phrase_encoder(rewrite_phrases(texts), embedding_dim=8, vocab_size=100, device="cpu")
    standalone_encoder(trained).save_pretrained(str(folder))
    return trained.encode(rewrite_phrases(TEXTS))


def save_encoder_of_the_stock_trainer(folder):
    encoder = make_static_encoder()
    rows = [f"text {number} about {LABELS[ids[0]]}" if ids else "text" for number, ids in enumerate(POSITIVES)]
    dataset = in_batch_dataset(Dataset.from_dict({"text": rows, "label_ids": POSITIVES}), LABELS)
    loss = st_losses.DecoupledSoftmaxLoss(encoder, temperature=0.1)
    SentenceTransformerTrainer(encoder, arguments(folder.with_name("run"), max_steps=2), dataset, loss=loss).train()
    encoder.save_pretrained(str(folder))
    return encoder.encode(TEXTS)


KINDS = {
    "model": (save_model, "dot"),
    "phrase encoder": (save_phrase_encoder, "dot"),
    "encoder of the stock trainer": (save_encoder_of_the_stock_trainer, None),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """For each kind of encoder: its embeddings here, and similarity and embeddings in a process without the package."""
    folders = [tmp_path_factory.mktemp("saved") / "encoder" for _ in KINDS]
    expected = [save(folder) for (save, _), folder in zip(KINDS.values(), folders, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(TEXTS), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {kind: (one, *other) for kind, one, other in zip(KINDS, expected, found, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_encoder_loads_without_this_package(kind, loaded):
    expected, similarity, embeddings = loaded[kind]
    assert abs(expected).max() > 0.01
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-6)  # sums of up to 1,000 vectors
    assert KINDS[kind][1] in (None, similarity)
