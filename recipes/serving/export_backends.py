"""Add files for ONNX Runtime or OpenVINO to a saved model, in float32 and in int8.

    python recipes/serving/export_backends.py runs/minilm/model --backend openvino --data recipes/data/wordnet-hypernyms

OpenVINO gets `openvino/openvino_model.xml` and `openvino_model_int8.xml`, whose weights and activations are int8. The
ranges of its activations are measured on training texts. ONNX Runtime gets `onnx/model.onnx` and `model_int8.onnx`,
which needs no texts: it measures the ranges of each batch. The manifest of the model then lists the new files.
"""

import argparse
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_xmc.cli import HelpFormatter

OUTPUT = "last_hidden_state"


def openvino_file(folder: Path) -> Any:
    """Export the transformer of a model to `openvino_model.xml`, and return its encoder."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs={"export": True})
    with TemporaryDirectory() as new:
        encoder.save_pretrained(new)
        add(Path(new) / "openvino", folder / "openvino", "openvino_model")
    return encoder


def openvino_int8(encoder: Any, texts: list[str], folder: Path) -> None:
    """Quantise the transformer of an encoder to `openvino_model_int8.xml`.

    `sentence_transformers.export_static_quantized_openvino_model` does the same, but pads each text to 384 tokens.
    """
    from datasets import Dataset
    from optimum.intel.openvino import OVConfig, OVQuantizationConfig, OVQuantizer

    settings = OVConfig(quantization_config=OVQuantizationConfig(num_samples=len(texts)))
    limit = {"truncation": True, "max_length": encoder.max_seq_length}
    rows = Dataset.from_dict(dict(encoder.tokenizer(texts, **limit)))  # one text a batch: no padding
    with TemporaryDirectory() as new:
        OVQuantizer.from_pretrained(encoder[0].model).quantize(rows, save_directory=new, ov_config=settings)
        add(Path(new) / "openvino", folder / "openvino", "openvino_model_int8")


def add(exported: Path, folder: Path, name: str) -> None:
    """Copy the two files of a net to a folder, by another name."""
    folder.mkdir(exist_ok=True)
    for suffix in (".bin", ".xml"):
        shutil.copyfile(exported / f"openvino_model{suffix}", folder / f"{name}{suffix}")


def onnx_files(folder: Path) -> None:
    """Export the transformer of a model to `model.onnx`, and quantise it to `model_int8.onnx`."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from sentence_transformers import SentenceTransformer

    class Hidden(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, inputs, strict=True)))[OUTPUT]

    encoder = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    inputs = encoder.tokenizer(["a text", "a longer text"], padding=True, return_tensors="pt")
    names = list(inputs)
    (folder / "onnx").mkdir(exist_ok=True)
    torch.onnx.export(
        Hidden(encoder[0].model.eval()),
        tuple(inputs.values()),
        str(folder / "onnx" / "model.onnx"),
        input_names=names,
        output_names=[OUTPUT],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in [*names, OUTPUT]},
        dynamo=False,
    )
    small = folder / "onnx" / "model_int8.onnx"
    quantize_dynamic(folder / "onnx" / "model.onnx", small, weight_type=QuantType.QInt8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model, which gets the files")
    parser.add_argument("--backend", choices=["onnx", "openvino"], required=True)
    parser.add_argument("--data", help="data set whose training texts calibrate int8 of OpenVINO; without it, no int8")
    parser.add_argument("--num_texts", type=int, default=300, help="number of these texts")
    options = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the export would wait for the Hub
    from hf_xmc import XMCModel, load_xmc

    model = XMCModel.from_pretrained(options.model, device="cpu")  # checks the files before they are exported
    if options.backend == "onnx":
        onnx_files(options.model)
    else:
        encoder = openvino_file(options.model)
        if options.data:
            openvino_int8(encoder, load_xmc(options.data).train["text"][: options.num_texts], options.model)
    model.save_pretrained(options.model)


if __name__ == "__main__":
    main()
