"""The tensors of a step, for encoders that pad and encoders that do not."""

import numpy as np
import pytest
import torch
from conftest import LABELS, make_bert_encoder, make_static_encoder

from hf_xmc.batching import AllLabels, LabelTable, XMCCollator, pad
from hf_xmc.encoding import embed, embed_in_chunks


@pytest.fixture(params=["static", "bert"])
def any_encoder(request, bert_folder):
    return make_static_encoder() if request.param == "static" else make_bert_encoder(bert_folder)


def test_the_table_gives_what_the_encoder_would_make_of_the_texts(any_encoder):
    table = LabelTable(any_encoder, LABELS)
    chosen = np.array([10, 0, 4, 10])
    expected = any_encoder.preprocess([LABELS[label] for label in chosen])
    for name, tensor in table.features(chosen).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, expected[name]), name
    any_encoder.eval()
    embedded = embed(any_encoder, table.features(chosen))
    torch.testing.assert_close(embedded, any_encoder.encode([LABELS[i] for i in chosen], convert_to_tensor=True))


def test_a_prompt_is_part_of_every_label(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    table = LabelTable(encoder, LABELS, prompt="text about ")
    expected = encoder.preprocess(["text about boat"])["input_ids"]
    assert torch.equal(table.features(np.array([0]))["input_ids"], expected)


@pytest.mark.parametrize("size", [None, 1, 4, 11, 100])
def test_every_label_has_one_column_and_positives_point_at_it(any_encoder, size):
    any_encoder.eval()
    all_labels = AllLabels(LabelTable(any_encoder, LABELS), size)
    candidates = all_labels(torch.tensor([[3, -100], [10, 0]]))
    assert sorted(all_labels.column_of.tolist()) == list(range(11))
    columns = embed_in_chunks(any_encoder, candidates.chunks)
    expected = any_encoder.encode([LABELS[3], LABELS[10], LABELS[0]], convert_to_tensor=True)
    assert candidates.positives[0, 1] == -100
    torch.testing.assert_close(columns[candidates.positives[[0, 1, 1], [0, 0, 1]]], expected)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_chunks_change_no_gradient_with_dropout_on(bert_folder, size):
    """A label is embedded twice; the second time must draw the same dropout mask as the first."""
    encoder = make_bert_encoder(bert_folder).train()
    chunks = AllLabels(LabelTable(encoder, LABELS), size).chunks
    weights = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))

    def gradients(embed_them):
        encoder.zero_grad()
        torch.manual_seed(2)
        embeddings = embed_them()
        (embeddings * weights).sum().backward()
        return embeddings.detach(), {
            name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
        }

    embeddings, cached = gradients(lambda: embed_in_chunks(encoder, chunks))
    again, direct = gradients(lambda: torch.cat([embed(encoder, chunk) for chunk in chunks]))
    other_mask, _ = gradients(lambda: torch.cat([embed(encoder, chunk) for chunk in chunks[::-1]]).flip(0))
    assert torch.equal(embeddings, again)
    assert not torch.equal(embeddings.sort(0).values, other_mask.sort(0).values), "dropout is off"
    for name, gradient in direct.items():
        torch.testing.assert_close(cached[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(float(gradient.norm()) for gradient in direct.values()) > 1


def test_the_collator_pads_positives_and_weights(encoder):
    collator = XMCCollator(preprocess_fn=encoder.preprocess, router_mapping={}, prompts={})
    rows = [
        {"text": "a boat", "label_ids": [0, 1], "label_scores": [0.5, 2.0]},
        {"text": "", "label_ids": [], "label_scores": []},
    ]
    batch = collator(rows)
    assert batch["label"].tolist() == [[0, 1], [-100, -100]]
    assert batch["label_weights"].tolist() == [[0.5, 2.0], [0.0, 0.0]]
    assert "labels" not in batch
    assert pad([[], []]).tolist() == [[-100], [-100]]
