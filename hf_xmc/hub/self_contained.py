"""Checks that an encoder loads on another machine: no adapter of another model, no code or file from elsewhere."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers import PreTrainedModel

from hf_xmc.encoders.roles import named_prompts
from hf_xmc.hub.manifest import LOADED, is_adapter
from hf_xmc.tensors import refuse_non_finite

STOCK = "sentence_transformers."
LIBRARIES = {"sentence_transformers", "transformers", "tokenizers"}


def check_encoder(encoder: SentenceTransformer) -> None:
    """Raise if :func:`write_encoder` would refuse an encoder, so that a training can ask before its first step.

    The encoder is written to a temporary folder.
    """
    with TemporaryDirectory() as folder:
        write_encoder(encoder, Path(folder))


def write_encoder(encoder: SentenceTransformer, folder: Path) -> None:
    """Save an encoder so that it loads on another machine, with the same prompts.

    In what is saved, adapters are merged (:func:`with_merged_adapters`) and prompts are named
    (:func:`hf_xmc.encoders.roles.named_prompts`). The encoder keeps its own. No model card is written.

    Raises:
        ValueError: if it has an adapter that cannot be merged, a class that does not come back when it is loaded, or
            code or files that are no part of a release.
        FloatingPointError: if it has weights that are NaN or infinite.
    """
    check_self_contained(encoder)
    refuse_non_finite(encoder.named_parameters(), "the weights of the encoder")
    saved, prompts = with_merged_adapters(encoder), encoder.prompts
    saved.prompts = dict(named_prompts(encoder))
    try:
        saved.save_pretrained(str(folder), create_model_card=False)
    finally:
        saved.prompts = prompts
    refuse_what_points_outside(folder)


def adapters_of(encoder: nn.Module) -> list[str]:
    """Return the kinds of the active PEFT adapters, such as ``["LORA"]``; inactive and disabled ones do not count."""
    if "peft" not in sys.modules:
        return []
    kinds = set()
    for module in encoder.modules():
        if configs := _configs_of(module):
            layers: list[Any] = [
                layer for layer in module.modules() if _is_peft(layer) and hasattr(layer, "active_adapters")
            ]
            active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
            kinds |= {str(getattr(configs[name].peft_type, "value", "")) for name in active if name in configs}
    return sorted(kinds)


def check_self_contained(encoder: nn.Module) -> None:
    """Raise if an encoder cannot be saved so that it embeds as it does now on another machine.

    :func:`write_encoder` asks this first.

    Raises:
        ValueError: if an adapter cannot be merged into the weights, or if the class of a model, a tokenizer or an
            activation function does not come back when the encoder is loaded.
    """
    for name, module in encoder.named_modules():
        if configs := _configs_of(module):
            _refuse_unmergeable(module, configs)
        parts = [getattr(module, part, None) for part in ("processor", "tokenizer")]
        if isinstance(module, PreTrainedModel):
            parts.append(module)
        for part in parts:
            kind = type(part)
            if part is not None and kind.__module__.partition(".")[0] not in LIBRARIES:
                raise ValueError(
                    f"the encoder holds {kind.__module__}.{kind.__qualname__}, which is code that no release holds and "
                    "that does not load on another machine: use a class of transformers or sentence-transformers."
                )
        if isinstance(module, Dense) and not _comes_back(module.activation_function):
            raise ValueError(
                f"the activation function of module {name} is {module.activation_function!r}, and of it only the name "
                "of its class is saved: use a class of torch.nn with its default arguments."
            )


def _comes_back(activation: Any) -> bool:
    """Return whether an activation function is the one that is loaded by the name of its class."""
    kind = type(activation)
    if not isinstance(activation, nn.Module) or kind.__module__.partition(".")[0] != "torch":
        return False
    try:
        return repr(kind()) == repr(activation)
    except TypeError:  # it needs arguments
        return False


def with_merged_adapters(encoder: SentenceTransformer) -> SentenceTransformer:
    """Return the encoder with its active PEFT adapters merged into the weights, on the CPU; it is not changed itself.

    An adapter is saved without the model that it adapts, and with the name or the path of that model on this machine.
    Merged, the encoder embeds as before, up to rounding, and loads without that model and without ``peft``. Adapters
    that are inactive or disabled are left out, as they are in ``encode``. Without any adapter, the encoder itself is
    returned.

    Raises:
        ValueError: if an adapter cannot be merged, such as prompt tuning, or if the weights are quantised.
    """
    if "peft" not in sys.modules:  # nothing can hold an adapter
        return encoder
    merged: dict[int, nn.Module] = {}  # a module that stands in several places is merged once

    def rebuilt(module: nn.Module) -> nn.Module:
        if id(module) not in merged:
            if _configs_of(module) or _holds_layers_of_peft(module):
                merged[id(module)] = _merged(module)
            else:
                children = {name: None if child is None else rebuilt(child) for name, child in module._modules.items()}
                same = all(children[name] is child for name, child in module._modules.items())
                renamed = _saves_names_of_adapter(module)
                merged[id(module)] = new = _with_children(module, children) if renamed or not same else module
                if renamed:
                    del new._weight_conversions
        return merged[id(module)]

    return rebuilt(encoder)  # type: ignore[return-value]


def _with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    new = copy.copy(module)
    new._modules = children
    return new


def _saves_names_of_adapter(module: nn.Module) -> bool:
    """Return whether transformers would save the weights of a model by the names that an adapter has in its file.

    It notes how names changed whenever it loads weights, to change them back when it saves the model. An adapter that
    is loaded leaves its own changes there, also after it is merged or deleted.
    """
    changes = vars(module).get("_weight_conversions") or ()
    return any("base_model." in pattern for change in changes for pattern in change.source_patterns)


def _configs_of(module: nn.Module) -> dict[str, Any]:
    """Return the settings of the adapters that a model holds: one of PEFT, or one of transformers with layers of it."""
    configs = getattr(module, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _holds_layers_of_peft(module: nn.Module) -> bool:
    """Return whether layers are still wrapped in a model of transformers, such as after ``delete_adapter``."""
    layers = module.modules() if isinstance(module, PreTrainedModel) else module.children()
    return any(_is_peft(layer) and not _configs_of(layer) for layer in layers)  # a whole model of PEFT is merged alone


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _base_of(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") and _is_peft(module) else module


def _refuse_unmergeable(module: nn.Module, configs: dict[str, Any]) -> tuple[str, str]:
    """Raise if adapters cannot be merged; return the beginning and the end of the message for what is found later."""
    kinds = ", ".join(
        sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    )
    refusal = (
        f"the encoder has an adapter ({kinds}) that cannot be merged into its weights, and an adapter alone does not "
        "load on another machine"
    )
    help_ = "Nothing was saved. Train an adapter that can be merged, such as LoRA, or save a copy without it."
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise ValueError(f"{refusal}: its tokens are put before each text. {help_}")
    model = _base_of(module)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"{refusal}: the weights are quantised, so merging would round it away. Nothing was saved. Load the base "
            "model without quantisation, load the adapter into it, and save that."
        )
    return refusal, help_


def _merged(module: nn.Module) -> nn.Module:
    refusal, help_ = _refuse_unmergeable(module, _configs_of(module))
    model = _base_of(module)
    with torch.no_grad():
        memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in model.parameters()}
        memo |= {id(b): b.detach().to("cpu", copy=True) for b in model.buffers()}
        model = copy.deepcopy(model, memo)
        try:
            _unload(model)
        except Exception as error:  # each kind of adapter refuses in its own way
            raise ValueError(f"{refusal} ({type(error).__name__}: {error}). {help_}") from error
    if left := sorted({type(layer).__name__ for layer in model.modules() if _is_peft(layer)}):
        raise ValueError(f"{refusal}: {', '.join(left)} would be left. {help_}")
    if "peft_config" in vars(model):
        del model.peft_config
    if _saves_names_of_adapter(model):
        del model._weight_conversions
    model._hf_peft_config_loaded = False
    return model


def _unload(module: nn.Module) -> None:
    """Replace each layer of PEFT by the layer that it wraps, with its active adapters merged in."""
    for name, child in list(module._modules.items()):
        if child is not None and _is_peft(child):
            setattr(module, name, _unloaded(child))
        elif child is not None:
            _unload(child)


def _unloaded(layer: Any) -> Any:
    enabled = not layer.disable_adapters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*already.*merged")  # by the user: they are in the weights as they are
        if hasattr(layer, "original_module"):  # trained instead of the original, or around it
            if not enabled:
                return layer.original_module
            return layer.unload_and_optionally_merge_module(True, True, None)
        if enabled:
            layer.merge(safe_merge=True)
        elif layer.merged:
            layer.unmerge()
        return layer.get_base_layer()


def refuse_what_points_outside(folder: Path) -> None:
    """Check a folder into which an encoder was saved: nothing in it may need code or a file from elsewhere.

    The entry ``auto_map`` of a configuration is removed. It names code that the library does not use if it has the
    class itself, which :func:`check_self_contained` has found.

    Raises:
        ValueError: if it holds an adapter, a module that is not one of sentence-transformers, code, or a file that no
            release may hold.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{name} is a link: a release holds its files itself.")
        if is_adapter(name):
            raise ValueError(f"{name} is of an adapter, which does not load without its base model: merge it first.")
        if PurePosixPath(name).suffix not in LOADED and name != "README.md":
            raise ValueError(
                f"the encoder saves {name}, and a release holds {', '.join(sorted(LOADED))} and nothing else. Load the "
                'encoder with backend="torch", and without code of its own.'
            )
        if path.name.endswith("config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if "auto_map" in content:
                del content["auto_map"]
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for kind in _modules_in(path):
            if not kind.startswith(STOCK):
                raise ValueError(
                    f"{name} names {kind}, which is code that no release holds and that does not load without "
                    "`trust_remote_code`: build the encoder of modules of sentence-transformers and transformers."
                )


def _modules_in(path: Path) -> list[str]:
    """Return the classes of modules that a file of settings names."""
    if path.name == "modules.json":
        return [module["type"] for module in json.loads(path.read_text(encoding="utf-8"))]
    if path.name == "router_config.json":
        return list(json.loads(path.read_text(encoding="utf-8"))["types"].values())
    return []
