"""Write the inputs of `gpu.sh`: encoders of the size of DistilBERT and MiniLM, and random texts with many labels.

    python recipes/benchmarks/gpu_inputs.py --output_dir runs/gpu/inputs

If the Hub cannot be reached, or with `--tiny`, the encoders have random weights: enough for time and gradients, and not
for quality. `encoders.json` says which.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast

from hf_xmc import XMCData
from hf_xmc.cli import HelpFormatter

ENCODERS = {"distilbert": "distilbert-base-uncased", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}
SIZES = {"distilbert": (768, 6, 12, 3072), "minilm": (384, 6, 12, 1536)}  # hidden, layers, heads, intermediate
WORDS = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("nd", "rk", "ll", "st", "mp", "ck", "n", "t")]


def random_encoder(folder: Path, size: tuple[int, int, int, int]) -> SentenceTransformer:
    hidden, layers, heads, intermediate = size
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *map(chr, range(97, 123)), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    BertModel(config).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(hidden)])


def encoder_of(name: str, folder: Path, tiny: bool) -> tuple[SentenceTransformer, str]:
    if not tiny:
        try:
            return SentenceTransformer(ENCODERS[name]), ENCODERS[name]
        except OSError as error:
            print(f"{ENCODERS[name]} cannot be loaded ({type(error).__name__}), so its weights are random", flush=True)
    size = (16, 2, 2, 24) if tiny else SIZES[name]
    return random_encoder(folder, size), f"random weights, hidden size {size[0]}, {size[1]} layers"


def random_data(num_labels: int, num_queries: int) -> XMCData:
    """Return distinct labels of one to six words, and queries with the words of a label and others."""
    random = np.random.default_rng(0)
    labels = [
        f"{' '.join(random.choice(WORDS, random.integers(1, 6)))} {' '.join(np.base_repr(number, 26))}".lower()
        for number in range(num_labels)
    ]
    labels = [label.translate(str.maketrans("0123456789", "qrstuvwxyz")) for label in labels]
    of = random.integers(num_labels, size=(num_queries, 3))
    texts = [f"{labels[row[0]]} {' '.join(random.choice(WORDS, 8))}" for row in of]
    train = Dataset.from_dict({"text": texts, "label_ids": [sorted(set(row.tolist())) for row in of]})
    return XMCData(labels=Dataset.from_dict({"text": labels}), train=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_labels", type=int, default=131_073)
    parser.add_argument("--num_queries", type=int, default=20_000)
    parser.add_argument("--tiny", action="store_true", help="encoders that a CPU can afford")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    told = {}
    for name in ENCODERS:
        encoder, told[name] = encoder_of(name, options.output_dir / f"{name}-weights", options.tiny)
        encoder.save_pretrained(str(options.output_dir / name))
    random_data(options.num_labels, options.num_queries).save(options.output_dir / "data")
    (options.output_dir / "encoders.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
