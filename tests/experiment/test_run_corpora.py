"""Corpora with a thesaurus are data to train on, in one of its languages."""

from hf_xmc.experiment.run import load
from hf_xmc.experiment.settings import from_dict

THESAURUS = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<http://a.org/1> a skos:Concept ; skos:prefLabel "boat"@en , "vene"@fi .
<http://a.org/2> a skos:Concept ; skos:prefLabel "sail"@en , "purje"@fi .
"""


def test_a_folder_of_full_texts_gets_a_test_split_and_labels_in_a_language(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "train").mkdir(parents=True)
    (corpus / "labels.ttl").write_text(THESAURUS)
    for number in range(40):
        (corpus / "train" / f"{number}.txt").write_text(f"teksti {number}")
        (corpus / "train" / f"{number}.key").write_text("vene\n" if number % 2 else "purje\n")
    values = {"data": str(corpus), "model": "static", "output_dir": str(tmp_path / "run"), "language": "fi"}
    data = load(from_dict(values))
    assert data.labels["text"][:] == ["vene", "purje"]
    assert len(data.train) + len(data.test) == 40
    assert len(data.test) > 0
