"""Compare the default encoder with character n-grams and a linear model, on languages of different scripts.

    apt-get download libreoffice-l10n-ar libreoffice-l10n-fi libreoffice-l10n-hi libreoffice-l10n-ja \
        libreoffice-l10n-km libreoffice-l10n-th libreoffice-l10n-tr libreoffice-l10n-zh-cn
    for package in libreoffice-l10n-*.deb; do dpkg -x $package libreoffice; done
    python recipes/languages.py --messages libreoffice --output_dir runs/languages

The texts are the messages of LibreOffice in each language, and their labels are the dialogs that show them. The
English texts are the originals of the Turkish ones. Without `--messages`, two languages are generated: one without
spaces, and one with endings. A fifth of the texts are for the test. All models see the same training texts, and ours
takes its validation queries from them. A third one has the tokens of our encoder and the linear model. With `--splits`,
other fifths are for the test too, and with `--seeds`, our model is trained several times. Writes `languages.json`, and
prints the means of P@1 and R@5 as a table.
"""

import argparse
import gettext
import json
import logging
import random
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from hf_xmc import XMCData, rewrite_phrases, train
from hf_xmc.cli import HelpFormatter
from hf_xmc.encoders.rewriting import needs_letters

LANGUAGES = {
    "English": "en",
    "Chinese": "zh_CN",
    "Japanese": "ja",
    "Thai": "th",
    "Khmer": "km",
    "Finnish": "fi",
    "Turkish": "tr",
    "Arabic": "ar",
    "Hindi": "hi",
}
SOURCE = "tr"  # the language whose originals are the English texts
MNEMONIC = re.compile(r"\s*\([_~]\w\)|[_~]|(\.\.\.|:)$")  # marks of a key in a message
MAX_DIALOGS = 5  # of a text
FIFTHS = 5  # one of them is for the test
CHARACTERS = ["船舶", "航行", "港口", "乐器", "歌曲", "演奏", "火车", "轨道", "车站", "医生", "治疗", "药物"]
GLUE = "的了在是和与及其中之一有关于研究我们"
ENDINGS = ["".join(parts) for parts in product(("", "i", "j"), ("ssa", "sta", "lla", "lta", "ksi", "n"), 
                                              ("", "ni", "si", "mme", "nne"), ("", "kin", "han"))]  # fmt: skip
Row = tuple[str, list[str]]  # a text, and its labels


class Result(NamedTuple):
    """Percent of test texts whose first label is right, percent of their labels among the first five, CPU seconds."""

    p1: float
    r5: float
    seconds: float


def messages(folder: Path, language: str, num_labels: int) -> list[Row]:
    """Return the messages of LibreOffice in a language, each with the dialogs that show it, in random order.

    Args:
        folder: Folder with the files of the packages.
        language: Language code of the packages, or ``en`` for the originals.
        num_labels: Number of dialogs, those with the most texts.
    """
    dialogs: dict[str, set[str]] = defaultdict(set)
    files = sorted(folder.rglob(f"resource/{SOURCE if language == 'en' else language}/LC_MESSAGES/*.mo"))
    if not files:
        raise ValueError(f"{folder} has no messages in {language!r}. Unpack the package libreoffice-l10n-* there.")
    for file in files:
        with file.open("rb") as stream:
            catalog = vars(gettext.GNUTranslations(stream))["_catalog"]
        for key, translated in catalog.items():
            context, _, original = key.partition("\x04") if isinstance(key, str) else ("", "", "")
            if "|" in context and translated != original:
                text = MNEMONIC.sub("", original if language == "en" else translated).strip()
                if sum(map(str.isalpha, text)) > 1:
                    dialogs[text].add(f"{file.stem} {context.split('|')[0].strip()}")  # some end with a space
    counts = Counter(dialog for found in dialogs.values() for dialog in found)
    kept = {dialog for dialog, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:num_labels]}
    rows = [(text, sorted(found & kept)) for text, found in sorted(dialogs.items()) if len(found) <= MAX_DIALOGS]
    rows = [(text, labels) for text, labels in rows if labels]
    random.Random(0).shuffle(rows)
    return rows


def without_spaces(number: int, seed: int = 0) -> list[Row]:
    """Return generated Chinese: a text is a row of clauses without spaces, and its labels are the words in it."""
    draw, rows = random.Random(seed), []
    for _ in range(number):
        labels = draw.sample(CHARACTERS, 2)
        parts = [*labels, *draw.choices(GLUE, k=26)]
        draw.shuffle(parts)
        rows.append(("\uff0c".join("".join(parts[start : start + 7]) for start in range(0, 28, 7)) + "\u3002", labels))
    return rows


def inflected(number: int, seed: int = 0, num_labels: int = 40) -> list[Row]:
    """Return generated inflection: six words of a stem and an ending in each text, with two of the stems as labels."""
    draw, rows = random.Random(seed), []
    syllables = ["".join(pair) for pair in product("hklmnprstv", "aeiouy")]
    stems = sorted({"".join(draw.choices(syllables, k=3)) for _ in range(num_labels * 4)})
    labels, others = stems[:num_labels], stems[num_labels:]
    for _ in range(number):
        chosen = draw.sample(labels, 2)
        words = [stem + draw.choice(ENDINGS) for stem in (*chosen, *draw.choices(others, k=4))]
        draw.shuffle(words)
        rows.append((" ".join(words), chosen))
    return rows


def measure(found: Sequence[Sequence[str]], rows: Sequence[Row], seconds: float) -> Result:
    """Return the metrics of the first five labels of each text."""
    p1 = [names[:1] != [] and names[0] in labels for names, (_, labels) in zip(found, rows, strict=True)]
    r5 = [len({*names[:5]} & {*labels}) / len(labels) for names, (_, labels) in zip(found, rows, strict=True)]
    return Result(100 * float(np.mean(p1)), 100 * float(np.mean(r5)), seconds)


def linear(training: Sequence[Row], test: Sequence[Row], **features: Any) -> list[list[str]]:
    """Return the first five labels by tf-idf of the given features and a support vector machine for each label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer
    from sklearn.svm import LinearSVC

    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, **features)
    names = MultiLabelBinarizer()
    machines = OneVsRestClassifier(LinearSVC())
    targets = names.fit_transform([labels for _, labels in training])
    machines.fit(vectors.fit_transform([text for text, _ in training]), targets)
    scores = machines.decision_function(vectors.transform([text for text, _ in test]))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    return [[names.classes_[label] for label in labels] for labels in best]


def ngrams(training: Sequence[Row], test: Sequence[Row]) -> list[list[str]]:
    """Return the first five labels by one to four characters of each word, as :func:`linear` finds them."""
    return linear(training, test, analyzer="char_wb", ngram_range=(1, 4))


def our_tokens(training: Sequence[Row], test: Sequence[Row]) -> list[list[str]]:
    """Return the first five labels by the tokens of our encoder, as :func:`linear` finds them."""
    letters = needs_letters([text for text, _ in training])
    rows = [
        [(rewrite_phrases([text], letters)[0].lower(), labels) for text, labels in part] for part in (training, test)
    ]
    return linear(*rows, analyzer=str.split)


def ours(training: Sequence[Row], test: Sequence[Row], encoder: str = "phrases", seed: int = 42) -> list[list[str]]:
    """Return the first five labels of a model with default settings."""
    known = {label for _, labels in training for label in labels}
    asked = [(text, [label for label in labels if label in known]) for text, labels in test]
    parts = [([text for text, _ in rows], [labels for _, labels in rows]) for rows in (training, asked)]
    data = XMCData.from_lists(*parts[0], test=parts[1])
    with TemporaryDirectory() as folder:
        quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}
        model = train(data, encoder, output_dir=folder, seed=seed, **quiet)
        return [[label.uid for label in labels] for labels in model.predict([text for text, _ in test], 5)]


def compare(
    rows: Sequence[Row], models: dict[str, Sequence[Callable[..., list[list[str]]]]], splits: int = 1
) -> dict[str, list[Result]]:
    """Return the metrics of each model, trained on four fifths of the texts and tested on the others.

    Args:
        rows: The texts and their labels.
        models: Functions that train and predict, by name. Each function has a result for each tested fifth.
        splits: Number of fifths that are tested, one after another.
    """
    size = len(rows) // FIFTHS
    results: dict[str, list[Result]] = {name: [] for name in models}
    for first in range(0, splits * size, size):
        training, test = [*rows[:first], *rows[first + size :]], rows[first : first + size]
        for name, runs in models.items():
            for model in runs:
                start = time.process_time()
                found = model(training, test)
                results[name].append(measure(found, test, time.process_time() - start))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--messages", type=Path, help="folder with the files of libreoffice-l10n-*; else generated texts"
    )
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=[*LANGUAGES], help="languages to compare")
    parser.add_argument("--labels", type=int, default=100, help="number of dialogs, those with the most texts")
    parser.add_argument("--splits", type=int, choices=range(1, FIFTHS + 1), default=1, help="number of test fifths")
    parser.add_argument("--seeds", type=int, default=1, help="number of times that our model is trained, from 42 on")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for languages.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.messages is not None:
        sets = {name: messages(options.messages, LANGUAGES[name], options.labels) for name in options.languages}
    else:
        sets = {"generated, without spaces": without_spaces(1000), "generated, inflected": inflected(2000)}
    table = {}
    models = "n-grams | our tokens | ours"
    print(f"| language | texts | labels | P@1, {models} | R@5, {models} | CPU seconds, {models} |")
    print("|---" * 12 + "|")
    for name, rows in sets.items():
        runs = [partial(ours, seed=42 + number) for number in range(options.seeds)]
        results = compare(rows, {"ngrams": [ngrams], "our_tokens": [our_tokens], "ours": runs}, options.splits)
        num_labels = len({label for _, labels in rows for label in labels})
        means = [Result(*np.mean(some, axis=0).tolist()) for some in results.values()]
        table[name] = {"texts": len(rows), "labels": num_labels, "columns": Result._fields} | results
        cells = [f"{getattr(one, key):.1f}" for key in ("p1", "r5") for one in means]
        cells += [f"{one.seconds:.0f}" for one in means]
        print(f"| {name} | {len(rows)} | {num_labels} | {' | '.join(cells)} |", flush=True)
        (options.output_dir / "languages.json").write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
