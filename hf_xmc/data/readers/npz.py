"""Read sparse matrices from untrusted files, with checks before memory is allocated."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

MAX_RATIO = 200  # decompressed to compressed size; text stays below 20
NPZ_MEMBERS = {f"{name}.npy" for name in ("data", "indices", "indptr", "shape", "format")}  # of a csr matrix


def read_npz(path: Path) -> sp.csr_matrix:
    """Return a scipy sparse matrix. Sizes and types are checked before memory is allocated; pickles are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: _checked_size(archive, member) for member in archive.infolist()}
        if sizes.keys() - {"_is_array.npy"} != NPZ_MEMBERS:  # scipy adds it to a csr_array
            raise ValueError(f"a csr matrix has {', '.join(sorted(NPZ_MEMBERS))}, got {', '.join(sorted(sizes))}")
        if sizes["data.npy"] != sizes["indices.npy"]:
            raise ValueError(f"it has {sizes['data.npy']} values and {sizes['indices.npy']} indices")
        matrix: Any = sp.load_npz(path)
        if matrix.format != "csr":
            raise ValueError(f"expected a csr matrix, got {matrix.format}")
        if matrix.data.dtype.kind not in "biuf":
            raise ValueError(f"values must be numbers, got {matrix.data.dtype}")
        matrix.check_format(full_check=True)
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, OSError, EOFError,
        RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: not a readable sparse matrix ({error}).") from None
    return matrix


def _checked_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Return the number of elements of a member of an npz, after checking that they fit into it."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read_header(file)
        except MemoryError:
            raise ValueError(f"the header of {member.filename} is nested too deeply") from None
    if dtype.hasobject:
        raise ValueError(f"{member.filename} contains Python objects, which could run code")
    if member.filename in ("indices.npy", "indptr.npy") and dtype.kind not in "iu":
        raise ValueError(f"{member.filename} must contain whole numbers, got {dtype}")  # scipy would round them
    claimed = math.prod(shape) * max(1, dtype.itemsize)
    # Values may all be 1, which compresses to a thousandth; their number is checked against the indices.
    ratio = 2000 if member.filename == "data.npy" else MAX_RATIO
    if claimed > member.file_size or member.file_size > ratio * member.compress_size + 2**20:
        raise ValueError(f"{member.filename} claims {claimed} bytes, which is impossible for its size in the file")
    return math.prod(shape)
