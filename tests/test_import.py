"""Importing the package is quick: it loads nothing heavy until something is used."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_xmc

HEAVY = ("torch", "faiss", "transformers", "sentence_transformers", "datasets", "sklearn", "numpy", "scipy", "evaluate")


OPTIONAL = {  # modules whose own business a dependency is
    "faiss": ("search.faiss_",),
    "pymilvus": ("search.milvus_index",),
    "evaluate": ("metrics.hf_evaluate", "metrics.evaluate_modules"),
    "fastapi": ("serving.",),
}
PROGRAM = """if True:
    import json, sys
    from importlib import import_module
    def loaded(): return sorted({name.split(".")[0] for name in sys.modules})
    import hf_xmc
    found = [loaded()]
    from hf_xmc import decoupled_softmax_loss
    found.append(loaded())
    for name in sys.argv[1:]: import_module(name)
    print(json.dumps([*found, loaded()]))
"""


@pytest.fixture(scope="module")
def loaded():
    """Packages that are loaded after `import hf_xmc`, after importing a loss, and after importing most modules."""
    root = Path(hf_xmc.__file__).parent
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in sorted(root.rglob("*.py"))]
    special = (*(name for names in OPTIONAL.values() for name in names), "losses.streaming.triton_blocks")
    names = [f"hf_xmc.{name}" for name in names if not name.startswith(special) and not name.endswith("__init__")]
    assert len(names) > 60
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy(loaded):
    assert not {*HEAVY} & {*loaded[0]}


@pytest.mark.parametrize(("setting", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_of_the_command_line_sleep_as_they_wait_unless_the_user_says_otherwise(setting, policy):
    """On Linux, OpenMP says how often a waiting thread looks before it sleeps, as torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": setting} if setting else {})
    program = "import os, sys, hf_xmc.cli; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY']); import torch"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", policy]
    if sys.platform == "linux":
        looks = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
        assert looks, done.stderr
        assert all((count == "0") is (policy == "passive") for count in looks), looks


def test_losses_on_a_matrix_import_only_torch(loaded):
    assert "torch" in loaded[1]
    assert not {"transformers", "datasets", *OPTIONAL} & {*loaded[1]}


def test_faiss_milvus_evaluate_and_fastapi_are_imported_only_by_their_own_modules(loaded):
    assert {"torch", "sentence_transformers", "datasets"} <= {*loaded[2]}
    assert not {*OPTIONAL} & {*loaded[2]}


def test_every_public_name_exists_and_has_a_docstring():
    for name in hf_xmc.__all__:
        assert getattr(hf_xmc, name).__doc__, name
    assert set(hf_xmc.__all__) <= set(dir(hf_xmc))


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(hf_xmc, "XMCModle")


def test_type_checkers_see_the_same_names_as_python():
    tree = ast.parse(Path(hf_xmc.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"hf_xmc.{module}" for name, module in hf_xmc._MODULE_OF.items()}
    assert hf_xmc.__all__ == sorted(seen)


def test_mypy_sees_types_and_refuses_a_misspelt_name(tmp_path):
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


def test_declared_dependencies_equal_the_imported_ones():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    names = ("dependencies", "milvus", "serve", "skos")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.DOTALL | re.M)[1] for name in names]
    declared = {name for part in lists for name in re.findall(r'"([\w-]+)[^"]*"', part)}
    imported = set()
    for path in Path(hf_xmc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "hf_xmc"}
    distributions = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = {distributions.get(name, name.replace("_", "-")) for name in imported}
    indirect = {"milvus-lite", "python-multipart"}  # used through pymilvus and starlette
    optional = {"matplotlib", "omikuji", "peft", "triton", "typing-extensions"}  # the last one for type checkers alone
    assert imported - optional == declared - indirect
