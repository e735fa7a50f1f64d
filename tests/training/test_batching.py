"""The tensors of a step, for encoders that pad and encoders that do not."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from transformers import DataCollatorWithFlattening

from hf_xmc.encoders.forward import embed
from hf_xmc.padding import pad, pad_flat
from hf_xmc.training.batching import TokenizedLabels, XMCCollator, draw_positives


@pytest.fixture(params=["static", "bert"])
def any_encoder(request, bert_folder):
    return make_static_encoder() if request.param == "static" else make_bert_encoder(bert_folder)


def test_token_table_gives_the_features_of_the_encoder(any_encoder):
    table = TokenizedLabels(any_encoder, LABELS)
    chosen = np.array([10, 0, 4, 10])
    expected = any_encoder.preprocess([LABELS[label] for label in chosen])
    for name, tensor in table.features(chosen).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, expected[name]), name
    any_encoder.eval()
    embedded = embed(any_encoder, table.features(chosen))
    torch.testing.assert_close(embedded, any_encoder.encode([LABELS[i] for i in chosen], convert_to_tensor=True))


def test_token_table_puts_the_prompt_before_every_label(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    encoder.prompts["document"] = "text about "
    table = TokenizedLabels(encoder, LABELS)
    expected = encoder.preprocess(["text about boat"])["input_ids"]
    assert torch.equal(table.features(np.array([0]))["input_ids"], expected)


def test_token_table_pads_texts_that_the_encoder_would_concatenate(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    expected = TokenizedLabels(encoder, LABELS)
    first = encoder[0]  # with FlashAttention, which needs a GPU, it sets these itself
    first.can_flatten_inputs, first._flatten_position_offset = True, 0
    first.data_collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    assert "attention_mask" not in encoder.preprocess(LABELS)
    table = TokenizedLabels(encoder, LABELS)
    assert first.can_flatten_inputs
    for name, tensor in expected.features(np.arange(11)).items():
        got = table.features(np.arange(11))[name]
        assert torch.equal(got, tensor) if isinstance(tensor, torch.Tensor) else got == tensor


def test_token_table_refuses_an_empty_list_of_labels(encoder):
    with pytest.raises(ValueError, match="`labels` must have at least one text"):
        TokenizedLabels(encoder, [])


@pytest.mark.parametrize(("size", "tokens"), [(None, None), (4, None), (None, 9), (3, 9), (100, 1)])
def test_chunks_hold_every_label_once_within_their_size(any_encoder, size, tokens):
    table = TokenizedLabels(any_encoder, LABELS, chunk_size=size, chunk_tokens=tokens)
    ordered = table.by_length(np.arange(11))
    seen = []
    for part, features in table.chunks(ordered):
        seen += ordered[part].tolist()
        assert size is None or part.stop - part.start <= size
        assert tokens is None or features["input_ids"].numel() <= tokens or part.stop - part.start == 1
    assert sorted(seen) == list(range(11))
    assert seen == ordered.tolist()


def test_chunks_of_padded_texts_have_few_sizes(bert_folder):
    """Chunks of any size fragment the memory of a process, which then grows from step to step."""
    table = TokenizedLabels(make_bert_encoder(bert_folder), LABELS, chunk_tokens=700)
    for number in range(180, 400, 7):
        rows = table.by_length(np.resize(np.arange(11), number))
        sizes = [part.stop - part.start for part, _ in table.chunks(rows)]
        assert sum(sizes) == number
        assert all(size % 32 == 0 for size in sizes[:-1])
        assert sizes[-1] <= 32 or sizes[-1] % 32 == 0


def test_chunks_without_padding_are_full():
    table = TokenizedLabels(make_static_encoder(), LABELS, chunk_tokens=50)
    rows = np.resize(np.arange(11), 200)
    *whole, _ = [table.lengths[rows[part]].sum() for part, _ in table.chunks(rows)]
    assert min(whole) > 50 - table.lengths.max()


def test_a_single_chunk_is_not_divided(bert_folder):
    """Two chunks would be embedded twice."""
    table = TokenizedLabels(make_bert_encoder(bert_folder), LABELS, chunk_tokens=10_000)
    assert [part for part, _ in table.chunks(np.resize(np.arange(11), 45))] == [slice(0, 45)]


def test_positives_are_drawn_by_their_weights_without_repetition():
    positives = torch.tensor([[4, 7, 4, -100], [1, 2, 3, -100], [5, -100, -100, -100]]).repeat(2000, 1)
    weights = torch.tensor([[1.0, 1, 1, 9], [1, 0, 3, 9], [2, 9, 9, 9]]).repeat(2000, 1)
    torch.manual_seed(0)
    drawn = draw_positives(positives, weights, 1).view(2000, 3, 4)
    assert drawn.sum(2).eq(1).all()
    shares = drawn.mean(0)
    assert shares[:, 3].sum() == shares[0, 2] == shares[1, 1] == 0
    # Four standard deviations: of 2,000 draws 1/2 and 3/4 are within 0.045 of themselves.
    assert abs(shares[0, 0] - 1 / 2) < 0.045
    assert abs(shares[1, 2] - 3 / 4) < 0.045
    assert draw_positives(positives, None, 2).view(2000, 3, 4).sum(2).mean(0).tolist() == [2, 2, 1]


def test_collator_pads_positives_and_weights(encoder):
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
    assert pad([[], []]).dtype == torch.int64
    assert pad([[3, 1], [2, 2]], fill=0.0).dtype == torch.float32  # grades, as where a row has to be filled up
    with pytest.raises(
        ValueError, match="batch, row 0: label_ids and label_scores must have the same length and order, got 2 and 1"
    ):
        collator([{**rows[0], "label_scores": [0.5]}, rows[1]])


@pytest.mark.parametrize("fill", [-100, 0.0])
@pytest.mark.parametrize("rows", [[], [[]], [[], [5], [], [1, 2, 3], [4]], [[3, 1], [2, 2]]])
def test_flat_rows_are_padded_as_lists_are(rows, fill):
    offsets = 2 + np.cumsum([0, *map(len, rows)])
    got = pad_flat(np.array([0, 0, *(value for row in rows for value in row), 9]), offsets, fill)
    assert got.dtype == pad(rows, fill).dtype
    assert got.tolist() == (pad(rows, fill).tolist() if rows else [])
