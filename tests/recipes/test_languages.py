"""Encoders built from the data learn words of languages without spaces, and stems of languages with endings."""

import gettext
import struct

import pytest

from hf_xmc import XMCData, XMCModel
from hf_xmc.experiment.encoders import plain
from hf_xmc.experiment.fit import fit
from hf_xmc.experiment.settings import from_dict


@pytest.fixture
def languages(script):
    return script("languages")


def trained(training, encoder, folder):
    data = XMCData.from_lists([text for text, _ in training], [labels for _, labels in training])
    values = {"data": "data", "model": encoder, "output_dir": str(folder), "embedding_dim": 48, "use_cpu": True}
    parsed = from_dict({**values, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"})
    trainer, vectors, _, settings = fit(parsed.settings, parsed.args, data, given=parsed.given)
    return XMCModel(plain(trainer.model, settings), data.labels, label_vectors=vectors)


@pytest.mark.parametrize("encoder", ["phrases", "static"])
@pytest.mark.parametrize("kind", ["without_spaces", "inflected"])
def test_labels_of_new_texts_are_found(kind, encoder, languages, tmp_path):
    rows = getattr(languages, kind)(600)
    model = trained(rows[150:], encoder, tmp_path)
    found = [[label.uid for label in labels] for labels in model.predict([text for text, _ in rows[:150]], 5)]
    measured = languages.measure(found, rows[:150], 0)
    assert measured.p1 > 90  # words between spaces, without their letters, reach 6 and 71
    assert measured.r5 > 90


def test_measures_are_percent_of_texts_and_of_their_labels(languages):
    rows = [("a", ["x", "y"]), ("b", ["z"]), ("c", ["z"])]
    assert languages.measure([["x", "z"], ["x", "z"], []], rows, 2.0) == (pytest.approx(100 / 3), 50, 2.0)


def test_each_fifth_is_tested_once_by_each_model(languages):
    rows = [(str(number), ["x"]) for number in range(11)]
    seen = []

    def model(training, test):
        seen.append(([int(text) for text, _ in training], [int(text) for text, _ in test]))
        return [["x" if text == "3" else "y"] for text, _ in test]

    results = languages.compare(rows, {"one": [model, model], "other": [model]}, 2)
    assert seen == [([*range(2, 11)], [0, 1])] * 3 + [([0, 1, *range(4, 11)], [2, 3])] * 3
    assert [result.p1 for result in results["one"]] == [0, 0, 50, 50]
    assert [result.r5 for result in results["other"]] == [0, 50]


def test_messages_have_the_dialogs_that_show_them(languages, tmp_path):
    shown = {"one|a\x04_File": "_Tiedosto", "two |b\x04File": "Tiedosto:", "two|c\x04OK": "OK", "none\x04File": "File"}
    folder = tmp_path / "program" / "resource" / "fi" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "sw.mo").write_bytes(compiled(shown))
    assert gettext.GNUTranslations((folder / "sw.mo").open("rb")).gettext("one|a\x04_File") == "_Tiedosto"
    assert languages.messages(tmp_path, "fi", 2) == [("Tiedosto", ["sw one", "sw two"])]
    with pytest.raises(ValueError, match="has no messages in 'th'"):
        languages.messages(tmp_path, "th", 2)


def compiled(messages):
    """Return the content of a file of messages."""
    pairs = [(key.encode(), value.encode()) for key, value in sorted(messages.items())]
    start = 28 + 16 * len(pairs)
    tables, content = [[], []], b""
    for side in (0, 1):
        for pair in pairs:
            tables[side].append(struct.pack("<II", len(pair[side]), start + len(content)))
            content += pair[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    return head + b"".join(tables[0]) + b"".join(tables[1]) + content
