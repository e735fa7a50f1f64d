"""A module imports only from lower floors, or from its own floor where it stands further left."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_xmc"
FLOORS = [
    [
        "padding",
        "topk",
        "tensors",
        "sharding",
        "cells",
        "metrics",
        "frequency",
        "sampling",
        "atomic",
        "finite",
        "commits",
    ],
    ["threshold", "functional", "blocks", "kernels", "criteria", "gradients", "soft_top_k", "streaming"],
    ["losses", "forward", "encoding", "roles", "ragged", "static"],
    [
        "matrices",
        "formats",
        "columns",
        "label_texts",
        "positives",
        "tables",
        "numbering",
        "prepared",
        "data",
        "loading",
        "phrases",
        "batching",
        "negatives",
        "bank",
        "evaluation_loss",
        "in_batch",
        "st_losses",
    ],
    [
        "equal_rows",
        "index",
        "inference",
        "proposals",
        "faiss_factory",
        "faiss_state",
        "faiss_index",
        "milvus_index",
        "grouped_index",
        "predictions",
        "hierarchy",
        "long_text",
        "calibration",
        "overlap",
        "memory_settings",
        "memory",
        "explanation",
        "evaluation",
        "evaluate_metrics",
        "mining",
    ],
    [
        "manifest",
        "self_contained",
        "release",
        "snapshots",
        "hub",
        "card",
        "searcher",
        "calibrated",
        "predictor",
        "model",
        "pipelines",
    ],
    ["refusals", "training_args", "learning_rates", "checkpoints", "runs", "trainer", "cli"],
]
ORDER = [module for floor in FLOORS for module in floor]
ROOMS = {
    "torch.distributed": ["sharding"],
    "huggingface_hub": ["commits", "snapshots", "hub", "card"],
    "faiss": ["faiss_factory", "faiss_index", "faiss_state"],
    "pymilvus": ["milvus_index"],
    "triton": ["kernels"],
    "evaluate": ["evaluate_metrics"],
}


def imported(module):
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            yield from ([f"hf_xmc.{name.name}" for name in node.names] if node.module == "hf_xmc" else [node.module])


def test_every_module_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module):
    ours = [name.split(".")[1] for name in imported(module) if name.startswith("hf_xmc.")]
    upward = [name for name in ours if ORDER.index(name) >= ORDER.index(module)]
    assert not upward, f"{module} imports {upward}"


@pytest.mark.parametrize("module", ORDER)
def test_each_foreign_subject_has_its_room(module):
    for package, rooms in ROOMS.items():
        if any(name == package or name.startswith(package + ".") for name in imported(module)):
            assert module in rooms, f"{module} imports {package}, which belongs to {', '.join(rooms)}"
