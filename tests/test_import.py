"""Importing the package is quick: it loads nothing heavy until something is used."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

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


def test_type_checkers_see_the_same_names_as_python():
    tree = ast.parse(Path(hf_xmc.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"hf_xmc.{module}" for name, module in hf_xmc._MODULE_OF.items()}
    assert hf_xmc.__all__ == sorted(seen)


def test_users_get_types_and_a_misspelt_name_is_an_error(tmp_path):
    script = [
        "from hf_xmc import XMCModel, load_xmc",
        "model = XMCModel.from_pretrained('org/boats')",
        "reveal_type(model.predict('a red boat'))",
        "reveal_type(load_xmc('data').num_labels)",
        "model.predcit('a red boat')",
        "from hf_xmc import XMCModle",
    ]
    (tmp_path / "script.py").write_text("\n".join(script))
    # Run where `make lint` runs, for its settings and its cache.
    command = [sys.executable, "-m", "mypy", str(tmp_path / "script.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]).stdout
    lines = dict(re.findall(r"script\.py:(\d+): (.*)", said))
    assert '"list[' in lines.get("3", ""), said
    assert "hf_xmc.model.predictions.Prediction" in lines["3"]
    assert '"int"' in lines["4"]
    assert 'has no attribute "predcit"' in lines["5"]
    assert 'has no attribute "XMCModle"' in lines["6"]
    assert len(lines) == 4, said


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    listed = [one for one in requires("hf_xmc") if "extra" not in one or "milvus" in one.split(";")[1]]
    declared = {re.match(r"[\w-]+", one)[0] for one in listed}
    imported = set()
    for path in Path(hf_xmc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            imported |= {name.split(".")[0] for name in names if isinstance(node, (ast.Import, ast.ImportFrom))}
    imported -= {*sys.stdlib_module_names, "hf_xmc"}
    distributions = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = {distributions.get(name, name.replace("_", "-")) for name in imported}
    indirect = {"accelerate", "milvus-lite"}  # used through transformers and pymilvus
    optional = {"peft", "triton"}  # used only if they are there
    assert imported - optional == declared - indirect
