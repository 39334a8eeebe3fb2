"""Model families that are written as GGUF: those whose conversion is proved against llama.cpp (docs/export.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ift_peft.errors import ExportError, IftPeftError, raise_all

# transformers' model_type: llama.cpp's architecture, and whether its rotary embedding pairs neighbours.
_FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
KNOWN = ", ".join(_FAMILIES)


@dataclass(frozen=True)
class Family:
    """A base's configuration as llama.cpp has it."""

    config: Any
    architecture: str
    neighbours: bool

    @cached_property
    def names(self) -> Any:
        """gguf's map from names of weights in transformers to those in GGUF files."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        return get_tensor_name_map(arch, self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        given = getattr(self.config, "head_dim", None)
        return int(given or self.config.hidden_size // self.config.num_attention_heads)

    def name_of(self, key: str) -> str:
        """The GGUF name of a weight or bias. Raises `ExportError` for one that the family does not have."""
        name = self.names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                expected=f"weights of {self.architecture} as llama.cpp has them",
                found=key,
                fix="export --to merged, and use the model with transformers or vLLM",
            )
        return str(name)

    def arranged(self, key: str, rows: Tensor) -> Tensor:
        """A weight, a bias or a LoRA B with rows in llama.cpp's order: query and key heads interleave their halves.

        transformers rotates the first half of a head against the second, llama.cpp's llama neighbour against neighbour.
        """
        kind = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if not self.neighbours or kind not in ("q_proj", "k_proj"):
            return rows
        config = self.config
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def write_settings(self, writer: Any) -> None:
        """The architecture's numbers into a GGUF header."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_vocab_size(config.vocab_size)

    def rope_factors(self) -> Tensor | None:
        """What divides each rotary frequency, (head_dim / 2,); None where nothing does (Llama 3.1 scales them)."""
        if self.config.rope_parameters["rope_type"] == "default":
            return None
        scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))[0]
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        plain: Tensor = 1.0 / float(self.config.rope_parameters["rope_theta"]) ** powers
        return plain / scaled


def family_of(config: Any) -> Family:
    """The family of a configuration. Raises `ExportError` for one that is not known, or a setting that is not."""
    known = _FAMILIES.get(config.model_type)
    if known is None:
        raise ExportError(
            expected=f"a base of a family whose conversion to GGUF is proved: {KNOWN}",
            found=config.model_type,
            fix="export --to merged, and convert it by llama.cpp's own scripts",
        )
    found = _differing(config)
    faults: list[IftPeftError] = [
        ExportError(
            expected=f"a {config.model_type} base with {name} of {' or '.join(map(repr, wanted))} for GGUF",
            found=repr(value),
            fix="export --to merged, and convert it by llama.cpp's own scripts",
        )
        for name, (value, wanted) in found.items()
        if value not in wanted
    ]
    raise_all(faults)
    return Family(config, *known)


def _differing(config: Any) -> Mapping[str, tuple[Any, tuple[Any, ...]]]:
    """Settings with what they are and what they may be."""
    rope = config.rope_parameters or {}
    sliding = config.sliding_window if getattr(config, "use_sliding_window", config.model_type == "mistral") else None
    return {
        "hidden_act": (config.hidden_act, ("silu",)),
        "rope_type": (rope.get("rope_type"), ("default", "llama3")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "sliding_window": (sliding, (None,)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
    }
