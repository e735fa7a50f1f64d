"""Compile the Triton kernels for GPUs that are not there, and print what ptxas says about each, as lines of JSON.

python compile_kernels.py ARCH all|few

The interpreter must be off: TRITON_INTERPRET=0. With TRITON_DUMP_PTXAS_LOG=1, Triton prints the log of ptxas.
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout

import triton
from triton.backends.compiler import GPUTarget

from hf_xmc.losses.streaming import triton_blocks

POINTERS = {
    "pair_rows": "*i32",
    "pair_columns": "*i32",
    "tile_starts": "*i32",
    **dict.fromkeys(("top_out", "total_out", "top", "out"), "*fp32"),
}
UNITS = ("tcgen05.mma", "wgmma", "mma.sync")  # instructions of matrix units, newest first


def compile_kernel(kernel, arch, tile, dtype, aligned=True):
    """Compile for a capability of CUDA, such as 90, and return what the kernel uses of a multiprocessor."""
    constants = triton_blocks.constants_of(tile, as_is=dtype != "fp32")
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    if "LOWEST" in kernel.arg_names:
        constants["LOWEST"] = triton_blocks.LOWEST
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "scale": "fp32", **POINTERS}
    types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = [name for name, kind in types.items() if kind[0] == "*" or (aligned and name in ("dim", "width"))]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = triton.compiler.ASTSource(kernel, types, constants, attributes)
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = log.getvalue()
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": dtype,
        "tile": list(tile),
        "aligned": aligned,
        "threads": 32 * tile.warps,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared": compiled.metadata.shared,
        "unit": next(unit for unit in UNITS if unit in compiled.asm["ptx"]),
        "cubin": len(compiled.asm["cubin"]),
        "tf32": "tf32" in compiled.asm["ptx"],
        "half": any(name in compiled.asm["ptx"] for name in ("bf16", "kind::f16")),  # of 16 bits, as tcgen05 says
    }


def main():
    arch, which = int(sys.argv[1]), sys.argv[2]
    for kernel in (triton_blocks.max_and_sum_kernel, triton_blocks.exponentials_kernel):
        for dtype, tiles in (("fp32", triton_blocks.FLOAT32_TILES), ("bf16", triton_blocks.HALF_TILES)):
            for tile in tiles if which == "all" else tiles[:1]:
                print(json.dumps(compile_kernel(kernel, arch, tile, dtype)), flush=True)
            if which == "all":
                print(json.dumps(compile_kernel(kernel, arch, tiles[-1], dtype, aligned=False)), flush=True)


if __name__ == "__main__":
    main()
