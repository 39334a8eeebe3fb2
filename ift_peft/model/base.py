"""Loading a base model, quantised or not, on the device at hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ift_peft.errors import ModelError, first_line
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.sections import Base, Head, Quantization

# Model types whose position embeddings begin after `pad_token_id` (create_position_ids_from_input_ids).
COUNTED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# Names of what transformers puts on top of a base to make a classifier of it.
HEAD_NAMES = (
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "pooler",
    "sequence_summary",
    "logits_proj",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ClassHead:
    """What a classifier's head is made with: its classes, the token that pads texts, and the seed of its weights."""

    classes: tuple[str, ...]
    pad_token_id: int
    seed: int

    def settings(self) -> dict[str, Any]:
        """As transformers' configurations have it."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: number for number, name in enumerate(self.classes)},
            "pad_token_id": self.pad_token_id,
        }


@dataclass
class LoadedBase:
    """A base ready for an adapter. `notes` are the choices made for the user that the run must record.

    `made` are the modules that its weights do not have, as a new head: they are trained whole and saved with the
    adapter.
    """

    model: PreTrainedModel
    device: torch.device
    compute_dtype: torch.dtype
    quantization: Quantization
    notes: list[str] = field(default_factory=list)
    made: tuple[str, ...] = ()


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises `ModelError` where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(expected="a CUDA device", found="none", fix="use base.device=auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """float32 on CPU, where it is the fastest that every processor has; bfloat16 on a GPU that has it, else float16."""
    if compute_dtype != "auto":
        return DTYPES[compute_dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(
    location: BaseLocation,
    *,
    quantization: Quantization = "none",
    double_quantization: bool = True,
    compute_dtype: str = "auto",
    device: str = "auto",
    head: ClassHead | None = None,
    packed: bool = False,
) -> LoadedBase:
    """The base in evaluation mode, as a causal language model or with a classifier's `head`.

    On CPU, nf4 and fp4 weights are dequantised once and kept, memory permitting: the numbers are those of the
    quantised base, the speed that of the plain one. Not so where they are to stay `packed`. Raises `ModelError` for
    weights that cannot be loaded.
    """
    place = choose_device(device)
    dtype = choose_dtype(compute_dtype, place)
    notes: list[str] = []
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization != "none":
        settings = _quantization_config(quantization, double_quantization, dtype)
        if head is not None:
            settings.llm_int8_skip_modules = [*HEAD_NAMES]  # a head is trained whole, which packed weights cannot be
        arguments |= {"quantization_config": settings, "device_map": {"": str(place)}}
    made: tuple[str, ...] = ()
    with quiet():
        try:
            model, made = _from_weights(location, head, arguments)
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                expected=f"a base for {'generation' if head is None else 'a classifier'} in {location.folder}",
                found=first_line(error),
                fix="check that its architecture is known to the installed transformers and its weights are complete",
            ) from error
        stacks = sum(one.numel() for one in model.parameters() if one.dim() == 3 and quantization != "none")
        if stacks:
            notes.append(f"{quantization} packs linear modules; {stacks:,} weights of experts stay as they are")
        if place.type == "cpu" and quantization in ("nf4", "fp4") and not packed:
            notes.append(_dequantize_once(model, dtype, quantization))
    if quantization == "none":
        model.to(place)
    model.eval()
    model.name_or_path = str(location.folder)  # PEFT looks here, not on the Hub, for the base's vocabulary size
    return LoadedBase(model, place, dtype, quantization, notes, made)


def _from_weights(
    location: BaseLocation, head: ClassHead | None, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the modules of its head that the weights do not have: drawn by the head's seed, always the same.

    Raises `ModelError` where the weights lack anything else, which transformers would draw at random as well.
    """
    kind = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    if head is not None:
        _check_classes(location, head)
    with torch.random.fork_rng():
        torch.manual_seed(0 if head is None else head.seed)
        model, info = kind.from_pretrained(
            location.folder,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **({} if head is None else head.settings()),
            **arguments,
        )
    lacking = [
        name for name in sorted(info["missing_keys"]) if head is None or not set(HEAD_NAMES) & set(name.split("."))
    ]
    if lacking:
        raise ModelError(
            expected=f"all weights of {type(model).__name__} in {location.folder}",
            found=f"{len(lacking)} missing, as {lacking[0]}",
            fix="give a complete base of that architecture"
            if head
            else "for a BERT base: base.head=sequence-classification",
        )
    if head is not None:
        _in_float32(model)
    return model, tuple(sorted({name.rpartition(".")[0] for name in info["missing_keys"]}))


def _check_classes(location: BaseLocation, head: ClassHead) -> None:
    """Raise where the base brings a head for other classes, or for the same in another order."""
    config = read_config(location)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return
    own = tuple(config.id2label[number] for number in sorted(config.id2label))
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(own))
    if len(own) != len(head.classes) or (not unnamed and own != head.classes):
        raise ModelError(
            expected=f"the classes of the base's own head in data.labels: {', '.join(own)}",
            found=", ".join(head.classes),
            fix="set data.labels to them, in order (a mapping renames stored values), or give a base without a head",
        )


def _in_float32(model: PreTrainedModel) -> None:
    """Make what stands on top of a base float32, as PEFT makes adapters: it is trained, and steps are small."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HEAD_NAMES and any(True for _ in module.parameters()):
            module.float()
            module.register_forward_pre_hook(_in_its_type, with_kwargs=True)


def wide_inside(module: nn.Module, *, outside: torch.dtype) -> None:
    """Make `module` float32 amid others of the type `outside`: what goes in is cast, and what comes out cast back.

    Autocast would do so in training alone; measurements, and a CPU, have none.
    """

    def back(_: nn.Module, __: Any, given: Any) -> Any:
        return _cast(given, outside)

    module.float()
    module.register_forward_pre_hook(_in_its_type, with_kwargs=True)
    module.register_forward_hook(back)


def _in_its_type(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(module.parameters()).dtype
    return _cast(arguments, dtype), _cast(named, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Every tensor of floats in `values` in this type; what else is in there as it is."""
    return recursively_apply(lambda one: one.to(dtype) if one.is_floating_point() else one, values)


def load_section(
    location: BaseLocation,
    section: Base,
    *,
    quantization: Quantization | None = None,
    compute_dtype: str | None = None,
    head: ClassHead | None = None,
) -> LoadedBase:
    """`load_base` as the recipe's section says; `quantization` and `compute_dtype` replace the section's."""
    return load_base(
        location,
        quantization=quantization or section.quantization,
        double_quantization=section.double_quantization,
        compute_dtype=compute_dtype or section.compute_dtype,
        device=section.device,
        head=head,
    )


def _quantization_config(quantization: Quantization, double: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def _dequantize_once(model: PreTrainedModel, dtype: torch.dtype, quantization: str) -> str:
    from bitsandbytes.nn import Linear4bit

    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = sum(module.in_features * module.out_features for module in quantised) * dtype.itemsize
    available = psutil.virtual_memory().available
    if 2 * needed > available:
        return (
            f"{quantization} weights stay packed and are dequantised in every step, which is slow on CPU: "
            f"unpacked they take {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
        )
    model.dequantize(dtype=dtype)
    model.config.dtype = dtype
    model.is_loaded_in_4bit = False  # transformers leaves it set, and TRL would then round the adapter to bfloat16
    name = str(dtype).removeprefix("torch.")
    return f"{quantization} weights dequantised once to {name}: same numbers, no unpacking in every step"


def positions(config: Any) -> int | None:
    """How many tokens a base can take, None where nothing limits them.

    Bases like RoBERTa count positions from after the number of their padding token, so that their table is longer.
    """
    config = config.get_text_config()  # of a base that also sees or hears, the part that reads
    table = getattr(config, "max_position_embeddings", None)
    if not table or table < 0:
        return None
    return int(table) - (int(config.pad_token_id) + 1 if config.model_type in COUNTED_FROM_PADDING else 0)


def dequantize(loaded: LoadedBase) -> PreTrainedModel:
    """The weights of a quantised base as plain float32, unpacked by bitsandbytes, on any device."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model = loaded.model
    with quiet():
        if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
            model.dequantize(dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    model.config.dtype = torch.float32
    _transpose_back(model)
    return model


def _transpose_back(model: PreTrainedModel) -> None:
    """Make Conv1D again of what bitsandbytes made linear modules of, so that the model is stored as its base is."""
    with torch.device("meta"):
        bare = type(model)(model.config)
    for name, module in bare.named_modules():
        linear = model.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(linear, nn.Linear):
            again = Conv1D(linear.out_features, linear.in_features)
            again.weight, again.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
            model.set_submodule(name, again)


def read_config(location: BaseLocation, **settings: Any) -> Any:
    """The base's configuration, with `settings` in the place of its own. Raises `ModelError`; runs none of its code."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                location.folder, trust_remote_code=False, local_files_only=True, **settings
            )
    except Exception as error:  # what stands in the file is for any class of transformers to fail on
        raise ModelError(
            expected=f"the configuration of a base in {location.folder}",
            found=f"{first_line(error):.300}",
            fix="choose a base that the installed transformers knows without code of its own",
        ) from error


def skeleton(
    location: BaseLocation, head: Head = "causal-lm", *, settings: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The base's modules without weights (on the meta device): enough to check what an adapter would match.

    `settings` replace those of its configuration, as those of a `ClassHead`.
    """
    kind = AutoModelForCausalLM if head == "causal-lm" else AutoModelForSequenceClassification
    with quiet():
        try:
            config = read_config(location, **(settings or {}))
            with torch.device("meta"):
                return kind.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                expected=f"the config of a base for {head} in {location.folder}",
                found=first_line(error),
                fix=f"choose a base that transformers' {kind.__name__} knows",
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
            # PEFT puts the whole embedding into checkpoints of an adapter on it; the final adapter goes without.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            # An adapter on a tied embedding: merging unties it (adapters/merge.py).
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            # PEFT sets it right by itself, for each module.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT's own patterns, for experts: it looks for them among modules, where they are among parameters.
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys .*gate_up_proj")
            # A merged model quantised again says how; load_base says the same.
            warnings.filterwarnings("ignore", message="You passed `quantization_config` or equivalent")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
