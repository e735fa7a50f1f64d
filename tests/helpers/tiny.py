"""Small encoders and data that every test can afford."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
HELPERS = Path(__file__).parent

LABELS = ["boat", "sailing boat", "car", "animal", "dog", "cat", "colour", "red", "blue", "plant", "old oak tree"]
ALTERNATIVES = ["blue boat", "old dog", "old red boat", "red car", "red", "colour red", "tree", "old tree", "boat boat"]
OF_LABELS = [0, 4, 0, 2, 7, 7, 10, 10, 0]  # which labels these are other texts of
POSITIVES = [[0, 1], [0], [2], [3, 4], [3, 5], [6, 7], [6, 8], [9, 10], [9], [2, 7], [], [0, 8, 3], [4]]


def several_texts():
    """The labels, some with several texts, which do not stand together; and the label of each text."""
    label_of = [*range(len(LABELS)), *OF_LABELS]
    table = {"uid": [f"L{label}" for label in label_of], "text": [*LABELS, *ALTERNATIVES]}
    return Dataset.from_dict(table), label_of


def best_of_texts(scores, label_of):
    """``(B, L)``, the score of each label's best text, of ``(B, T)`` scores of texts."""
    columns = [scores[:, torch.tensor(label_of) == label] for label in range(max(label_of) + 1)]
    return torch.stack([texts.max(1).values for texts in columns], dim=1)


def make_static_encoder(dim=16):
    from hf_xmc import static_encoder

    return static_encoder([*LABELS, "text about and"], embedding_dim=dim, vocab_size=200, device="cpu")


def make_bert(folder, dropout=0.3):
    """A transformer of a few thousand weights, with dropout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "text",
        "about",
        "and",
        *sorted({w for t in LABELS for w in t.split()}),
    ]
    words += list(map(str, range(20)))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,  # at the usual 0.02 so small a model embeds every text alike
    )
    BertModel(config).save_pretrained(folder)  # its pooler is not used, and gets no gradient
    return folder


def make_bert_encoder(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")


def make_router(folder):
    """A tower for queries and another for labels."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer

    towers = [[Transformer(str(folder)), Pooling(16)] for _ in range(2)]
    router = Router.for_query_document(query_modules=towers[0], document_modules=towers[1])
    return SentenceTransformer(modules=[router], device="cpu")


def make_heads(folder):
    """One transformer, and behind it a layer for queries and another for labels."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer

    torch.manual_seed(0)
    heads = Router.for_query_document(query_modules=[Dense(16, 16)], document_modules=[Dense(16, 16)])
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16), heads], device="cpu")


def make_router_with_frozen_labels(folder):
    encoder = make_router(folder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("document" not in name)
    return encoder


def relevance_of(positives):
    import scipy.sparse as sp

    offsets = np.cumsum([0] + [len(ids) for ids in positives])
    return sp.csr_array(
        (np.ones(offsets[-1], np.float32), np.concatenate(positives).astype(int), offsets),
        shape=(len(positives), len(LABELS)),
    )
