"""A static encoder with a vector for each word and for each frequent pair of neighbouring words.

A tokenizer cuts a text into pieces that do not overlap, but *small cat* and *cat family* both contain *cat*. So a text
is first rewritten, with pairs after words:

    a small cat  ->  a small cat a_small small_cat

The leading words follow once more, with a mark, because they say more than later ones. In scripts without spaces
between words, each character is a word, and runs of three and four characters follow. If a text has zero-width spaces
between words, whole words follow too. If many words of new texts will be unseen, as in inflected languages, runs of
letters of each word follow.

The tokens of the rewritten text are looked up and averaged, as in any static encoder. For training,
:func:`with_phrases` rewrites the data once, and :func:`phrase_encoder` makes an encoder for rewritten texts. After
training, :func:`standalone_encoder` moves the rewriting into the chat template of the tokenizer, which stock tokenizers
run on their input. The result reads plain text and loads in sentence-transformers alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from transformers import OpenAIGPTConfig, OpenAIGPTModel, PreTrainedTokenizerFast

from hf_xmc.data.dataset import XMCData
from hf_xmc.data.prepared import SPLITS
from hf_xmc.data.progress import no_bar_for_few
from hf_xmc.encoders.rewriting import REWRITINGS, WITH_LETTERS, WORDS, Rewriting, needs_letters
from hf_xmc.encoders.roles import named_prompts, query_modules
from hf_xmc.encoders.static import encoder_of, lower
from hf_xmc.encoders.templates import LEADING, MAX_WORDS, UNKNOWN

LEAD_MARKS = tuple(f"_{mark}" for mark, _, _ in LEADING)
MAX_LEADS = sum(size for _, _, size in LEADING)
MAX_TOKENS = 4 * MAX_WORDS + MAX_LEADS  # words, pairs, leading words, and runs of characters
MAX_LETTER_TOKENS = 12 * MAX_WORDS + MAX_LEADS  # with the letters of words
MAX_CHARACTERS = 100  # in a token; longer words are cut

logger = logging.getLogger(__name__)


def rewrite_phrases(texts: Sequence[str], letters: bool = False) -> list[str]:
    """Rewrite each text as its words, its pairs of neighbouring words, and its leading words with marks.

    A punctuation mark is a word. The leading words are the first eight of the text (``_^``), and the first four
    (``_:``) and the first two (``_::``) of its body. The body follows the first colon, as in ``title: text``; a text
    without a colon is all body.

    In scripts without spaces, a word is a character with its marks, and the runs of three and four characters follow.
    Brackets stand for the ends of a text in such a script. If a text has zero-width spaces between words, as in Khmer,
    they are bars in these runs, which end at other spaces, and whole words follow.

    Args:
        texts: The texts.
        letters: Whether runs of letters of each word follow too, as for inflected languages: of four letters in
            alphabets such as Latin, and of two and three in scripts such as Arabic, whose words have fewer characters.

    >>> rewrite_phrases(["cat: an animal"])
    ['cat : an animal cat_: :_an an_animal _^cat _^: _^an _^animal _:an _:animal _::an _::animal']
    >>> rewrite_phrases(["\u9ed2\u732b"])[0].split()[9:]
    ['_[\u9ed2\u732b', '_\u9ed2\u732b]', '_[\u9ed2\u732b]']
    >>> rewrite_phrases(["cats"], letters=True)
    ['cats _^cats _:cats _::cats _<cat _cats _ats>']
    """
    rewriting = WITH_LETTERS if letters else WORDS
    return [rewriting.rewrite(text) for text in texts]


def with_phrases(data: XMCData, letters: bool | None = None) -> XMCData:
    """Return the data set with its texts rewritten by :func:`rewrite_phrases`.

    Args:
        data: The data set.
        letters: Whether the letters of words are written. By default, they are if more than 3 % of the words of new
            texts are expected to be unseen, judged by the words that occur once in the training texts.
    """
    if letters is None:
        letters = needs_letters(data.train["text"][:])
        if letters:
            logger.info("Many words of new texts will be unseen, so the encoder also reads the letters of words.")
    tables: dict[str, Dataset] = {name: getattr(data, name) for name in (*SPLITS, "labels")}
    rewritten = {}
    for name, table in tables.items():
        if table is not None:
            with no_bar_for_few(len(table)):
                rewritten[name] = table.map(
                    lambda rows: {"text": rewrite_phrases(rows["text"], letters)},
                    batched=True,
                    desc=f"phrases of {name}",
                )
    return replace(data, **rewritten)


def train_tokenizer(
    texts: Sequence[str], vocab_size: int = 50_000, num_phrases: int = 100_000, min_count: int = 2
) -> Tokenizer:
    """Train a tokenizer of rewritten texts: word pieces (Schuster & Nakajima, 2012), and frequent pairs and runs.

    A rare word is split into pieces, and a rare pair or run is one unknown token. Words of more than 100 characters are
    cut. The same texts give the same tokens.
    """
    split_texts = _split(texts)
    single = [[word for word in words if "_" not in word] for words in split_texts]
    # Without given one-letter pieces, the trainer numbers them in the order of a hash table, which then breaks ties.
    letters = sorted({f"##{letter}" for words in single for word in words for letter in word[1:]})
    pieces = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN, *letters], show_progress=False)
    pieces.train_from_iterator(map(" ".join, single), trainer)
    vocab = pieces.get_vocab()
    counts = Counter(chain.from_iterable(split_texts))
    pairs = Counter({word: count for word, count in counts.items() if "_" in word})
    repeated = (pair for pair, count in pairs.most_common(num_phrases) if count >= min_count)
    vocab |= {pair: number for number, pair in enumerate(repeated, start=len(vocab))}

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=MAX_CHARACTERS))
    long_words = pre_tokenizers.Split(Regex(rf"\G[^_]{{{MAX_CHARACTERS}}}(?=[^_]*$)"), "isolated")
    tokenizer.normalizer = lower()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), long_words])
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def _split(texts: Sequence[str]) -> list[list[str]]:
    """Return the words, pairs and runs of rewritten texts, as the tokenizer reads them."""
    normalizer = lower()
    return [normalizer.normalize_str(text).split() for text in texts if text != UNKNOWN]


def phrase_encoder(
    texts: Sequence[str],
    *,
    embedding_dim: int = 256,
    vocab_size: int = 50_000,
    num_phrases: int = 100_000,
    min_count: int = 2,
    std: float = 0.5,
    seed: int = 0,
    device: str | None = None,
) -> SentenceTransformer:
    """Make an encoder of **rewritten** texts, for training. :func:`standalone_encoder` converts it to plain texts.

    Unknown words add nothing to an embedding. A pair without a vector, or a word with a character that occurs in no
    text, becomes the unknown token, which stays zero in training and counts in the mean. Word pieces that the texts do
    not use start at zero, as in :func:`hf_xmc.static_encoder`. So a text without a known word embeds to zero. Leading
    words, and pairs and runs that occur once, start at zero too, so that they add only what training finds.

    Args:
        texts: Texts rewritten by :func:`rewrite_phrases`, such as those of the training queries and the labels.
        embedding_dim: Size of the vectors.
        vocab_size: Maximum number of word pieces.
        num_phrases: Maximum number of pairs, leading words and runs, the most frequent ones.
        min_count: How often one of these must occur to have a vector. With few texts, 1 is better.
        std, seed, device: As in :func:`hf_xmc.static_encoder`.

    Raises:
        ValueError: if no text has a word.
    """
    tokenizer = train_tokenizer(texts, vocab_size, num_phrases, min_count)
    encoder = encoder_of(tokenizer, texts, embedding_dim, std, seed, device)
    counts = Counter(chain.from_iterable(_split(texts))) if min_count < 2 else {}
    table: Any = encoder[0].embedding
    zero = [
        row
        for token, row in tokenizer.get_vocab().items()
        if token.startswith(LEAD_MARKS) or ("_" in token and counts.get(token) == 1)
    ]
    with torch.no_grad():
        table.weight[zero] = 0
    return encoder


def standalone_encoder(encoder: SentenceTransformer) -> SentenceTransformer:
    """Convert a trained encoder of :func:`phrase_encoder` to an encoder of plain texts.

    Embeddings equal those of the rewritten texts, with the same prompts, precision and ``truncate_dim``. The vectors
    become the input embeddings of a transformer without layers, because only its tokenizer runs a chat template. Its
    position embeddings are zero.

    Raises:
        ValueError: if :func:`phrase_encoder` did not make the encoder.
    """
    unit = len(encoder) == 2 and isinstance(encoder[1], Normalize)
    if len(encoder) != 1 + unit or not isinstance(encoder[0], StaticEmbedding):
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(
            f"`encoder` must be a StaticEmbedding from phrase_encoder, alone or followed by Normalize, got {modules}."
        )
    table = encoder[0].embedding.weight.detach().cpu()
    others = [token for token in encoder[0].tokenizer.get_vocab() if not token.startswith(LEAD_MARKS)]
    letters = any(token.startswith("_") for token in others if "<" in token or ">" in token)
    rewriting, max_tokens = (WITH_LETTERS, MAX_LETTER_TOKENS) if letters else (WORDS, MAX_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder[0].tokenizer,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        model_max_length=max_tokens,
        chat_template=rewriting.template,
    )
    size: dict[str, Any] = {"vocab_size": len(table), "n_embd": table.shape[1], "n_positions": max_tokens}
    lookup: Any = OpenAIGPTModel(OpenAIGPTConfig(**size, n_layer=0, n_head=1, embd_pdrop=0.0))
    lookup.to(table.dtype)
    lookup.tokens_embed.weight.data.copy_(table)
    lookup.positions_embed.weight.data.zero_()
    with TemporaryDirectory() as folder:
        lookup.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parts = [Transformer(folder), Pooling(table.shape[1], "mean"), *([Normalize()] if unit else [])]
    return SentenceTransformer(
        modules=parts,
        prompts=named_prompts(encoder),
        default_prompt_name=encoder.default_prompt_name,
        similarity_fn_name=encoder.similarity_fn_name,
        truncate_dim=encoder.truncate_dim,
        device=str(encoder.device),
    )


def is_phrase_encoder(encoder: SentenceTransformer) -> bool:
    """Return whether the encoder rewrites texts, as the result of :func:`standalone_encoder` does."""
    return rewriting_of(encoder) is not None


def rewriting_of(encoder: SentenceTransformer) -> Rewriting | None:
    """Return how the encoder rewrites texts, or ``None`` if it does not; releases keep the way they were made with."""
    tokenizer = getattr(query_modules(encoder)[0], "tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    return REWRITINGS.get(template) if isinstance(template, str) else None


def averages_phrases(encoder: SentenceTransformer) -> bool:
    """Return whether embeddings are float32 means of word and phrase vectors, which may be scaled to unit norm."""
    modules: list[Any] = list(encoder)
    kinds = [type(module) for module in modules]
    if kinds[:2] != [Transformer, Pooling] or kinds[2:] not in ([], [Normalize]) or not is_phrase_encoder(encoder):
        return False
    model = modules[0].auto_model
    bare = isinstance(model, OpenAIGPTModel) and model.config.n_layer == 0 and model.dtype == torch.float32
    return bare and modules[1].pooling_mode == "mean"


@torch.inference_mode()
def embed_phrases(
    encoder: SentenceTransformer, texts: Sequence[str], batch_size: int = 1024, prompt: str | None = None
) -> Tensor:
    """Return the ``(N, D)`` embeddings of an encoder from :func:`standalone_encoder`, up to rounding.

    This is 3 to 5 times as fast as ``encode_query``, as measured by ``recipes/benchmarks/encode.py``.
    """
    first: Any = encoder[0]
    rewriting = rewriting_of(encoder) or WORDS
    before = prompt if prompt and rewriting.prompted else ""
    model, tokenizer = first.auto_model, first.tokenizer.backend_tokenizer
    if tokenizer.padding is not None:  # checked first, because threads must not set it at the same time
        tokenizer.no_padding()
    device, most = model.device, encoder.max_seq_length  # read once, because their look-up takes long
    embeddings = torch.empty(len(texts), model.config.n_embd, device=device)
    for start in range(0, len(texts), batch_size):
        batch = [before + rewriting.rewrite(text) for text in texts[start : start + batch_size]]
        tokens = [read.ids[:most] for read in tokenizer.encode_batch_fast(batch, False, False)]
        sizes = np.array([len(ids) for ids in tokens])
        begin = sizes.cumsum() - sizes
        place = np.arange(sizes.sum()) - np.repeat(begin, sizes)
        ids, begins, places = (torch.from_numpy(part).to(device) for part in (np.concatenate(tokens), begin, place))
        mean = embedding_bag(ids, model.tokens_embed.weight, begins, mode="mean")
        mean += embedding_bag(places, model.positions_embed.weight, begins, mode="mean")
        embeddings[start : start + batch_size] = mean
    return embeddings if len(encoder) == 2 else normalize(embeddings)
