"""Cosines of tf-idf vectors, worked out by hand."""

import numpy as np
import pytest

from hf_xmc.search.lexical import SharedWords, WordCounts


def test_cosines_worked_out_by_hand():
    known = WordCounts.of(["a red boat", "red boat boat", "old car"])
    assert dict(zip(known.words, known.counts.tolist(), strict=True)) == {"boat": 2, "car": 1, "old": 1, "red": 2}
    common, rare, unknown = 1 + np.log(4 / 3), 1 + np.log(4 / 2), 1 + np.log(4)
    index = SharedWords(["red kayak", "boat boat car"], known)
    first = np.array([common, unknown])
    second = np.array([common * (1 + np.log(2)), rare])
    query = np.array([common, common])  # red boat; the last word is in no text
    expected = [
        common * common / np.linalg.norm(first) / np.linalg.norm(query),
        common * second[0] / np.linalg.norm(second) / np.linalg.norm(query),
    ]
    np.testing.assert_allclose(index.cosines(["red boat zeppelin"]).toarray(), [expected])


def test_texts_without_words():
    nothing = WordCounts.of(["", "?"])
    assert nothing.words == ()
    assert SharedWords(["", "!"], nothing).cosines(["boat"]).toarray().tolist() == [[0, 0]]
    assert SharedWords(["boat", "!"], nothing).cosines(["boat", ""]).toarray().tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(("words", "counts"), [(("a",), [1, 1]), (("a", "a"), [1, 1]), (("a",), [0]), (("a",), [5])])
def test_impossible_counts_are_refused(words, counts):
    with pytest.raises(ValueError, match="`counts` must"):
        WordCounts(words, np.array(counts), 4)


def test_scripts_without_spaces_are_read_by_character():
    assert WordCounts.of(["红色的船 boat2 a", "เรือ"]).words == tuple(sorted([*"红色的船", *"เรือ", "boat2"]))
    assert SharedWords(["蓝色的车"], WordCounts.of([])).cosines(["红色的船"]).toarray()[0, 0] > 0
