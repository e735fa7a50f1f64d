"""Packages import only from packages to their left, without cycles."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_xmc"
ORDER = [
    "padding",
    "topk",
    "tensors",
    "distributed",
    "storage",
    "losses",
    "metrics",
    "data",
    "encoders",
    "st_losses",
    "search",
    "hub",
    "evaluator",
    "model",
    "training",
    "experiment",
    "serving",
    "cli",
]
FOREIGN = {  # a dependency, and the only modules that may import it
    "torch.distributed": ["distributed"],
    "huggingface_hub": [
        "storage.commits",
        "storage.snapshots",
        "data.readers.repository",
        "hub.repository",
        "hub.card",
    ],
    "faiss": [
        "search.faiss_codes",
        "search.faiss_lists",
        "search.faiss_factory",
        "search.faiss_index",
        "search.faiss_tables",
    ],
    "pymilvus": ["search.milvus_index"],
    "triton": ["losses.streaming.triton_blocks"],
    "evaluate": ["metrics.hf_evaluate"],
    "fastapi": [
        "serving.annif",
        "serving.api",
        "serving.app",
        "serving.errors",
        "serving.middleware",
        "serving.page",
        "serving.server",
        "serving.service",
    ],
    "gradio": ["serving.page"],
    "uvicorn": ["serving.server"],
    "prometheus_client": ["serving.metrics"],
}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and "evaluate_modules" not in path.parts
}


@cache
def imports(module):
    """Return each imported module with the names that are taken from it."""
    return list(_imports(module))


def _imports(module):
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("hf_xmc.")
                is_module = node.module.split(".")[0] == "hf_xmc" and whole in FILES
                yield (f"hf_xmc.{whole}", []) if is_module else (node.module, [alias.name])


def ours(module):
    return [(name.removeprefix("hf_xmc."), names) for name, names in imports(module) if name.startswith("hf_xmc.")]


def package_of(module):
    return module.split(".")[0]


def test_every_package_has_a_place():
    assert {package_of(module) for module in FILES} == set(ORDER)
    assert sum(path.is_file() for path in PACKAGE.iterdir()) <= 12, "too many files at the root of the package"


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_from_packages_to_its_left(package):
    allowed = ORDER[: ORDER.index(package) + 1]
    wrong = [
        f"{module} imports {name}"
        for module in FILES
        if package_of(module) == package
        for name, _ in ours(module)
        if package_of(name) not in allowed
    ]
    assert not wrong


def test_no_package_imports_in_a_circle():
    graph = {module: {name for name, _ in ours(module) if name in FILES and name != module} for module in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError, naming the circle


def test_private_names_stay_in_their_file():
    wrong = [
        f"{module} takes {n} of {name}"
        for module in FILES
        for name, names in ours(module)
        for n in names
        if n[0] == "_"
    ]
    assert not wrong


@pytest.mark.parametrize("dependency", FOREIGN)
def test_a_foreign_dependency_is_imported_in_its_own_place(dependency):
    users = {
        module
        for module in FILES
        for name, names in imports(module)
        if name == dependency or name.startswith(f"{dependency}.") or f"{name}.{(names or [''])[0]}" == dependency
    }
    assert users
    assert users <= set(FOREIGN[dependency])
