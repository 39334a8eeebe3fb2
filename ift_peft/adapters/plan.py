"""The plan of a merge: for every weight of the merged model, where it is read and which adapter tensors change it.

Made of names and shapes alone: file headers, and base and adapter without weights (on the meta device).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ift_peft.adapters.checkpoint import Stored, stored_tensors, tensors_of
from ift_peft.errors import IftPeftError, MergeError, raise_all
from ift_peft.infer.adapter_files import told_as_ours, try_patterns
from ift_peft.model.configuration import skeleton
from ift_peft.model.heads import ClassHead
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation

ADAPTER_FILE = "adapter_model.safetensors"
_NAME = "default"  # what PEFT calls the adapter of a model that has one
_FIX = "the adapter is not of this base, or is damaged: train again"


@dataclass(frozen=True)
class Weight:
    """One tensor of the merged model: `name` in the model, `key` in its files.

    It is the base's `stored` tensor; or the adapter's tensor `replaced_by`; or what PEFT's `layer`, loaded with the
    adapter's tensors (`tensors`: the layer's own name for each, and the adapter's), merges into the stored one.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    stored: Stored | None
    replaced_by: str | None = None
    layer: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def adapted(self) -> bool:
        return self.layer is not None or self.replaced_by is not None


@dataclass(frozen=True)
class Plan:
    """All weights in the order in which they are read and written, and the model they are for, without weights.

    `untied`: the head shared its weights with an embedding that the adapter changes, and gets its own. `left_out` are
    stored tensors that the model has no place for.
    """

    model: Any
    weights: tuple[Weight, ...]
    untied: bool
    left_out: tuple[str, ...]


def why_in_memory(location: BaseLocation, adapter: Path, *, head: ClassHead | None) -> str | None:
    """Why this adapter or base is not merged shard by shard but by PEFT's `merge_and_unload`; None where it is."""
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        return f"{config.peft_type.value} is no LoRA"
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        return f"init_lora_weights={config.init_lora_weights!r} changed the base"
    others = ("lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "use_bdlora")
    asked = [name for name in others if getattr(config, name, None)]
    if asked:
        return f"the adapter has {', '.join(asked)}"
    bare = _skeleton(location, head)
    converters = [one for one in get_model_conversion_mapping(bare) if isinstance(one, WeightConverter)]
    if any(rename_source_key(key, [], converters)[1] for key in stored_tensors(location.folder)):
        return f"{type(bare).__name__} is stored in another form than it is run in"
    model = _with_adapter(bare, config, adapter)
    kinds = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    unknown = tuple(sorted(kind.__name__ for kind in kinds if kind not in (Linear, Embedding)))
    return f"the adapter is on modules that PEFT wraps as {', '.join(unknown)}" if unknown else None


def plan_merge(location: BaseLocation, adapter: Path, *, head: ClassHead | None) -> Plan:
    """The plan for an adapter that `why_in_memory` has nothing against.

    Raises `Faults` or `MergeError` where an adapter tensor belongs to no base weight or is of another shape, where the
    base lacks a weight, and where two stored tensors claim one.
    """
    bare = _skeleton(location, head)
    expected = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    faults: list[IftPeftError] = []
    places, left_out = _places(bare, stored_tensors(location.folder), expected, faults)
    tied = {target: source for target, source in bare.all_tied_weights_keys.items() if target in expected}
    model = _with_adapter(bare, PeftConfig.from_pretrained(str(adapter)), adapter)
    weights = {}
    for name, stored in places.items():
        weights[name] = Weight(name, _key(stored.key, name), expected[name], stored)
    _check_stored(weights, expected, faults)
    _place_adapter(model, adapter, weights, expected, tied, faults)
    untied = _untie(weights, tied, expected)
    ignored = [name for name in expected if name not in weights and not (name in tied and not untied)]
    faults += [
        MergeError(expected=f"a weight {name} in base or adapter", found="none", fix="give the base of training, whole")
        for name in ignored
    ]
    raise_all(faults)
    ordered = tuple(weights[name] for name in expected if name in weights)  # as save_pretrained has them
    return Plan(model, ordered, untied, tuple(left_out))


def check_tensors(location: BaseLocation, adapter: Path, *, head: ClassHead | None) -> None:
    """Whether an adapter of any kind has all tensors that PEFT has a place for over this base, and no others.

    Raises `Faults` or `MergeError` holding one for each that is not there, not known or of another shape.
    """
    model = _with_adapter(_skeleton(location, head), PeftConfig.from_pretrained(str(adapter)), adapter)
    faults: list[IftPeftError] = []
    _match_tensors(model, adapter, faults)
    raise_all(faults)


def _skeleton(location: BaseLocation, head: ClassHead | None) -> PreTrainedModel:
    if head is None:
        return skeleton(location)
    return skeleton(location, "sequence-classification", settings=head.settings())


def _with_adapter(model: PreTrainedModel, config: PeftConfig, folder: Path) -> Any:
    try_patterns(model, folder)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = False  # nothing to initialise: there are no weights
    config.base_model_name_or_path = None
    with quiet(), torch.device("meta"), told_as_ours(folder):
        return get_peft_model(model, config).eval()


def _places(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
    faults: list[IftPeftError],
) -> tuple[dict[str, Stored], list[str]]:
    """The stored tensor of each weight, named as transformers names it on loading; and those that are none of them."""
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    known = dict(model.state_dict())
    names = {}
    for key in stored:
        name = rename_source_key(key, renamings, [], model.base_model_prefix, known)[0]
        if name not in expected and key in expected:
            name = key
        names[key] = name
    twice = {name for name, count in Counter(names.values()).items() if count > 1 and name in expected}
    faults += [
        MergeError(
            expected=f"one stored tensor for {name}",
            found=", ".join(key for key, of in names.items() if of == name),
            fix="give the base as save_pretrained wrote it",
        )
        for name in sorted(twice)
    ]
    places = {name: stored[key] for key, name in names.items() if name in expected}
    return places, [key for key, name in names.items() if name not in expected]


def _key(stored: str, name: str) -> str:
    """What a weight is called in the merged files: as in the base, but with the model's prefix where that lacks it."""
    return name if name.endswith(f".{stored}") or stored.endswith(f".{name}") else stored


def _check_stored(
    weights: Mapping[str, Weight], expected: Mapping[str, tuple[int, ...]], faults: list[IftPeftError]
) -> None:
    for name, weight in weights.items():
        assert weight.stored is not None
        if weight.stored.shape != expected[name]:
            faults.append(
                MergeError(
                    expected=f"{name} of shape {expected[name]} in the base",
                    found=f"{weight.stored.shape} in {weight.stored.file.name}",
                    fix="give the base as 16- or 32-bit weights that fit its config.json",
                )
            )


def _place_adapter(
    model: Any,
    adapter: Path,
    weights: dict[str, Weight],
    expected: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    faults: list[IftPeftError],
) -> None:
    """Put every adapter tensor to the weight that it changes. PEFT says what each is called in file and in model."""
    for key, inside in _match_tensors(model, adapter, faults).items():
        layer, local = _layer_of(model, inside)
        name = _bare(f"{layer}.weight" if layer else inside)
        if name not in expected:
            faults.append(MergeError(expected=f"a base weight for {key}", found=f"no {name}", fix=_FIX))
            continue
        if name not in weights and name in tied:
            source = weights.get(tied[name])
            weights[name] = Weight(name, name, expected[name], source.stored if source else None)
        weight = weights.get(name, Weight(name, name, expected[name], None))
        if layer:
            weights[name] = replace(weight, layer=layer, tensors={**weight.tensors, local: key})
        else:
            weights[name] = replace(weight, replaced_by=key)
    for name, weight in weights.items():
        if weight.layer and weight.stored is None:
            faults.append(MergeError(expected=f"a stored weight {name}", found="none", fix=_FIX))


def _match_tensors(model: Any, adapter: Path, faults: list[IftPeftError]) -> dict[str, str]:
    """The adapter's tensors, in order, and what each is called in the model."""
    full = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in full.items()}
    wanted = get_peft_model_state_dict(model, state_dict=full, adapter_name=_NAME, save_embedding_layers=False)
    found = tensors_of(adapter / ADAPTER_FILE)
    for key in sorted(wanted.keys() | found.keys()):
        there = found[key].shape if key in found else None
        shape = tuple(wanted[key].shape) if key in wanted else None
        if shape is None or there != shape:
            what = f"{key} of shape {shape} in the adapter" if shape else "no tensor that PEFT has no place for"
            faults.append(MergeError(expected=what, found=f"{key} of shape {there}" if there else "none", fix=_FIX))
    return {key: names.get(id(wanted[key]), "") for key in sorted(wanted.keys() & found.keys())}


def _layer_of(model: Any, inside: str) -> tuple[str | None, str]:
    """The PEFT layer whose merging takes this tensor, and the layer's own name for it; None for a plain replacement."""
    path = inside
    while "." in path:
        path = path.rpartition(".")[0]
        local = inside.removeprefix(f"{path}.")
        if isinstance(model.get_submodule(path), BaseTunerLayer) and local.startswith("lora_"):
            return path, local
    return None, inside


def _bare(inside: str) -> str:
    """The name that a weight inside a PEFT model has in the base."""
    name = inside.removeprefix("base_model.model.")
    for wrapper in (".base_layer.", f".modules_to_save.{_NAME}.", ".original_module."):
        name = name.replace(wrapper, ".")
    return name


def _untie(weights: dict[str, Weight], tied: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether weights that are one in the base differ after merging; if so, each tied one gets a place of its own.

    A head that only shared the embedding's weights keeps those of the base.
    """
    changed = {name for name, weight in weights.items() if weight.adapted}
    if not changed & (tied.keys() | set(tied.values())):
        return False
    for target, source in tied.items():
        if target not in weights and source in weights:
            weights[target] = Weight(target, target, expected[target], weights[source].stored)
    return True
