"""The words of an example are as dark as they speak for its first label."""

from hf_xmc.experiment.report_examples import Piece, heat_map
from hf_xmc.model.word_weights import WordWeight


def test_heat_is_shared_by_the_words_of_a_pair_and_never_negative():
    words = [WordWeight("red", 2, 5, 1.0), WordWeight("red boat", 2, 10, 2.0), WordWeight("a", 0, 1, -3.0)]
    assert heat_map("a red boat", words) == [
        Piece("a", 0.0),
        Piece(" ", 0.0),
        Piece("red", 1.0),
        Piece(" ", 0.0),
        Piece("boat", 0.5),
    ]
    assert heat_map("a, b", [WordWeight(",", 1, 2, 5.0), WordWeight("b", 3, 4, 1.0)])[1:] == [
        Piece(",", 0.0),
        Piece(" ", 0.0),
        Piece("b", 1.0),
    ]
    assert heat_map("", []) == []
    assert "".join(piece.text for piece in heat_map("word " * 200, []))[-5:] == "d ..."
