"""Corpora of Annif, fastText, AttentionXML and LightXML: each as its tool writes it, and what is refused."""

import gzip
import json

import pytest

from hf_xmc import load_xmc
from hf_xmc.data.readers.corpus_files import find_corpora
from hf_xmc.data.vocabulary import Vocabulary

EX = "http://www.yso.fi/onto/yso/"
VOCABULARY = f"<{EX}p1>\tboats\n<{EX}p2>\tcars\n<{EX}p3>\tmachine learning\n"
THESAURUS = f"""@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<{EX}p1> a skos:Concept ; skos:prefLabel "boats"@en , "veneet"@fi ; skos:altLabel "vessels"@en .
<{EX}p2> a skos:Concept ; skos:prefLabel "cars"@en , "autot"@fi ; skos:broader <{EX}p1> .
<{EX}p3> a skos:Concept ; skos:prefLabel "machine learning"@en .
"""
TEXTS = ["A sloop", "Sails, and wheels", "nothing"]
LABELS = [["boats"], ["boats", "cars"], []]


def dump(**record):
    return json.dumps(record) + "\n"


FILES = {  # name of the folder: the files in it, all of them one corpus
    "annif tsv": {
        "labels.tsv": VOCABULARY,
        "train.tsv": f"A sloop\t<{EX}p1>\nSails, and wheels\t<{EX}p1> <{EX}p2>\nnothing\t\n",
        "test.tsv": f"A van\t<{EX}p2>\n",
    },
    "annif tsv, bare URIs": {
        "labels.ttl": THESAURUS,
        "train.tsv": f"\ufeffA sloop\t{EX}p1\r\n\r\nSails, and wheels\t{EX}p1 {EX}p2\r\nnothing\t\r\n",
        "test.tsv": f"A van\t{EX}p2\r\n",
    },
    "annif csv": {
        "labels.csv": f"uri,label_en,label_fi,notation\n{EX}p1,boats,veneet,\n{EX}p2,cars,autot,42.1\n",
        "train.csv": "document_id,text,subject_uris\n"
        f'1,A sloop,<{EX}p1>\n2,"Sails, and wheels",{EX}p1 {EX}p2\n3,nothing,\n',
        "test.csv": f"text;subject_uris\nA van;<{EX}p2>\n",
    },
    "annif jsonl": {
        "labels.ttl": THESAURUS,
        "train.jsonl": dump(text="A sloop", subjects=[{"uri": f"{EX}p1"}])
        + dump(text="Sails, and wheels", subjects=[{"uri": f"{EX}p1", "label": "boats"}, {"label": "cars"}])
        + dump(document_id="3", text="nothing", metadata={"title": "Nothing"}),
        "test.jsonl": dump(text="A van", subjects=[{"label": "cars"}]),
    },
    "annif full texts with labels": {
        "labels.ttl": THESAURUS,
        "train/1.txt": "A sloop",
        "train/1.key": "vessels\n",
        "train/2.txt": "Sails, and wheels",
        "train/2.key": "boats\r\ncars\r\n\r\n",
        "train/3.txt": "nothing",
        "test/1.txt": "A van",
        "test/1.key": "cars",
    },
    "annif full texts with URIs": {
        "train/1.txt": "\ufeffA sloop",
        "train/1.tsv": f"<{EX}p1>\tboats\n",
        "train/1.key": "another\n",
        "train/2.txt": "Sails, and wheels",
        "train/2.tsv": f"<{EX}p1>\tboats\n<{EX}p2>\tcars\t0.7\n",
        "train/3.json": json.dumps({"text": "nothing", "subjects": []}),
        "test/1.txt": "A van",
        "test/1.tsv": f"<{EX}p2>\tcars\n",
    },
    "fasttext": {
        "train.txt": "__label__boats A sloop\n__label__boats __label__cars Sails, and wheels\nnothing\n",
        "test.txt": "__label__cars A van\n",
    },
    "fasttext, labels at the end": {
        "labels.txt": "boats\ncars\n",
        "train.txt": "A sloop\t__label__boats\n\n__label__cars Sails, and wheels __label__boats\nnothing\n",
        "test.txt": "A van __label__cars",
    },
    "attention xml": {
        "train_raw_texts.txt": "A sloop\nSails, and wheels\nnothing\n",
        "train_texts.txt": "a sloop\nsails and wheels\nnothing\n",
        "train_labels.txt": "boats\nboats cars\n\n",
        "test_raw_texts.txt": "A van\n",
        "test_labels.txt": "cars\n",
    },
    "light xml": {
        "labels.tsv": "7\tboats\n12\tcars\n",
        "train_texts.txt": "A sloop\nSails, and wheels\nnothing\n",
        "train_labels.txt": "7\n7 12\n\n",
        "test_texts.txt": "A van\n",
        "test_labels.txt": "12\n",
    },
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def names_of(data, split):
    first = [texts[0] for texts in texts_by_label(data)]
    return [sorted(first[label] for label in row) for row in data.split(split)["label_ids"]]


def texts_by_label(data):
    texts = [[] for _ in range(data.num_labels)]
    for label, text in zip(data.label_of.tolist(), data.labels["text"], strict=True):
        texts[label].append(text)
    return texts


def check(data):
    assert data.train["text"][:] == TEXTS
    assert names_of(data, "train") == LABELS
    assert (data.test["text"][:], names_of(data, "test")) == (["A van"], [["cars"]])
    assert data.load_report["train: queries without labels"] == 1


@pytest.mark.parametrize("layout", FILES)
def test_a_corpus_gives_texts_and_labels(layout, tmp_path):
    write(tmp_path, FILES[layout])
    check(load_xmc(tmp_path, carve_missing=False))


@pytest.mark.parametrize("layout", ["annif tsv", "annif csv", "annif jsonl", "fasttext"])
def test_a_corpus_may_be_gzipped(layout, tmp_path):
    write(tmp_path, {f"{name}.gz": gzip.compress(content.encode()) for name, content in FILES[layout].items()})
    check(load_xmc(tmp_path, carve_missing=False))


@pytest.mark.parametrize("layout", FILES)
def test_a_file_or_folder_alone_is_the_training_split(layout, tmp_path):
    write(tmp_path, FILES[layout])
    files = [path for path in tmp_path.glob("train*") if path.is_dir() or path.suffix != ".txt" or layout[0] == "f"]
    for path in files:
        data = load_xmc(path, vocabulary={f"{EX}p1": ["boats", "vessels"], f"{EX}p2": "cars"}, carve_missing=False)
        assert (data.train["text"][:], names_of(data, "train")) == (TEXTS, LABELS)
        assert data.test is None


def test_alternative_labels_are_further_texts(tmp_path):
    write(tmp_path, FILES["annif jsonl"])
    data = load_xmc(tmp_path, carve_missing=False)
    assert texts_by_label(data) == [["boats", "vessels"], ["cars"], ["machine learning"]]
    assert data.labels["uid"][:] == [f"{EX}p1", f"{EX}p1", f"{EX}p2", f"{EX}p3"]


def test_a_vocabulary_in_another_language_finds_its_labels(tmp_path):
    write(tmp_path, {"yso.ttl": THESAURUS.replace("@fi", "@FI"), "corpus/1.txt": "Jolla", "corpus/1.key": "veneet\n"})
    vocabulary = Vocabulary.read(tmp_path / "yso.ttl", language="fi")
    data = load_xmc(tmp_path / "corpus", vocabulary=vocabulary, carve_missing=False)
    assert names_of(data, "train") == [["veneet"]]
    assert data.load_report["yso.ttl: concepts with labels in en"] == 1
    with pytest.raises(ValueError, match=r"1.key: label 'veneet' is not in the vocabulary"):
        load_xmc(tmp_path / "corpus", vocabulary=tmp_path / "yso.ttl", carve_missing=False)


def test_an_underscore_in_a_token_is_a_blank_in_its_text(tmp_path):
    write(tmp_path, {"x.txt": "__label__machine_learning __label__food-safety text __here__\n"})
    data = load_xmc(tmp_path / "x.txt", carve_missing=False)
    assert data.train["text"][:] == ["text __here__"]
    assert data.labels["uid"][:] == ["machine_learning", "food-safety"]
    assert data.labels["text"][:] == ["machine learning", "food-safety"]
    vocabulary = ["food-safety", "machine learning", "cars"]
    data = load_xmc(tmp_path / "x.txt", vocabulary=vocabulary, carve_missing=False)
    assert data.train["label_ids"][:] == [[0, 1]]


def test_a_corpus_next_to_another_layout_is_refused(tmp_path):
    write(tmp_path, {**FILES["fasttext"], "lbl.json": ""})
    with pytest.raises(ValueError, match=r"contains train and lbl.json, which belong to two layouts"):
        load_xmc(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.tsv", "train.csv"])
def test_a_table_of_names_is_no_corpus_of_annif(name, tmp_path):
    rows = {"train.jsonl": dump(text="a", subjects=["boats"]), "train.tsv": "text\tsubjects\na\tboats\n"}
    write(tmp_path, {name: rows.get(name, "text,subjects\na,boats\n")})
    assert find_corpora(tmp_path) == {}
    data = load_xmc(tmp_path, text="text", labels="subjects", separator=None if "json" in name else ";")
    assert data.labels["text"][:] == ["boats"]


def annif(train, **files):
    return {"labels.tsv": VOCABULARY, "train.tsv": train, **files}


FINE = f"A sloop\t<{EX}p1>\n"
BAD = {
    "no tab": (annif(FINE + f"A van {EX}p2\n"), r"train.tsv:2: expected `text TAB <uri> <uri>`, got no tab"),
    "unknown uri": (
        annif(FINE + f"A van\t<{EX}p9>\n"),
        rf"train.tsv:2: label '{EX}p9' .* 3 labels. `unknown",
    ),
    "no vocabulary": ({"train.tsv": FINE}, rf"train.tsv:1: label '{EX}p1' is a URI, and its text is not known. Pass"),
    "unknown uri in CSV": (
        {"labels.tsv": VOCABULARY, "train.csv": f'text,subject_uris\n"A\nsloop",{EX}p1\n"A\nvan",{EX}p9\n'},
        r"train.csv:4: label '.*p9' is not in the vocabulary",
    ),
    "no column of texts": (
        {"train.csv": f"title,subject_uris\nA,{EX}p1\n"},
        r"train.csv: no column text; it",
    ),
    "too many cells": ({"train.csv": f"text,subject_uris\nA, b,{EX}p1\n"}, r"train.csv:2: expected 2 cells, got 3"),
    "subjects as text": (
        {"train.jsonl": dump(text="a", subjects=[{"uri": "b"}]) + dump(text="a", subjects=["boats"])},
        r"train.jsonl:2: a subject must be an object with uri or label, got 'boats'",
    ),
    "subjects as an object": (
        {"train.jsonl": dump(text="a", subjects=[]) + dump(text="a", subjects={})},
        r"train.jsonl:2: subjects must be a list of objects with uri or label, got \{\}",
    ),
    "a document without text": (
        {"train.jsonl": dump(text="a", subjects=[]) + dump(metadata={"title": "b"}, subjects=[])},
        r"train.jsonl:2: text must be a string, got None\. Copy texts in `metadata`",
    ),
    "an empty uri": (
        {"train.jsonl": dump(text="a", subjects=[{"uri": " "}])},
        r"train.jsonl:1: a subject must be an object with uri or label, got \{'uri': ' '\}",
    ),
    "a key without a text": (
        {"train/1.txt": "a", "train/1.key": "boats", "train/2.key": "cars"},
        r"train/2.key exists, but .*train/2.txt is missing",
    ),
    "a key of two columns": (
        {"train/1.txt": "a", "train/1.key": "boats\nboats\tcars\n"},
        r"train/1.key:2: expected one label, got 'boats\\tcars'",
    ),
    "subjects of another form": (
        {"train/1.txt": "a", "train/1.tsv": f"<{EX}p1>\tboats\nboats\t<{EX}p1>\n"},
        r"train/1.tsv:2: expected `<uri> TAB label`",
    ),
    "a full text that is not UTF-8": (
        {"train/1.txt": b"a\n\xff", "train/1.key": "boats"},
        r"train/1.txt:2: not UTF-8. Convert the file, or pass errors='replace'",
    ),
    "a NUL in a full text": ({"train/1.txt": b"a\0", "train/1.key": "boats"}, r"train/1.txt: .* contains a NUL"),
    "a document that is no JSON": (
        {"train/1.txt": "a", "train/1.key": "boats", "train/2.json": "{"},
        r"train/2.json: not valid JSON",
    ),
    "only a test split": ({"test.txt": "__label__a b\n"}, r"has the splits test, but train is missing"),
    "two files of a split": (
        {"train.txt": "__label__a b\n", "train.tsv": FINE},
        r"train.tsv and .*train.txt are both the split train",
    ),
    "splits of two forms": (
        {"train.txt": "__label__a b\n", "test.txt": "plain\n"},
        r"test.txt must have the format of the split train",
    ),
    "two vocabularies": (
        annif(FINE, **{"labels.ttl": THESAURUS}),
        r"labels.tsv and .*labels.ttl are both vocab",
    ),
    "a label without a name": ({"train.txt": "__label__a b\n__label__ c\n"}, r"train.txt:2: a label without a name"),
    "unknown label of fastText": (
        {"labels.txt": "boats\n", "train.txt": "__label__boats b\n__label__cats c\n"},
        r"train.txt:2: label 'cats' is not in the vocabulary",
    ),
    "no labels": (
        {"train_raw_texts.txt": "a\n"},
        r"train_raw_texts.txt exists, but .*train_labels.txt is missing",
    ),
    "no texts": (
        {"train_labels.txt": "a\n"},
        r"train_labels.txt exists, but train_raw_texts.txt or train_texts.txt is missing",
    ),
    "more texts than labels": (
        {"train_texts.txt": "a\nb\nc\n", "train_labels.txt": "x\ny\n"},
        r"train_texts.txt:3: .*train_labels.txt has only 2 lines, but both files",
    ),
    "more labels than texts": (
        {"train_texts.txt": "a\n", "train_labels.txt": "x\ny\n"},
        r"train_labels.txt:2: .*train_texts.txt has only 1 lines",
    ),
    "numbers without texts": (
        {"train_texts.txt": "a\nb\n", "train_labels.txt": "\n3 7\n"},
        r"train_labels.txt:2: label '3' is a number, and its text is not known",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_an_error_with_file_and_line(case, tmp_path):
    files, message = BAD[case]
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path, carve_missing=False)


def test_bytes_that_are_not_utf8_are_replaced_when_asked(tmp_path):
    write(tmp_path, {"train/1.txt": b"a \xff", "train/1.key": "boats"})
    assert load_xmc(tmp_path, errors="replace", carve_missing=False).train["text"][:] == ["a \ufffd"]


def test_documents_without_subjects_are_kept_and_counted(tmp_path):
    write(tmp_path, {"1.txt": "a", "1.key": "boats", "2.txt": "b"})
    data = load_xmc(tmp_path, carve_missing=False)
    assert data.train["label_ids"][:] == [[0], []]
    assert data.load_report["documents without a .tsv or .key file"] == 1
