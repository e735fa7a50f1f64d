"""Vocabulary files in every form, and those that are refused."""

import gzip

import pytest

from hf_xmc.data.named import NamedRows, assemble_named
from hf_xmc.data.vocabulary import Vocabulary

EX = "http://example.org/"
SKOS = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<http://example.org/1> a skos:Concept ; skos:prefLabel "boat"@en , "vene"@fi ; skos:altLabel "vessel"@en .
<http://example.org/2> a skos:Concept ; skos:prefLabel "car"@en , "auto"@fi .
"""
ANNIF_CSV = "uri,label_en,label_fi,notation\nhttp://example.org/1,boat,vene,\n<http://example.org/2>,car,auto,42.1\n"
FILES = {  # name: content, uids, texts, load_report
    "names.txt": (b"boat\r\ncar\n\n", ["boat", "car"], ["boat", "car"], {}),
    "annif.tsv": (
        b"<http://example.org/1>\tboat\n<http://example.org/2>\tcar\t42.1\n",
        [f"{EX}1", f"{EX}2"],
        ["boat", "car"],
        {"annif.tsv: notations, not read": 1},
    ),
    "bom.tsv": (
        b"\xef\xbb\xbfuid\ttext\r\nn1\tboat\r\nn1\tvessel\r\n\nn2\tcar\r\n",
        ["n1", "n1", "n2"],
        ["boat", "vessel", "car"],
        {"bom.tsv: byte order mark removed": 1, "bom.tsv: names of columns in the first line": 1},
    ),
    "annif.csv": (
        ANNIF_CSV.encode(),
        [f"{EX}1", f"{EX}2"],
        ["boat", "car"],
        {"annif.csv: notations, not read": 1},
    ),
    "plain.csv": (b'uid,text\nn1,"boat, small"\nn2,car\n', ["n1", "n2"], ["boat, small", "car"], {}),
    "excel.csv": (
        b"\xef\xbb\xbfuid;text\r\nn1;boat, small\r\nn2;car\r\n",
        ["n1", "n2"],
        ["boat, small", "car"],
        {"excel.csv: byte order mark removed": 1},
    ),
    "texts.csv": (b"text\nboat\ncar\n", ["boat", "car"], ["boat", "car"], {}),
    "rows.jsonl": (b'{"uid": "n1", "text": "boat"}\n{"uid": "n2", "text": "car"}\n', ["n1", "n2"], ["boat", "car"], {}),
    "rows.TSV.gz": (gzip.compress(b"n1\tboat\nn2\tcar\n"), ["n1", "n2"], ["boat", "car"], {}),
    "boats.ttl": (SKOS.encode(), [f"{EX}1", f"{EX}1", f"{EX}2"], ["boat", "vessel", "car"], {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_uids_and_texts(name, tmp_path):
    content, uids, texts, report = FILES[name]
    (tmp_path / name).write_bytes(content)
    vocabulary = Vocabulary.of(tmp_path / name)
    assert vocabulary.labels["uid"][:] == uids
    assert vocabulary.labels["text"][:] == texts
    assert vocabulary.load_report == report


@pytest.mark.parametrize(("name", "content"), [("x.csv", ANNIF_CSV), ("x.ttl", SKOS)])
def test_texts_are_in_the_language_that_is_asked_for(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert Vocabulary.read(tmp_path / name, language="fi").labels["text"][:] == ["vene", "auto"]
    with pytest.raises(ValueError, match=f"{name}: `language` must be one of en, fi, .*got 'sv'"):
        Vocabulary.read(tmp_path / name, language="sv")


def test_a_label_without_a_text_in_the_language_has_one_in_another(tmp_path):
    rows = "uri,label_fi,label_en-GB,label_de\nn1,vene,boat,Boot\nn2,auto,,Auto\nn3,,,\nn4,puu,,\n"
    (tmp_path / "x.csv").write_text(rows)
    vocabulary = Vocabulary.read(tmp_path / "x.csv")
    assert vocabulary.labels["text"][:] == ["boat", "Auto", "puu"]
    expected = {
        "x.csv: labels in de, because en is missing": 1,
        "x.csv: labels in fi, because en is missing": 1,
        "x.csv: labels without a text, left out": 1,
    }
    assert vocabulary.load_report == expected
    parts = assemble_named({"train": NamedRows(["a"], [["puu"]], "row {}".format)}, vocabulary)
    assert parts.load_report == expected


BAD = {
    "no tab": ("x.tsv", "n1\tboat\nn2 car\n", r"x.tsv:2: expected `uid TAB text`, .* got 'n2 car'"),
    "no text": ("x.tsv", "n1\tboat\nn2\t\n", r"x.tsv:2: expected `uid TAB text`"),
    "no uid": ("x.tsv", "<>\tboat\n", r"x.tsv:1: expected `uid TAB text`"),
    "four fields": ("x.tsv", "n1\tboat\ta\tb\n", r"x.tsv:1: expected `uid TAB text`"),
    "an empty uid": ("x.csv", "uid,text\n,boat\n", r"x.csv:2: uid is empty"),
    "no column of texts": ("x.csv", "uid,name\nn1,boat\n", r"x.csv: there is no column text or label_en"),
    "no column of uids": ("x.csv", "label_en\nboat\n", r"x.csv: there is no column uid or uri, only label_en"),
    "too many cells": ("x.csv", "uid,text\nn1,boat, small\n", r"x.csv:2: expected 2 cells, got 3"),
    "too few cells": ("x.csv", "uid,text\nn1\n", r"x.csv:2: expected 2 cells, got 1"),
    "an open quote": ("x.csv", 'uid,text\nn1,"boat\n', r"x.csv:3: not valid CSV|x.csv:2: not valid CSV"),
    "two columns of one name": ("x.csv", "uid,text,text\nn1,a,b\n", r"x.csv:1: columns must have different names"),
    "empty": ("x.csv", "", r"x.csv must have the names of the columns in its first line"),
    "another kind": ("x.docx", "", r"`vocabulary` must be a file in one of these formats: .txt, .tsv, .csv, .* got"),
    "gzipped parquet": ("x.parquet.gz", "", r"`vocabulary` must be a file in one of these formats"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_vocabulary_that_cannot_be_read_is_an_error_with_file_and_line(case, tmp_path):
    name, content, message = BAD[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Vocabulary.of(tmp_path / name)
