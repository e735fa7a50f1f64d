"""The builders of data sets read their sources as documented, and give the same bytes each time."""

import gzip
import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc import load_xmc

SET_MM = """
$( A database for tests. $)
$c ( ) -> |- wff $.
$v ph ps $.
wph $f wff ph $.  wps $f wff ps $.
$( Extend wffs.  (Contributed by NM, 1-Jan-1990.) $)
wi $a wff ( ph -> ps ) $.
${
  min $e |- ph $.
  maj $e |- ( ph -> ps ) $.
  $( Rule of _Modus Ponens_, see ~ wi and ` _V ` .  (Contributed by NM (Norman),
     30-Sep-1992.)  (New usage is discouraged.) $)
  ax-mp $a |- ps $.
$}
ax-1 $a |- ( ph -> ( ps -> ph ) ) $.
${
  $d ph ps $.
  a1i.1 $e |- ph $.  $( A comment between. $)
  $( Inference from ~ ax-1 .  <HTML>See `` twice.</HTML>
     (Proof shortened by MC, 2-Feb-2002.) $)
  a1i $p |- ( ps -> ph ) $= ( wi ax-1 ax-mp ) ABADCABEF $.
$}
$( A proof that is not compressed. $)
long $p |- ( ph -> ( ps -> ph ) ) $= wph $( inside $) wps ax-1 $.
$( Nothing is used. $)
none $p |- ph $= ( wi ) A $.
$( Not a theorem. $)
syntax $p wff ( ph -> ps ) $= ( wi ) ABC $.
"""


def rows(path):
    with gzip.open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def metamath(script):
    return script("build_metamath")


def test_theorems_are_read_without_syntax_hypotheses_and_credits(metamath, tmp_path):
    (tmp_path / "set.mm").write_text(SET_MM)
    assert metamath.read_statements(tmp_path / "set.mm") == [
        ("ax-mp", "Rule of Modus Ponens, see and _V .", "ph & ( ph -> ps ) => ps", []),
        ("ax-1", "", "( ph -> ( ps -> ph ) )", []),
        ("a1i", "Inference from . See ` twice.", "ph => ( ps -> ph )", ["ax-1", "ax-mp"]),
        ("long", "A proof that is not compressed.", "( ph -> ( ps -> ph ) )", ["ax-1"]),
        ("none", "Nothing is used.", "ph", []),
    ]


def test_database_without_an_end_is_refused(metamath, tmp_path):
    (tmp_path / "set.mm").write_text(SET_MM.replace("ABC $.", "ABC"))
    with pytest.raises(ValueError, match=r"expected \$\. before the end of the file"):
        metamath.read_statements(tmp_path / "set.mm")


def test_last_theorems_are_test_and_use_new_labels(metamath, tmp_path):
    names = [f"t{n:02}" for n in range(41)]
    statements = [metamath.Statement("t00", "the axiom", "x", [])]
    statements += [metamath.Statement(name, "", f"about {name}", [used]) for used, name in pairwise(names)]
    for folder in ("one", "two"):
        metamath.build(statements, tmp_path / folder)
    for name in ("lbl.json.gz", "trn.json.gz", "tst.json.gz", "filter_labels_test.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [row["uid"] for row in rows(tmp_path / "one" / "trn.json.gz")] == names[1:35]
    assert [row["uid"] for row in rows(tmp_path / "one" / "tst.json.gz")] == names[35:]
    data = load_xmc(tmp_path / "one")
    assert data.labels["text"][:2] == ["the axiom: x", "about t01"]
    assert data.label_counts().tolist() == [1] * 34 + [0] * 6
    assert data.filter_pairs["test"].tolist() == [[row, 35 + row] for row in range(5)]  # t40 is used by none


GENES = """
CREATE TABLE genes (_id, gene_id); CREATE TABLE gene_info (_id, gene_name, symbol);
CREATE TABLE alias (_id, alias_symbol); CREATE TABLE go_bp (_id, go_id, evidence);
CREATE TABLE go_cc (_id, go_id, evidence); CREATE TABLE go_mf (_id, go_id, evidence);
INSERT INTO genes VALUES (1, '10'), (2, '9'), (3, '12');
INSERT INTO gene_info VALUES (1, 'a kinase', 'KIN'), (2, 'a transporter', 'TRA'), (3, 'unknown', 'UNK');
INSERT INTO alias VALUES (1, 'KIN'), (1, 'BIN'), (1, 'AIN'), (2, 'TRA');
INSERT INTO go_bp VALUES (1, 'GO:1', 'IDA'), (1, 'GO:1', 'IEA'), (3, 'GO:2', 'ND');
INSERT INTO go_cc VALUES (2, 'GO:2', 'IEA'), (2, 'GO:9', 'IEA'); INSERT INTO go_mf VALUES (1, 'GO:3', 'TAS');
"""
TERMS = """
CREATE TABLE go_term (_id, go_id, term, definition);
CREATE TABLE go_synonym (_id, synonym, secondary, like_go_id);
INSERT INTO go_term VALUES (1, 'GO:1', 'growth', 'More of it.'), (2, 'GO:2', 'membrane', NULL), (3, 'GO:3', 'heat', '');
INSERT INTO go_synonym VALUES (1, 'increase', NULL, 0), (1, 'GO:7', 'GO:7', 1);
"""


def test_genes_have_the_terms_that_annotate_them(script, tmp_path, monkeypatch):
    build_go = script("build_go")
    for name, text in (("genes", GENES), ("terms", TERMS)):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            database.executescript(text)
    monkeypatch.setattr(build_go, "is_test", lambda gene_id: False)
    build_go.build(tmp_path / "genes", tmp_path / "terms", tmp_path / "out")
    assert rows(tmp_path / "out" / "lbl.json.gz") == [
        {"uid": "GO:1", "title": "growth, increase", "content": "More of it."},
        {"uid": "GO:2", "title": "membrane", "content": ""},
        {"uid": "GO:3", "title": "heat", "content": ""},
    ]
    assert rows(tmp_path / "out" / "trn.json.gz") == [  # "no data" is no annotation, and GO:9 is no current term
        {"uid": "9", "title": "a transporter", "content": "TRA", "target_ind": [1], "target_rel": [1.0]},
        {"uid": "10", "title": "a kinase", "content": "KIN, AIN, BIN", "target_ind": [0, 2], "target_rel": [1.0, 1.0]},
    ]


def test_labels_of_a_head_word_are_the_words_of_its_entry(script, tmp_path):
    build_moby = script("build_moby")
    (tmp_path / "words.txt").write_text("\nfast,quick,fast, swift,quick\nquick,fast\n")
    entries = build_moby.read_entries(tmp_path / "words.txt")
    assert entries == {"fast": ["quick", "swift"], "quick": ["fast"]}
    entries |= {f"word {n}": ["fast", f"other {n}"] for n in range(20)}
    build_moby.build(entries, tmp_path / "out")
    data = load_xmc(tmp_path / "out")
    assert len(data.train) + len(data.test) == 22
    assert data.label_counts().min() == 1  # every label is one of a training query
    fast = data.labels["text"].index("fast")
    pairs = [pair for split in data.filter_pairs.values() for pair in split.tolist()]
    assert fast in [label for _, label in pairs]


def test_pecos_gets_the_features_and_labels_of_training_and_is_measured(script, tmp_path, monkeypatch):
    peers_pecos = script("peers_pecos")
    labels = [f"label {n}" for n in range(10)]
    texts = [f"kind {n % 5} of thing{n % 5} number{n}" for n in range(20)]
    train = [{"text": text, "label_ids": [n % 10]} for n, text in enumerate(texts)]
    for name, part in {"labels": [{"text": text} for text in labels], "train": train, "test": train[:4]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def pecos(command, check):
        assert command[0] == "peers/python"
        folder = Path(command[-1])
        known, relevance, asked = (sp.load_npz(folder / f"{part}.npz") for part in ("known", "relevance", "asked"))
        assert known.shape == (20, asked.shape[1])
        assert [row.nonzero()[1].tolist() for row in relevance] == [[n % 10] for n in range(20)]
        found = np.tile(np.r_[0, 1, np.full(118, -1)], (4, 1))  # right for two of four
        found[1, :2] = 1, 0
        np.save(folder / "found.npy", found)
        (folder / "seconds.json").write_text('{"training": 1.5}')

    monkeypatch.setattr(subprocess, "run", pecos)
    flags = ["--data", str(tmp_path), "--peers_python", "peers/python", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["peers_pecos.py", *flags])
    peers_pecos.main()
    measured = json.loads((tmp_path / "out.json").read_text())
    assert (measured["P@1"], measured["R@10"], measured["seconds"]) == (50.0, 50.0, {"training": 1.5})


MANUAL = {
    "man2/open.2": """.TH open 2
.SH NAME
open, creat \\- open a file
.SH SYNOPSIS
int open();
.SH DESCRIPTION
\\fBopen\\fP() opens a well-known file.
Use
.BR close (2)
or close it with opendir, as \\fBmalloc\\fP(3) says, or reopen and opendir.h.
.SH SEE ALSO
.BR close (2),
.BR opendir (3x),
.BR malloc (3)
""",
    "man2/creat.2": '.\\" a comment\n.so man2/open.2\n',
    "man2/close.2": """.Dd January 1, 2026
.Dt CLOSE 2
.Os
.Sh NAME
.Nm close
.Nd close a file
.Sh DESCRIPTION
The file that
.Xr creat 2
returned is closed.
.Sh SEE ALSO
.Xr creat 2
""",
    "man3/opendir.3x": """.TH opendir 3x
.SH NAME
opendir \\- open a directory
.SH ERRORS
It may fail.
.SH "SEE ALSO"
open(2), telldir
""",
    "man3/copy.3x": "",
    "man3/telldir.3x": ".TH telldir 3x\n.SH NAME\ntelldir \\- where am I\n.SH DESCRIPTION\nNothing refers on.\n",
    "man3/empty.3": ".TH empty 3\n.SH SEE ALSO\n.BR open (2)\n",
    "man3/README": "This is no page.",
}


@pytest.mark.parametrize("renderer", ["groff", "mandoc"])
def test_manual_pages_refer_to_the_pages_of_see_also(renderer, script, tmp_path, monkeypatch, capsys):
    manpages = script("build_manpages")
    if shutil.which(renderer) is None:
        pytest.skip(f"{renderer} is not installed")
    for name, text in {**MANUAL, "man3/copy.3x": MANUAL["man3/opendir.3x"]}.items():
        path = tmp_path / "man" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with gzip.open(tmp_path / "man" / "man2" / "close.2.gz", "wb") as file:
        file.write((tmp_path / "man" / "man2" / "close.2").read_bytes())
    (tmp_path / "man" / "man2" / "close.2").unlink()
    (tmp_path / "man" / "man3" / "shut.3").symlink_to("../man2/close.2.gz")
    monkeypatch.setattr(manpages, "is_test", lambda uid: uid == "copy(3x)")

    manpages.build([tmp_path / "man"], tmp_path / "built", renderer)

    assert "8 files, 1 of them without" in capsys.readouterr().out
    assert [(row["uid"], row["title"]) for row in rows(tmp_path / "built" / "lbl.json.gz")] == [
        ("close(2)", "close - close a file"),
        ("copy(3x)", "opendir - open a directory"),
        ("open(2)", "open, creat - open a file"),
    ]
    split = {name: rows(tmp_path / "built" / f"{name}.json.gz") for name in ("trn", "tst")}
    assert [tuple(row.values())[:4] for row in split["trn"]] == [
        ("close(2)", "close - close a file", "The file that _ returned is closed.", [2]),
        (
            "open(2)",
            "open, creat - open a file",
            "open() opens a well-known file. Use _ or _ it with _, as _ says, or reopen and opendir.h.",
            [0, 1],
        ),
    ]
    assert [tuple(row.values())[:4] for row in split["tst"]] == [  # telldir(3x) is no label of a training query
        ("copy(3x)", "opendir - _ a directory", "It may fail.", [2]),
    ]
    assert (tmp_path / "built" / "filter_labels_train.txt").read_text() == "0 0\n1 2\n"
    assert (tmp_path / "built" / "filter_labels_test.txt").read_text() == "0 1\n"


def test_reference_means_the_page_of_its_own_library(script):
    manpages = script("build_manpages")
    text = "x(1)\nNAME\n  {} - a page\nSEE ALSO\n  bio(7), err(3), The::Module, file(n) and err\nx\n"
    ids = [("ssl", "3ssl"), ("tcl", "3tcl"), ("bio", "7"), ("bio", "7ssl"), ("err", "1"), ("err", "3")]
    ids += [("file", "1"), ("file", "3tcl"), ("The::Module", "3pm")]
    pages = [manpages.Page(name, section, text.format(f"{name} {section}")) for name, section in ids]
    pages = [page._replace(text=page.text + "HISTORY\n  Old.\nfooter\n") for page in pages]
    manual = manpages.Manual(pages)
    assert manual.labels_of("ssl(3ssl)") == {"bio(7ssl)", "err(3)", "The::Module(3pm)", "file(3tcl)"}
    assert manual.labels_of("tcl(3tcl)") == {"bio(7)", "err(3)", "The::Module(3pm)", "file(3tcl)"}


def test_manual_without_pages_or_renderer_is_refused(script, tmp_path, monkeypatch):
    manpages = script("build_manpages")
    with pytest.raises(ValueError, match=r"expected pages such as .*, found none"):
        manpages.read_pages([tmp_path], ["cat"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="mandoc was not found"):
        manpages.build([tmp_path], tmp_path / "built")
