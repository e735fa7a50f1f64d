"""A static encoder that knows phrases: every word has a vector, and so has every frequent pair of neighbouring words.

A tokenizer cuts a text into pieces that do not overlap, but *small cat* and *cat family* both contain *cat*. So a text
is first rewritten, pairs after words:

    a small cat  ->  a small cat a_small small_cat

and the tokens of that are looked up and averaged as in any static encoder. For training, :func:`with_phrases` rewrites
the data once, and :func:`phrase_encoder` makes the encoder of such texts. Afterwards :func:`standalone` puts the
trained table behind a tokenizer that rewrites by itself: its chat template, a small program that stock tokenizers run
over what they are given, is the rewriting. What comes out reads plain text and loads in sentence-transformers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import OpenAIGPTConfig, OpenAIGPTModel, PreTrainedTokenizerFast

from hf_xmc.data.dataset import XMCData
from hf_xmc.data.prepared import SPLITS
from hf_xmc.encoders.roles import named_prompts
from hf_xmc.encoders.static import UNKNOWN, encoder_of

MAX_WORDS = 512  # of a text: the rest is not read
MAX_TOKENS = 4 * MAX_WORDS  # words and pairs, and room for words that fall into pieces
SPACED = {ord(mark): f" {mark} " for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~"} | {ord("_"): " "}  # _ joins pairs
WORDS = (
    f"{{%- set words = messages[-1].content.translate({SPACED}).split()[:{MAX_WORDS}] -%}}"
    f"{{{{- words | join(' ') or '{UNKNOWN}' -}}}}"  # a text without a word is one unknown token, never none
    "{%- for i in range(1, words | length) %} {{ words[i - 1] }}_{{ words[i] }}{%- endfor -%}"
)
TEMPLATE = "{%- if messages | length > 1 -%}{{- messages[0].content -}}{%- endif -%}" + WORDS  # a prompt comes first
TEMPLATES = (TEMPLATE, WORDS)  # the second, of models saved by earlier versions, leaves the prompt out


def write_phrases(texts: Sequence[str]) -> list[str]:
    """Each text as its words, then its pairs of neighbouring words; a punctuation mark is a word.

    >>> write_phrases(["A small cat."])
    ['A small cat . A_small small_cat cat_.']
    """
    return [_rewritten(text) for text in texts]


def _rewritten(text: str) -> str:
    """Rewrite one text as the chat template does, but faster."""
    words = text.translate(SPACED).split()[:MAX_WORDS]
    return " ".join([*words, *map("_".join, pairwise(words))]) or UNKNOWN


def with_phrases(data: XMCData) -> XMCData:
    """The same data set, its texts rewritten by :func:`write_phrases`."""
    tables: dict[str, Dataset] = {name: getattr(data, name) for name in (*SPLITS, "labels")}
    return replace(
        data,
        **{
            name: table.map(lambda rows: {"text": write_phrases(rows["text"])}, batched=True, desc=f"phrases of {name}")
            for name, table in tables.items()
            if table is not None
        },
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int = 50_000, num_phrases: int = 100_000) -> Tokenizer:
    """Tokens of rewritten texts: word pieces (Schuster & Nakajima, 2012), and the most frequent pairs.

    A rare word falls into pieces, a rare pair is one unknown token. The same texts give the same tokens.
    """
    lower = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    split_texts = [lower.normalize_str(text).split() for text in texts if text != UNKNOWN]
    single = [[word for word in words if "_" not in word] for words in split_texts]
    # Unless pieces of one letter are given, the trainer numbers them as a hash table has them, and ties follow that.
    letters = sorted({f"##{letter}" for words in single for word in words for letter in word[1:]})
    pieces = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN, *letters], show_progress=False)
    pieces.train_from_iterator(map(" ".join, single), trainer)
    vocab = pieces.get_vocab()
    pairs = Counter(word for words in split_texts for word in words if "_" in word)
    repeated = (pair for pair, count in pairs.most_common(num_phrases) if count > 1)
    vocab |= {pair: number for number, pair in enumerate(repeated, start=len(vocab))}

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def phrase_encoder(
    texts: Sequence[str],
    *,
    embedding_dim: int = 256,
    vocab_size: int = 50_000,
    num_phrases: int = 100_000,
    std: float = 0.5,
    seed: int = 0,
    device: str | None = None,
) -> SentenceTransformer:
    """Make an encoder of **rewritten** texts, for training; :func:`standalone` turns it into one of plain texts.

    What the texts do not contain adds nothing to an embedding: pairs without a vector of their own, and words with a
    character that occurs in no text, are the unknown token, which is zero and stays zero in training. It counts in the
    mean, here and after :func:`standalone`. Word pieces that the texts do not use start at zero, as in
    :func:`hf_xmc.static_encoder`. So a text of which nothing is known embeds to zero.

    Args:
        texts: Texts rewritten by :func:`write_phrases`, such as those of the training queries and the labels.
        embedding_dim: Size of the vectors.
        vocab_size: Maximum number of word pieces.
        num_phrases: Maximum number of pairs; a pair that occurs only once has no vector.
        std, seed, device: As in :func:`hf_xmc.static_encoder`.

    Raises:
        ValueError: if no text has a word.
    """
    return encoder_of(train_tokenizer(texts, vocab_size, num_phrases), texts, embedding_dim, std, seed, device)


def standalone(encoder: SentenceTransformer) -> SentenceTransformer:
    """Convert a trained encoder of :func:`phrase_encoder` to an encoder of plain texts.

    Embeddings are those of the rewritten texts, with the same prompts, precision and ``truncate_dim``. The table
    becomes the input embedding of a transformer without layers, the only stock module whose tokenizer runs a chat
    template; positions are given a zero.

    Raises:
        ValueError: if another function made the encoder.
    """
    if len(encoder) != 1 or not isinstance(encoder[0], StaticEmbedding):
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(f"expected one StaticEmbedding, as phrase_encoder makes, got {modules}.")
    table = encoder[0].embedding.weight.detach().cpu()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder[0].tokenizer,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
        chat_template=TEMPLATE,
    )
    size: dict[str, Any] = {"vocab_size": len(table), "n_embd": table.shape[1], "n_positions": MAX_TOKENS}
    lookup: Any = OpenAIGPTModel(OpenAIGPTConfig(**size, n_layer=0, n_head=1, embd_pdrop=0.0))
    lookup.to(table.dtype)
    lookup.tokens_embed.weight.data.copy_(table)
    lookup.positions_embed.weight.data.zero_()
    with TemporaryDirectory() as folder:
        lookup.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parts = [Transformer(folder), Pooling(table.shape[1], "mean")]
    return SentenceTransformer(
        modules=parts,
        prompts=named_prompts(encoder),
        default_prompt_name=encoder.default_prompt_name,
        similarity_fn_name=encoder.similarity_fn_name,
        truncate_dim=encoder.truncate_dim,
        device=str(encoder.device),
    )


def is_standalone(encoder: SentenceTransformer) -> bool:
    """Return whether :func:`standalone` made this encoder, or a saved copy of it."""
    modules: list[Any] = list(encoder)
    if len(modules) != 2 or not isinstance(modules[0], Transformer) or not isinstance(modules[1], Pooling):
        return False
    model, written = modules[0].auto_model, writes_phrases(modules[0].tokenizer)
    bare = isinstance(model, OpenAIGPTModel) and model.config.n_layer == 0 and model.dtype == torch.float32
    return bare and written and modules[1].pooling_mode == "mean"


def writes_phrases(tokenizer: Any) -> bool:
    """Return whether a tokenizer is one that rewrites texts, as :func:`standalone` makes it."""
    return getattr(tokenizer, "chat_template", None) in TEMPLATES


@torch.inference_mode()
def embed_standalone(
    encoder: SentenceTransformer, texts: Sequence[str], batch_size: int = 1024, prompt: str | None = None
) -> Tensor:
    """Return the ``(N, D)`` embeddings of a :func:`standalone` encoder, up to rounding, in a third of the time."""
    first: Any = encoder[0]
    before = prompt if prompt and first.tokenizer.chat_template == TEMPLATE else ""
    model, tokenizer = first.auto_model, first.tokenizer.backend_tokenizer
    if tokenizer.padding is not None:  # asked first: threads that read may not set anything at the same time
        tokenizer.no_padding()
    embeddings = torch.empty(len(texts), model.config.n_embd, device=model.device)
    for start in range(0, len(texts), batch_size):
        batch = [before + text for text in write_phrases(texts[start : start + batch_size])]
        tokens = [read.ids[: encoder.max_seq_length] for read in tokenizer.encode_batch_fast(batch, False, False)]
        sizes = np.array([len(ids) for ids in tokens])
        begin = sizes.cumsum() - sizes
        place = np.arange(sizes.sum()) - np.repeat(begin, sizes)
        ids, begins, places = (
            torch.from_numpy(part).to(model.device) for part in (np.concatenate(tokens), begin, place)
        )
        mean = embedding_bag(ids, model.tokens_embed.weight, begins, mode="mean")
        mean += embedding_bag(places, model.positions_embed.weight, begins, mode="mean")
        embeddings[start : start + batch_size] = mean
    return embeddings
