"""Check that an encoder loads on another machine, without a base model and without code or files outside its folder."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers import PreTrainedModel

from hf_xmc.encoders.roles import named_prompts
from hf_xmc.hub.manifest import LAYOUT, LOADED, belongs, is_adapter
from hf_xmc.tensors import check_finite

STOCK = "sentence_transformers."
LIBRARIES = {"sentence_transformers", "transformers", "tokenizers"}


def check_encoder(encoder: SentenceTransformer) -> None:
    """Raise if :func:`write_encoder` would refuse an encoder. A training run checks this before its first step.

    The encoder is written to a temporary folder.
    """
    with TemporaryDirectory() as folder:
        write_encoder(encoder, Path(folder))


def write_encoder(encoder: SentenceTransformer, folder: Path) -> None:
    """Save an encoder so that it loads on another machine, with the same prompts.

    The saved encoder has its adapters merged (:func:`with_merged_adapters`) and its prompts named
    (:func:`hf_xmc.encoders.roles.named_prompts`). The given encoder is unchanged. No model card is written.

    Raises:
        ValueError: if the encoder has an adapter that cannot be merged, a class that loading does not restore, or code
            or files that a release cannot contain.
        FloatingPointError: if the encoder has weights that are NaN or infinite.
    """
    check_self_contained(encoder)
    check_finite(encoder.named_parameters(), "the weights of the encoder")
    saved, prompts = with_merged_adapters(encoder), encoder.prompts
    saved.prompts = dict(named_prompts(encoder))
    try:
        saved.save_pretrained(str(folder), create_model_card=False)
    finally:
        saved.prompts = prompts
    check_paths_inside(folder)


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
    """Raise if a saved encoder would not load on another machine with the same embeddings.

    :func:`write_encoder` calls this first.

    Raises:
        ValueError: if an adapter cannot be merged into the weights, or if loading does not restore the class of a
            model, a tokenizer or an activation function.
    """
    for name, module in encoder.named_modules():
        if configs := _configs_of(module):
            _check_mergeable(module, configs)
        parts = [getattr(module, part, None) for part in ("processor", "tokenizer")]
        if isinstance(module, PreTrainedModel):
            parts.append(module)
        for part in parts:
            kind = type(part)
            if part is not None and kind.__module__.partition(".")[0] not in LIBRARIES:
                raise ValueError(
                    f"the encoder must not contain {kind.__module__}.{kind.__qualname__}, because a release has no "
                    "code and would not load on another machine. Use a class of transformers or sentence-transformers."
                )
        if isinstance(module, Dense) and not _is_restored(module.activation_function):
            raise ValueError(
                f"the activation function of module {name} is {module.activation_function!r}, but only the name of its "
                "class is saved. Use a class from torch.nn with its default arguments."
            )


def _is_restored(activation: Any) -> bool:
    """Return whether an activation function can be restored from its class name."""
    kind = type(activation)
    if not isinstance(activation, nn.Module) or kind.__module__.partition(".")[0] != "torch":
        return False
    try:
        return repr(kind()) == repr(activation)
    except TypeError:  # the class needs arguments
        return False


def with_merged_adapters(encoder: SentenceTransformer) -> SentenceTransformer:
    """Return the encoder with its active PEFT adapters merged into the weights, on the CPU. The encoder is unchanged.

    An adapter is saved without its base model, and with the name or the path of that model on this machine. The merged
    encoder embeds as before, up to rounding, and loads without the base model and without ``peft``. Inactive and
    disabled adapters are left out, as they are in ``encode``. An encoder without adapters is returned unchanged.

    Raises:
        ValueError: if an adapter cannot be merged, such as prompt tuning, or if the weights are quantised.
    """
    if "peft" not in sys.modules:  # no adapter can be loaded
        return encoder
    merged: dict[int, nn.Module] = {}  # a module used in several places is merged once

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
    """Return whether transformers would save the weights of a model under the names from an adapter file.

    When transformers loads weights, it records how it renamed them, and renames them back when it saves the model. The
    records of an adapter stay even after the adapter is merged or deleted.
    """
    changes = vars(module).get("_weight_conversions") or ()
    return any("base_model." in pattern for change in changes for pattern in change.source_patterns)


def _configs_of(module: nn.Module) -> dict[str, Any]:
    """Return the settings of the adapters of a PEFT model, or of a transformers model with PEFT layers."""
    configs = getattr(module, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _holds_layers_of_peft(module: nn.Module) -> bool:
    """Return whether a transformers model still has layers wrapped by PEFT, for example after ``delete_adapter``."""
    layers = module.modules() if isinstance(module, PreTrainedModel) else module.children()
    return any(_is_peft(layer) and not _configs_of(layer) for layer in layers)  # a PEFT model is merged on its own


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _base_of(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") and _is_peft(module) else module


def _check_mergeable(module: nn.Module, configs: dict[str, Any]) -> tuple[str, str]:
    """Raise if adapters cannot be merged. Return the beginning and the end of the message for later errors."""
    kinds = ", ".join(
        sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    )
    refusal = (
        f"the encoder has an adapter ({kinds}) that cannot be merged into its weights, and an adapter alone does not "
        "load on another machine"
    )
    help_ = "Nothing was saved. Train an adapter that can be merged, such as LoRA, or save a copy without it."
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise ValueError(f"{refusal}: it puts tokens before each text. {help_}")
    model = _base_of(module)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"{refusal}: the weights are quantised, and rounding would undo the merge. Nothing was saved. Load the "
            "base model without quantisation, load the adapter into it, and save that model."
        )
    return refusal, help_


def _merged(module: nn.Module) -> nn.Module:
    refusal, help_ = _check_mergeable(module, _configs_of(module))
    model = _base_of(module)
    with torch.no_grad():
        memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in model.parameters()}
        memo |= {id(b): b.detach().to("cpu", copy=True) for b in model.buffers()}
        model = copy.deepcopy(model, memo)
        try:
            _unload(model)
        except Exception as error:  # each kind of adapter raises its own exception type
            raise ValueError(f"{refusal} ({type(error).__name__}: {error}). {help_}") from error
    if left := sorted({type(layer).__name__ for layer in model.modules() if _is_peft(layer)}):
        raise ValueError(f"{refusal}: {', '.join(left)} would remain. {help_}")
    if "peft_config" in vars(model):
        del model.peft_config
    if _saves_names_of_adapter(model):
        del model._weight_conversions
    model._hf_peft_config_loaded = False
    return model


def _unload(module: nn.Module) -> None:
    """Replace each PEFT layer by the layer that it wraps, with its active adapters merged into it."""
    for name, child in list(module._modules.items()):
        if child is not None and _is_peft(child):
            setattr(module, name, _unloaded(child))
        elif child is not None:
            _unload(child)


def _unloaded(layer: Any) -> Any:
    enabled = not layer.disable_adapters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*already.*merged")  # adapters that the user merged before
        if hasattr(layer, "original_module"):  # a trained copy of the original layer, or a layer around it
            if not enabled:
                return layer.original_module
            return layer.unload_and_optionally_merge_module(True, True, None)
        if enabled:
            layer.merge(safe_merge=True)
        elif layer.merged:
            layer.unmerge()
        return layer.get_base_layer()


def check_paths_inside(folder: Path) -> None:
    """Check that nothing in the folder of a saved encoder needs code or a file outside it.

    The entry ``auto_map`` of a configuration is removed. It names code that the library does not use for its own
    classes, and :func:`check_self_contained` has checked that the class is one of them.

    Raises:
        ValueError: if the folder contains an adapter, a module that is not part of sentence-transformers, code, or a
            file that a release cannot contain.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{name} is a link, but a release must contain its files. Copy the file.")
        if is_adapter(name):
            raise ValueError(
                f"{name} belongs to an adapter, which does not load without its base model. Merge it first."
            )
        if not belongs(name) and name != LAYOUT.card:
            raise ValueError(
                f"the encoder saves {name}, but a release may contain only {', '.join(sorted(LOADED))}. Load the "
                'encoder with backend="torch" and without custom code.'
            )
        if path.name.endswith("config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if "auto_map" in content:
                del content["auto_map"]
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for kind in _modules_in(path):
            if not kind.startswith(STOCK):
                raise ValueError(
                    f"{name} names {kind}, which is code that a release cannot contain and that needs "
                    "`trust_remote_code`. Build the encoder from modules of sentence-transformers and transformers."
                )


def _modules_in(path: Path) -> list[str]:
    """Return the module classes that a settings file names."""
    if path.name == "modules.json":
        return [module["type"] for module in json.loads(path.read_text(encoding="utf-8"))]
    if path.name == "router_config.json":
        return list(json.loads(path.read_text(encoding="utf-8"))["types"].values())
    return []
