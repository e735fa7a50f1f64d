"""What a manifest tells of the files of a model, with and without reading them."""

import pytest
from helpers.tiny import LABELS, make_static_encoder

from hf_xmc import XMCModel

CHANGED = "label_index/embeddings.safetensors"


@pytest.fixture
def saved(tmp_path):
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_files_of_the_saved_size_load_unread_without_verify(saved):
    model = XMCModel.from_pretrained(saved, verify=False)
    assert model.predict("a red boat") == XMCModel.from_pretrained(saved).predict("a red boat")
    before = model.index.embeddings.clone()  # the file is mapped into memory
    flip_last_byte(saved / CHANGED)
    with pytest.raises(ValueError, match=f"{CHANGED} is not the file that was saved"):
        XMCModel.from_pretrained(saved)
    after = XMCModel.from_pretrained(saved, verify=False)
    assert (after.index.embeddings != before).sum() == 1


@pytest.mark.parametrize("name", [CHANGED, "model.safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "missing"])
def test_a_file_of_another_size_is_refused_without_verify(saved, name, damage):
    content = (saved / name).read_bytes()
    if damage == "missing":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content[:-1] if damage == "shorter" else content + b"\0")
    wrong = "missing" if damage == "missing" else "not the file that was saved"
    with pytest.raises(ValueError, match=f"{name} is {wrong}"):
        XMCModel.from_pretrained(saved, verify=False)


def test_an_added_file_is_refused_without_verify(saved):
    (saved / "pytorch_model.bin").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"pytorch_model.bin was not saved with the model"):
        XMCModel.from_pretrained(saved, verify=False)


def test_the_encoder_alone_loads_without_verify(saved):
    flip_last_byte(saved / CHANGED)
    assert not len(XMCModel.from_pretrained(saved, parts=(), verify=False).labels)
