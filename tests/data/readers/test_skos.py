"""Thesauri in SKOS: texts in a language, broader concepts, and files that are refused."""

import gzip
import http.server
import sys
import threading
from collections import Counter

import pytest

from hf_xmc import Hierarchy
from hf_xmc.data.readers.skos import read_skos_labels, read_skos_parents

TURTLE = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix : <http://example.org/> .

:scheme a skos:ConceptScheme ; skos:prefLabel "Boats"@en ; owl:imports <http://127.0.0.1:9/more.ttl> .
:boat a skos:Concept ;
    skos:prefLabel "boats"@en , "veneet"@fi ;
    skos:altLabel "watercraft"@en , "ships,\\n small"@en , "paatit"@fi ;
    skos:hiddenLabel "baots"@en ;
    skos:narrower :sloop ;
    skos:notation "42.1" .
:sloop a skos:Concept ; skos:prefLabel "sloops"@en-GB , "sluupit"@fi .
:punt a skos:Concept ; skos:prefLabel "punts" ; skos:broader :boat , :flat , :old .
:flat a skos:Concept ; skos:prefLabel "lautat"@fi ; skos:altLabel "flats"@en .
:old a skos:Concept ; skos:prefLabel "arks"@en ; owl:deprecated true .
:nameless a skos:Concept ; skos:altLabel "things"@en .
"""
RDF_XML = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE rdf:RDF [<!ENTITY ex "http://example.org/">]>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:skos="http://www.w3.org/2004/02/skos/core#"
         xmlns:owl="http://www.w3.org/2002/07/owl#">
  <skos:Concept rdf:about="&ex;boat">
    <skos:prefLabel xml:lang="en">boats</skos:prefLabel><skos:prefLabel xml:lang="fi">veneet</skos:prefLabel>
    <skos:altLabel xml:lang="en">watercraft</skos:altLabel><skos:altLabel xml:lang="en">ships, small</skos:altLabel>
    <skos:altLabel xml:lang="fi">paatit</skos:altLabel>
    <skos:narrower rdf:resource="&ex;sloop"/>
  </skos:Concept>
  <skos:Concept rdf:about="&ex;sloop">
    <skos:prefLabel xml:lang="en-GB">sloops</skos:prefLabel><skos:prefLabel xml:lang="fi">sluupit</skos:prefLabel>
  </skos:Concept>
  <skos:Concept rdf:about="&ex;punt">
    <skos:prefLabel>punts</skos:prefLabel>
    <skos:broader rdf:resource="&ex;boat"/><skos:broader rdf:resource="&ex;flat"/>
    <skos:broader rdf:resource="&ex;old"/>
  </skos:Concept>
  <skos:Concept rdf:about="&ex;flat">
    <skos:prefLabel xml:lang="fi">lautat</skos:prefLabel><skos:altLabel xml:lang="en">flats</skos:altLabel>
  </skos:Concept>
  <skos:Concept rdf:about="&ex;old">
    <skos:prefLabel xml:lang="en">arks</skos:prefLabel>
    <owl:deprecated rdf:datatype="http://www.w3.org/2001/XMLSchema#boolean">true</owl:deprecated>
  </skos:Concept>
  <skos:Concept rdf:about="&ex;nameless"><skos:altLabel xml:lang="en">things</skos:altLabel></skos:Concept>
</rdf:RDF>
"""
CONCEPT = "http://www.w3.org/2004/02/skos/core#"
TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
N_TRIPLES = f"""<http://example.org/boat> <{TYPE}> <{CONCEPT}Concept> .
<http://example.org/boat> <{CONCEPT}prefLabel> "boats"@en .
<http://example.org/boat> <{CONCEPT}prefLabel> "veneet"@fi .
<http://example.org/boat> <{CONCEPT}altLabel> "watercraft"@en .
<http://example.org/boat> <{CONCEPT}altLabel> "ships,\\n small"@en .
<http://example.org/boat> <{CONCEPT}altLabel> "paatit"@fi .
<http://example.org/sloop> <{TYPE}> <{CONCEPT}Concept> .
<http://example.org/sloop> <{CONCEPT}prefLabel> "sloops"@en-GB .
<http://example.org/sloop> <{CONCEPT}prefLabel> "sluupit"@fi .
<http://example.org/punt> <{TYPE}> <{CONCEPT}Concept> .
<http://example.org/punt> <{CONCEPT}prefLabel> "punts" .
<http://example.org/punt> <{CONCEPT}broader> <http://example.org/boat> .
<http://example.org/punt> <{CONCEPT}broader> <http://example.org/flat> .
<http://example.org/flat> <{TYPE}> <{CONCEPT}Concept> .
<http://example.org/flat> <{CONCEPT}prefLabel> "lautat"@fi .
<http://example.org/sloop> <{CONCEPT}broader> <http://example.org/boat> .
<http://example.org/old> <{TYPE}> <{CONCEPT}Concept> .
<http://example.org/old> <{CONCEPT}prefLabel> "arks"@en .
<http://example.org/old> <http://www.w3.org/2002/07/owl#deprecated> "true" .
<http://example.org/nameless> <{TYPE}> <{CONCEPT}Concept> .
"""
FILES = {
    "boats.ttl": TURTLE.encode(),
    "boats.rdf": RDF_XML.encode(),
    "boats.nt": N_TRIPLES.encode(),
    "boats.TTL.gz": gzip.compress(b"\xef\xbb\xbf" + TURTLE.encode()),
    "utf16.xml": RDF_XML.replace("utf-8", "utf-16").encode("utf-16"),
}


def texts_of(path, language, report=None):
    table = read_skos_labels(path, Counter() if report is None else report, language)
    texts = {}
    for row in table.to_pylist():
        texts.setdefault(row["uid"].removeprefix("http://example.org/"), []).append(row["text"])
    return texts


@pytest.mark.parametrize("name", FILES)
def test_texts_are_those_of_a_language_the_preferred_first(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    report = Counter()
    assert texts_of(path, "en", report) == {
        "boat": ["boats", "watercraft", "ships, small"],
        "sloop": ["sloops"],
        "punt": ["punts"],
        "flat": ["lautat"],
    }
    assert report == {
        f"{name}: deprecated concepts, left out": 1,
        f"{name}: concepts without a preferred label, left out": 1,
        f"{name}: concepts with labels without a language": 1,
        f"{name}: concepts with labels in fi": 1,
    }
    assert texts_of(path, "FI") == {
        "boat": ["veneet", "paatit"],
        "sloop": ["sluupit"],
        "punt": ["punts"],
        "flat": ["lautat"],
    }


@pytest.mark.parametrize("name", FILES)
def test_broader_and_narrower_make_a_hierarchy(name, tmp_path, caplog):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    ex = "http://example.org/"
    parents = {f"{ex}boat": [], f"{ex}sloop": [f"{ex}boat"], f"{ex}punt": [f"{ex}boat", f"{ex}flat"], f"{ex}flat": []}
    assert read_skos_parents(path, Counter()) == parents
    caplog.set_level("INFO", "hf_xmc")
    assert Hierarchy.read(path).closure([f"{ex}sloop"]) == [f"{ex}boat", f"{ex}sloop"]
    assert f"{name}: deprecated concepts, left out: 1" in caplog.messages


def test_labels_of_skos_xl_are_read(tmp_path):
    path = tmp_path / "xl.ttl"
    path.write_text(
        """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix xl: <http://www.w3.org/2008/05/skos-xl#> .
<http://example.org/car> a skos:Concept ; xl:prefLabel [ a xl:Label ; xl:literalForm "cars"@en ] ;
    xl:altLabel <http://example.org/auto> .
<http://example.org/auto> xl:literalForm "automobiles"@en .
"""
    )
    assert texts_of(path, "en") == {"car": ["cars", "automobiles"]}


HEAD = '<!DOCTYPE rdf:RDF [<!ENTITY {}>]>\n<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>'
BAD = {
    "wrong language": (
        "x.ttl",
        TURTLE.replace('"punts"', '"punts"@de').encode(),
        "`language` must be one of de, en, .*",
    ),
    "not a thesaurus": ("x.ttl", b"<http://a.org/b> <http://a.org/c> 'd' .", "x.ttl: the file has no skos:Concept"),
    "bad Turtle": ("x.ttl", TURTLE.replace(":punt a", ":punt").encode(), r"x.ttl:13: not valid Turtle"),
    "cut Turtle": ("x.ttl", TURTLE[:700].encode(), r"x.ttl: not readable as turtle"),
    "deep Turtle": ("x.ttl", b"<http://a> <http://b> " + b"[ <http://c> " * 100_000, "not readable as turtle"),
    "not UTF-8": ("x.ttl", TURTLE.replace("veneet", "v\xe4").encode("latin-1"), r"x.ttl:7: not UTF-8"),
    "bad N-Triples": ("x.nt", b"<http://a> <http://b> c .\n", "x.nt: not readable as nt"),
    "bad XML": ("x.rdf", RDF_XML.replace("</rdf:RDF>", "").encode(), r"x.rdf:\d+: not valid XML"),
    "no XML": ("x.rdf", b"", r"x.rdf:1: not valid XML"),
    "entity in a file": (
        "x.rdf",
        HEAD.format('a SYSTEM "file:///etc/passwd"').encode(),
        "the entity a is in another file",
    ),
    "entity of a parameter": ("x.rdf", HEAD.format('% a SYSTEM "a.dtd"').encode(), "the entity a is in another file"),
    "document type": (
        "x.rdf",
        b'<!DOCTYPE a SYSTEM "http://a/b.dtd">\n<a/>',
        "x.rdf:1: the document type a is in another file",
    ),
    "damaged gzip": ("x.ttl.gz", gzip.compress(TURTLE.encode())[:-9], "x.ttl.gz: damaged or truncated"),
    "swelling gzip": ("x.ttl.gz", gzip.compress(b"\n" * 2**24), "x.ttl.gz: the file exceeds 200 times"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_read_is_an_error(case, tmp_path):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_skos_labels(tmp_path / name, Counter(), "it" if case == "wrong language" else "en")


def test_an_entity_that_swells_is_refused(tmp_path):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    bomb = RDF_XML.replace("]>", f'<!ENTITY e0 "{"boat" * 10}">{entities}]>').replace(">boats<", ">&e9;<")
    (tmp_path / "bomb.rdf").write_text(bomb)
    with pytest.raises(ValueError, match=r"bomb.rdf:2: the entity e1 must not refer to other entities"):
        read_skos_labels(tmp_path / "bomb.rdf", Counter())


def test_nothing_is_fetched_from_the_network(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "boats.ttl").write_text(TURTLE.replace("http://127.0.0.1:9", here).replace(":scheme a", "<> a"))
        assert len(texts_of(tmp_path / "boats.ttl", "en")) == 4
        external = RDF_XML.replace('"http://example.org/"', f'SYSTEM "{here}/entities"')
        (tmp_path / "boats.rdf").write_text(external)
        with pytest.raises(ValueError, match="the entity ex is in another file"):
            read_skos_labels(tmp_path / "boats.rdf", Counter())
        server.shutdown()
    assert asked == []


def test_without_rdflib_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "boats.ttl").write_text(TURTLE)
    monkeypatch.setitem(sys.modules, "rdflib", None)
    with pytest.raises(ModuleNotFoundError, match=r"boats.ttl is SKOS, .*: pip install 'hf_xmc\[skos\]'"):
        Hierarchy.read(tmp_path / "boats.ttl")
