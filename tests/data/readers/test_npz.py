"""A matrix file that is damaged or made to harm, in each way there is, is refused by name."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from hf_xmc.data.readers.npz import read_npz


def array(values, dtype=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(values, dtype=dtype), allow_pickle=False)
    return file.getvalue()


def headed(header, content=b""):
    """An array under a header that is written by hand."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def of_shape(shape, dtype="<i8"):
    return headed(f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}")


# [[1, 0, 0, 0, 0], [0, 2, 3, 0, 0]]
PARTS = {
    "data": array([1, 2, 3], np.float32),
    "indices": array([0, 1, 2]),
    "indptr": array([0, 1, 3]),
    "shape": array([2, 5]),
    "format": array(b"csr"),
}


def write(path, method=zipfile.ZIP_STORED, **parts):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in {**PARTS, **parts}.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f8"])
def test_matrices_of_numbers_are_read(dtype, tmp_path):
    write(tmp_path / "x.npz", data=array([1, 1, 1], dtype))
    matrix = read_npz(tmp_path / "x.npz")
    assert (matrix.shape, matrix.indptr.tolist(), matrix.indices.tolist()) == ((2, 5), [0, 1, 3], [0, 1, 2])
    assert (matrix.data.dtype, matrix.data.tolist()) == (dtype, [1, 1, 1])


def test_values_that_are_all_one_may_compress_to_a_thousandth(tmp_path):
    columns = np.random.default_rng(0).integers(0, 5, 500_000, np.int32)
    parts = {"data": array(np.ones(500_000)), "indices": array(columns), "indptr": array([0, 7, 500_000])}
    write(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, **parts)
    assert read_npz(tmp_path / "x.npz").nnz == 500_000


WRONG = {
    "another kind": (
        {"format": array(b"csc"), "indices": array([0, 1, 1]), "indptr": array([0, 1, 2, 3, 3, 3])},
        "expected a csr matrix, got csc",
    ),
    "a kind of other parts": ({"format": array(b"coo")}, "row"),
    "a kind that is a number": ({"format": array(7)}, "decode"),
    "a kind that scipy does not read": ({"format": array(b"lil")}, "not implemented"),
    "complex numbers": ({"data": array([1j] * 3)}, "values must be numbers, got complex128"),
    "dates": ({"data": array([0] * 3, "M8[s]")}, "values must be numbers|not supported"),
    "values in two dimensions": ({"data": array(np.ones((3, 1)))}, ""),
    "columns in two dimensions": ({"indices": array([[0], [1], [2]])}, ""),
    "three dimensions": ({"shape": array([2, 5, 1])}, ""),
    "half a dimension": ({"shape": array([2.5, 5])}, ""),
    "rows below zero": ({"shape": array([-2, 5])}, ""),
    "a column below zero": ({"indices": array([0, -1, 2])}, ""),
    "a column beyond the last": ({"indices": array([0, 1, 5])}, ""),
    "half a column": ({"indices": array([0, 1.5, 2])}, "indices.npy must contain whole numbers, got float64"),
    "half a row": ({"indptr": array([0, 1.5, 3])}, "indptr.npy must contain whole numbers, got float64"),
    "rows that go back": ({"indptr": array([0, 4, 3])}, ""),
    "rows beyond the values": ({"indptr": array([0, 1, 9])}, ""),
    "a type of no parts": ({"data": of_shape((3,), ())}, ""),
    "a type of Python objects": ({"data": headed("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}")}, "objects"),
    "a header that is no dictionary": ({"data": headed("{[]: 1}")}, ""),
    "a header of many signs": ({"data": headed("-" * 9000 + "1")}, ""),
    "a header of some signs": ({"data": headed("-" * 5000 + "1")}, ""),
    "a dimension beyond 64 bits": ({"data": of_shape((2**70, 0)), "indices": of_shape((2**70, 0))}, ""),
    "more than there is": ({"data": of_shape((10**9,)), "indices": of_shape((10**9,))}, "claims 8000000000 bytes"),
    "no bytes an element": ({"data": of_shape((10**13,), "|V0"), "indices": of_shape((10**13,), "|V0")}, "claims"),
    "a pickle": ({"data": pickle.dumps([1.0] * 3)}, ""),
}


@pytest.mark.promise("A crafted matrix of any shape, indices and type is refused, or its exact content is loaded")
@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_not_matrices_are_refused(case, tally, tmp_path):
    parts, message = WRONG[case]
    write(tmp_path / "x.npz", **parts)
    with pytest.raises(ValueError, match=rf"x\.npz: not a readable sparse matrix \(.*({message})"):
        read_npz(tmp_path / "x.npz")
    tally(inputs=1)


def changed(method, change):
    """A file of this compression, as bytes that are changed."""

    def make(path):
        write(path, method)
        content = bytearray(path.read_bytes())
        change(content, content.index(b"PK\x01\x02"))  # where the directory begins
        path.write_bytes(content)

    return make


def garble(content, _):
    content[45:55] = bytes(byte ^ 0xFF for byte in content[45:55])


def encrypt(content, directory):
    content[directory + 8] |= 1
    content[6] |= 1


def beyond_the_end(path):
    """Sizes of a million bytes for every part."""
    write(path, data=of_shape((100_000,)), indices=of_shape((100_000,)))
    content, at = bytearray(path.read_bytes()), 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        content[at + 20 : at + 28] = (1_000_000).to_bytes(4, "little") * 2
        at += 1
    path.write_bytes(content)


CONTAINERS = {
    "no file": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.touch(),
    "another checksum": changed(zipfile.ZIP_STORED, garble),
    "garbled deflate": changed(zipfile.ZIP_DEFLATED, garble),
    "garbled bzip2": changed(zipfile.ZIP_BZIP2, garble),
    "garbled lzma": changed(zipfile.ZIP_LZMA, garble),
    "encrypted": changed(zipfile.ZIP_STORED, encrypt),
    "an end that is missing": beyond_the_end,
}


@pytest.mark.promise("A crafted matrix of any shape, indices and type is refused, or its exact content is loaded")
@pytest.mark.parametrize("case", CONTAINERS)
def test_damaged_containers_are_refused(case, tally, tmp_path):
    CONTAINERS[case](tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz: not a readable sparse matrix"):
        read_npz(tmp_path / "x.npz")
    tally(inputs=1)
