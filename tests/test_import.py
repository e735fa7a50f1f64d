"""Importing the package is quick: it loads nothing heavy until something is used."""

import json
import subprocess
import sys

import hf_xmc

HEAVY = ("torch", "faiss", "transformers", "sentence_transformers", "datasets", "sklearn", "numpy", "scipy", "evaluate")


def test_import_loads_nothing_heavy():
    code = "import json, sys, hf_xmc; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]


def test_the_losses_on_a_matrix_need_torch_alone():
    code = "import json, sys; from hf_xmc import decoupled_softmax_loss; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not [name for name in loaded if name.split(".")[0] in ("transformers", "datasets", "faiss", "evaluate")]


def test_every_public_name_is_there_and_has_a_docstring():
    for name in hf_xmc.__all__:
        assert getattr(hf_xmc, name).__doc__, name
    assert set(hf_xmc.__all__) <= set(dir(hf_xmc))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hf_xmc, "XMCModle")
