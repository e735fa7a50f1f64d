"""Build a data set of human genes and their terms of the Gene Ontology, from SQLite files of Bioconductor.

    apt-get download r-bioc-org.hs.eg.db r-bioc-go.db
    for package in r-bioc-*.deb; do dpkg-deb -x $package bioc; done
    library=bioc/usr/lib/R/site-library
    python recipes/data/build_go.py --genes $library/org.Hs.eg.db/extdata/org.Hs.eg.sqlite \
        --terms $library/GO.db/extdata/GO.sqlite --output_dir go

A query is a gene: its name, its symbol and its other symbols. Its labels are the terms that annotate it directly, of
all three ontologies and with any evidence but "no data". The text of a label is the term, its synonyms and its
definition. The split is that of ``wordnet-hypernyms``: the hash of the gene's id.
"""

import argparse
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from build_wordnet_hypernyms import is_test, write_data_set

from hf_xmc.cli import HelpFormatter

GENES = """
    SELECT gene_id, gene_name, symbol, alias_symbol FROM genes JOIN gene_info USING (_id)
    LEFT JOIN alias USING (_id) ORDER BY CAST(gene_id AS INTEGER), alias_symbol"""
ANNOTATIONS = " UNION ".join(  # UNION drops duplicates: a gene can have a term by several kinds of evidence
    f"SELECT gene_id, go_id FROM genes JOIN {table} USING (_id) WHERE evidence != 'ND'"
    for table in ("go_bp", "go_cc", "go_mf")
)
TERMS = """
    SELECT go_id, term, definition, synonym FROM go_term
    LEFT JOIN (SELECT * FROM go_synonym WHERE NOT like_go_id) USING (_id) ORDER BY go_id, synonym"""


def rows_of(path: Path, query: str) -> Iterator[tuple]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        yield from database.execute(query)


def read_genes(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, set[str]]]:
    """Return the name and the symbols of each gene by its id, and its terms."""
    symbols: dict[tuple[str, str], dict[str, None]] = {}
    for gene_id, name, symbol, alias in rows_of(path, GENES):
        symbols.setdefault((gene_id, name), {symbol: None})[alias or symbol] = None
    terms: dict[str, set[str]] = {gene_id: set() for gene_id, _ in symbols}
    for gene_id, term_id in rows_of(path, ANNOTATIONS):
        terms[gene_id].add(term_id)
    return {gene_id: (name, ", ".join(found)) for (gene_id, name), found in symbols.items()}, terms


def read_terms(path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of each current term by its id, the preferred one first, and its definition."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for term_id, term, definition, synonym in rows_of(path, TERMS):
        names.setdefault((term_id, definition or ""), {term: None})[synonym or term] = None
    return {term_id: (", ".join(found), definition) for (term_id, definition), found in names.items()}


def build(genes: Path, terms: Path, output_dir: Path) -> None:
    texts, positives = read_genes(genes)
    names = read_terms(terms)
    trained = set().union(*(found for gene_id, found in positives.items() if not is_test(gene_id)))
    labels = {uid: text for uid, text in names.items() if uid in trained}
    write_data_set(output_dir, labels, texts, positives, is_test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--genes", type=Path, required=True, help="the genes, org.Hs.eg.sqlite")
    parser.add_argument("--terms", type=Path, required=True, help="the terms, GO.sqlite")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.genes, arguments.terms, arguments.output_dir)
