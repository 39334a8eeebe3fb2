"""GGUF files, written by llama.cpp's library `gguf`: a model with tokenizer and chat template, or an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ift_peft.adapters.checkpoint import reading, stored_tensors
from ift_peft.adapters.export.families import family_of
from ift_peft.adapters.export.vocabulary import Vocabulary
from ift_peft.adapters.plan import ADAPTER_FILE, plan_merge
from ift_peft.errors import ExportError
from ift_peft.infer.load import Parts
from ift_peft.reporter import Reporter

Outtype = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class About:
    """What a file says of itself; nothing that is not public."""

    name: str
    description: str
    base: str
    revision: str | None
    licence: str | None
    finetune: str


def check_gguf_installed() -> None:
    """Raise `ExportError` with the command to type where the library is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ExportError(
            expected="the library gguf", found="not installed", fix="pip install 'ift_peft[gguf]'"
        ) from None


def write_model(
    folder: Path,
    path: Path,
    *,
    vocabulary: Vocabulary,
    template: str,
    outtype: Outtype,
    about: About,
    reporter: Reporter,
) -> list[str]:
    """Write the model in `folder` (float32, as transformers has it) to `path`; returns the weights kept as float16.

    Matrices are stored as `outtype`, vectors as float32. Weights whose rows q8_0 cannot cut into blocks of 32 become
    float16. One weight is held at a time. Raises `ExportError` for a family that is not known.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter

    family = family_of(_config(folder))
    stored = stored_tensors(folder)
    factors = family.rope_factors()
    kinds: dict[str, tuple[Kind, Callable[[], Tensor]]] = {}
    wide: list[str] = []
    writer = GGUFWriter(None, family.architecture)
    _describe(writer, about, "model")
    writer.add_file_type(_file_type(outtype))
    family.write_settings(writer)
    _write_vocabulary(writer, vocabulary, template)
    with reading() as read:

        def source(key: str) -> Callable[[], Tensor]:
            one = stored[key]
            return lambda: family.arranged(key, read(one.file, one.key).float())

        if factors is not None:
            kinds["rope_freqs.weight"] = (Kind.F32, lambda: factors)
            _announce(writer, "rope_freqs.weight", tuple(factors.shape), Kind.F32)
        for key, one in stored.items():
            name = family.name_of(key)
            kind = Kind.F32 if len(one.shape) < 2 else Kind[outtype.upper()]
            if kind is Kind.Q8_0 and one.shape[-1] % 32:
                kind = Kind.F16
                wide.append(name)
            kinds[name] = (kind, source(key))
            _announce(writer, name, one.shape, kind)
        _write(writer, path, kinds, reporter)
    return wide


def write_adapter(parts: Parts, path: Path, *, about: About, outtype: Outtype, reporter: Reporter) -> dict[str, Any]:
    """Write the run's LoRA for llama.cpp's `--lora`; returns what was folded into it.

    A file has one `alpha` and scales each pair by alpha / rank: what PEFT scales otherwise (rsLoRA, alpha and rank
    patterns) is multiplied into B, exactly. Raises `ExportError` for what such a file cannot hold.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter

    plan = plan_merge(parts.location, parts.run.adapter, head=None)
    family = family_of(plan.model.get_base_model().config)
    alpha = float(plan.model.peft_config["default"].lora_alpha)
    kind = Kind[outtype.upper()]
    writer = GGUFWriter(None, family.architecture)
    _describe(writer, about, "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    kinds: dict[str, tuple[Kind, Callable[[], Tensor]]] = {}
    folded = 0
    with reading() as read:
        for weight in plan.weights:
            if not weight.adapted:
                continue
            names = {local.split(".")[0]: key for local, key in weight.tensors.items()}
            _check_pair(weight.name, names, untied=plan.untied)
            embedding = "lora_embedding_A" in names
            a, b = (read(parts.run.adapter / ADAPTER_FILE, names[name]).float() for name in sorted(names))
            scaling = float(plan.model.get_submodule(weight.layer).scaling["default"])
            factor = scaling * a.shape[0] / alpha
            folded += factor != 1.0
            name = family.name_of(weight.name)
            for suffix, tensor in (
                ("lora_a", a.T.contiguous() if embedding else a),
                ("lora_b", family.arranged(weight.name, b * factor)),
            ):
                kinds[f"{name}.{suffix}"] = (kind, partial(torch.clone, tensor))
                _announce(writer, f"{name}.{suffix}", tuple(tensor.shape), kind)
        _write(writer, path, kinds, reporter)
    return {"alpha": alpha, "pairs": len(kinds) // 2, "pairs_with_scaling_folded_into_b": folded}


def _check_pair(name: str, tensors: Mapping[str, str], *, untied: bool) -> None:
    pairs = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
    if set(tensors) not in pairs:
        what = ", ".join(tensors) or "the whole weight"
        found, why = f"{what} for {name}", "a plain A and B for each weight"
    elif "lora_embedding_A" in tensors and untied:
        found, why = f"an adapter on {name}, which is the head's as well", "no adapter on a tied embedding"
    else:
        return
    raise ExportError(
        expected=f"{why}, which is all that an adapter file of llama.cpp holds",
        found=found,
        fix="export the merged model: --to gguf",
    )


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _file_type(outtype: Outtype) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType.ALL_F32 if outtype == "f32" else LlamaFileType[f"MOSTLY_{outtype.upper()}"])


def _describe(writer: Any, about: About, kind: str) -> None:
    writer.add_type(kind)
    writer.add_name(about.name)
    writer.add_finetune(about.finetune)
    if about.description:
        writer.add_description(about.description)
    if about.licence:
        writer.add_license(about.licence)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, about.base)
    if about.revision:
        writer.add_base_model_version(0, about.revision)
    writer.add_quantization_version(2)  # ggml's GGML_QNT_VERSION


def _write_vocabulary(writer: Any, vocabulary: Vocabulary, template: str) -> None:
    """No token is put before or after a text: the chat template writes all that training saw."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    from gguf.quants import quant_shape_to_byte_shape

    stored = quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def _write(
    writer: Any, path: Path, tensors: Mapping[str, tuple[Any, Callable[[], Tensor]]], reporter: Reporter
) -> None:
    from gguf.quants import quantize

    with _closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        reporter.stage(f"writing {path.name}", len(tensors))
        for done, (name, (kind, tensor)) in enumerate(tensors.items(), 1):
            whole = tensor()
            if not torch.isfinite(whole).all():
                raise ExportError(expected=f"finite weights {name}", found="infinite ones, or none", fix="train again")
            if kind.name == "F16" and float(whole.abs().max()) > torch.finfo(torch.float16).max:
                raise ExportError(
                    expected=f"weights {name} that float16 can hold",
                    found=f"as large as {float(whole.abs().max()):.3g}",
                    fix="--outtype bf16 or f32",
                )
            writer.write_tensor_data(quantize(whole.contiguous().numpy(), kind))
            reporter.advance(done)
        reporter.finish()


@contextmanager
def _closing(writer: Any) -> Iterator[None]:
    try:
        yield
    finally:
        writer.close()
