"""Thesauri in SKOS, as Turtle, RDF/XML or N-Triples: labels with their texts, and the broader concepts of each.

Only the file itself is read. Imports, external entities and addresses in it are not followed.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat
from xml.sax import SAXException, SAXParseException

import pyarrow as pa

from hf_xmc.data.readers.npz import MAX_RATIO

SYNTAXES = {".ttl": "turtle", ".turtle": "turtle", ".rdf": "xml", ".xml": "xml", ".owl": "xml", ".nt": "nt"}
SKOS = "http://www.w3.org/2004/02/skos/core#"
SKOS_XL = "http://www.w3.org/2008/05/skos-xl#"
RDF_TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
DEPRECATED = "http://www.w3.org/2002/07/owl#deprecated"
PREFERRED, ALTERNATIVE, BROADER, NARROWER = (
    f"{SKOS}{name}" for name in ("prefLabel", "altLabel", "broader", "narrower")
)
PREFERRED_XL, ALTERNATIVE_XL, LITERAL_XL = (f"{SKOS_XL}{name}" for name in ("prefLabel", "altLabel", "literalForm"))
KEPT = {RDF_TYPE, DEPRECATED, PREFERRED, ALTERNATIVE, BROADER, NARROWER, PREFERRED_XL, ALTERNATIVE_XL, LITERAL_XL}


class Concept(NamedTuple):
    """A concept of a thesaurus.

    Attributes:
        preferred, alternative: Pairs of language and text, in the order of the file. A missing language is the empty
            string.
        broader: URIs of the directly broader concepts.
    """

    preferred: list[tuple[str, str]]
    alternative: list[tuple[str, str]]
    broader: list[str]


def is_skos(path: Path) -> bool:
    """Return whether a file name is that of Turtle, RDF/XML or N-Triples, gzipped or not."""
    return _syntax_of(path) is not None


def read_skos_labels(path: Path, load_report: Counter[str], language: str = "en") -> pa.Table:
    """Return the texts of concepts with columns ``uid`` and ``text``: the preferred label first, then alternative ones.

    Texts are in ``language``. If a concept has no preferred label in it, its labels come from a variant of the language
    such as ``en-GB``, else from labels without a language, else from another language. ``load_report`` counts such
    concepts, and the concepts that are left out: deprecated ones, and those without a preferred label.

    Raises:
        ValueError: if the file cannot be read, has no concept, or has no label in ``language`` or without a language.
        ModuleNotFoundError: if rdflib is not installed.
    """
    concepts = read_skos(path, load_report)
    languages = sorted({tag for concept in concepts.values() for tag, _ in concept.preferred})
    if not any(suits_language(tag, language) or not tag for tag in languages):
        raise ValueError(
            f"{path}: `language` must be one of {', '.join(languages)}, the languages of its preferred labels, got "
            f"{language!r}."
        )
    uids: list[str] = []
    texts: list[str] = []
    for uid, concept in concepts.items():
        tag = min((tag for tag, _ in concept.preferred), key=lambda tag: language_distance(tag, language))
        if not suits_language(tag, language):
            load_report[f"{path.name}: concepts with labels {f'in {tag}' if tag else 'without a language'}"] += 1
        names = [text for other, text in (*concept.preferred, *concept.alternative) if other == tag]
        distinct = dict.fromkeys(name for name in names if name)
        uids += [uid] * len(distinct)
        texts += distinct
    return pa.table({"uid": pa.array(uids, pa.string()), "text": pa.array(texts, pa.string())})


def read_skos_parents(path: Path, load_report: Counter[str]) -> dict[str, list[str]]:
    """Return the URIs of the broader concepts of each concept, from ``skos:broader`` and ``skos:narrower``.

    Raises:
        ValueError: if the file cannot be read or holds no concept.
        ModuleNotFoundError: if rdflib is not installed.
    """
    return {uid: concept.broader for uid, concept in read_skos(path, load_report).items()}


def read_skos(path: Path, load_report: Counter[str]) -> dict[str, Concept]:
    """Return each concept of a thesaurus by its URI, in the order of the file.

    Deprecated concepts, and concepts without a preferred label, are left out and counted in ``load_report``.

    Raises:
        ValueError: if the file cannot be read or holds no concept.
        ModuleNotFoundError: if rdflib is not installed.
    """
    found = _statements(path)
    from rdflib import URIRef

    def objects(subject: Any, predicate: str) -> Iterable[Any]:
        return found[predicate].get(subject, ())

    def labels(subject: Any, plain: str, extended: str) -> list[tuple[str, str]]:
        texts = [*objects(subject, plain)]
        texts += [form for label in objects(subject, extended) for form in objects(label, LITERAL_XL)]
        return [((getattr(text, "language", None) or "").lower(), " ".join(str(text).split())) for text in texts]

    kind = URIRef(f"{SKOS}Concept")
    everything = [uri for uri, kinds in found[RDF_TYPE].items() if kind in kinds and isinstance(uri, URIRef)]
    if not everything:
        raise ValueError(f"{path}: the file has no skos:Concept. Is it a thesaurus in SKOS?")
    deprecated = {uri for uri in everything if any(str(flag) in ("true", "1") for flag in objects(uri, DEPRECATED))}
    above: dict[Any, dict[str, None]] = {uri: dict.fromkeys(map(str, objects(uri, BROADER))) for uri in everything}
    for parent, children in found[NARROWER].items():
        for child in children:
            above.setdefault(child, {})[str(parent)] = None
    gone = {str(uri) for uri in deprecated}
    concepts: dict[str, Concept] = {}
    for uri in everything:
        if uri in deprecated:
            continue
        preferred = [label for label in labels(uri, PREFERRED, PREFERRED_XL) if label[1]]
        if not preferred:
            load_report[f"{path.name}: concepts without a preferred label, left out"] += 1
            continue
        broader = [parent for parent in above[uri] if parent not in gone]
        concepts[str(uri)] = Concept(preferred, labels(uri, ALTERNATIVE, ALTERNATIVE_XL), broader)
    if deprecated:
        load_report[f"{path.name}: deprecated concepts, left out"] += len(deprecated)
    if not concepts:
        raise ValueError(f"{path}: every concept is deprecated or has no preferred label.")
    return concepts


def _statements(path: Path) -> dict[str, dict[Any, dict[Any, None]]]:
    """Return the objects of the relevant statements of a file by predicate and subject, in the order of the file.

    Notes and links, which are most of a thesaurus, are not stored, and nothing is indexed.
    """
    try:
        from rdflib import Graph
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} is SKOS, which needs rdflib: pip install 'hf_xmc[skos]'.") from error
    from rdflib.exceptions import ParserError
    from rdflib.plugins.parsers.notation3 import BadSyntax

    found: dict[str, dict[Any, dict[Any, None]]] = {predicate: {} for predicate in KEPT}

    class Collector(Graph):
        def add(self, triple: Any) -> Any:
            subject, predicate, value = triple
            if (objects := found.get(str(predicate))) is not None:
                objects.setdefault(subject, {})[value] = None
            return self

    syntax, content = _syntax_of(path), _content(path)
    if syntax == "xml":
        _check_entities(path, content)
    else:
        _check_text(path, content)
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        Collector().parse(BytesIO(content), format=syntax)
    except BadSyntax as error:
        raise ValueError(f"{path}:{error.lines + 1}: not valid Turtle ({error._why}).") from None
    except SAXParseException as error:
        raise ValueError(f"{path}:{error.getLineNumber()}: not valid XML ({error.getMessage()}).") from None
    except (ParserError, SAXException, RecursionError, ValueError, AssertionError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not readable as {syntax} ({str(error)[:200]}).") from None
    return found


def _syntax_of(path: Path) -> str | None:
    return SYNTAXES.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _content(path: Path) -> bytes:
    """Return the bytes of a file, decompressed.

    Raises:
        ValueError: if a gzip file is damaged, or larger than ``MAX_RATIO`` allows.
    """
    limit = MAX_RATIO * path.stat().st_size + 2**20
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content: bytes = file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Download it again.") from None
    if len(content) > limit:
        raise ValueError(
            f"{path}: the file exceeds {MAX_RATIO} times its compressed size, so it is damaged or hostile."
        )
    return content


def _check_text(path: Path, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8, which this format requires. Convert the file.") from None


def _check_entities(path: Path, content: bytes) -> None:
    """Raise if the head of an XML file declares entities or a document type that the parser must not expand.

    The parser would silently drop text in other files from labels, and nested entities can grow without limit.
    """
    parser = expat.ParserCreate()

    def refuse(name: str, system: str | None, value: str | None = None) -> None:
        where = f"{path}:{parser.CurrentLineNumber}: {name}"
        if system is not None:
            raise ValueError(
                f"{where} is in another file, {system[:80]!r}, which is not read. Copy its text into this file."
            )
        if value and "&" in value:
            raise ValueError(f"{where} must not refer to other entities, got {value[:80]!r}. Write out its text.")

    def stop(*_: Any) -> None:
        raise _RootReached

    parser.EntityDeclHandler = lambda name, _1, value, _2, system, _3, _4: refuse(f"the entity {name}", system, value)
    parser.StartDoctypeDeclHandler = lambda name, system, _1, _2: refuse(f"the document type {name}", system)
    parser.StartElementHandler = stop
    try:
        parser.Parse(content, True)
    except _RootReached:
        return
    except expat.ExpatError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid XML ({expat.ErrorString(error.code)}).") from None


class _RootReached(Exception):
    """Raised at the first element of an XML file, because all declarations come before it."""


def suits_language(tag: str, language: str) -> bool:
    """Return whether a language tag is the language, or a variant of it such as en-GB of en."""
    return tag == language.lower() or tag.startswith(f"{language.lower()}-")


def language_distance(tag: str, language: str) -> tuple[int, str]:
    """Return a sort key of language tags: the language, its variants, no language, then other languages by name."""
    kinds = (tag == language.lower(), suits_language(tag, language), not tag, True)
    return kinds.index(True), tag
