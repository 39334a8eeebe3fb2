"""What goes into the folder of an export for PEFT, transformers and vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig

from ift_peft.adapters.certificate import as_merge
from ift_peft.adapters.checkpoint import sha256, tensors_of
from ift_peft.adapters.export.cards import (
    LOFTQ,
    MERGED_USE,
    card,
    over_other_weights,
    peft_use,
    vllm_command,
    vllm_rank,
    vllm_use,
)
from ift_peft.adapters.export.gguf_file import Outtype
from ift_peft.adapters.export.template import servable_template
from ift_peft.adapters.merge import merge
from ift_peft.adapters.plan import ADAPTER_FILE
from ift_peft.data.render import Renderer
from ift_peft.errors import ExportError, IftPeftError, raise_all
from ift_peft.infer.load import Parts
from ift_peft.reporter import Reporter

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Building:
    """An export under way: the run, the folder to be filled, a folder for what is not handed out, the weights' type."""

    parts: Parts
    folder: Path
    work: Path
    outtype: Outtype
    reporter: Reporter

    @property
    def name(self) -> str:
        return self.parts.recipe.name


def peft(building: Building) -> dict[str, Any]:
    """The adapter as stock PEFT loads it."""
    _write_peft(building.parts, building.folder)
    (building.folder / "README.md").write_text(card(building.parts, peft_use(building.parts)), "utf-8")
    return {"adapter": "as trained, byte for byte"}


def merged(building: Building) -> dict[str, Any]:
    """Base and adapter as one model, with the certificate of its merge."""
    source = merged_folder(building, dtype=DTYPES[building.outtype])
    shutil.copytree(source, building.folder, dirs_exist_ok=True)
    parts = building.parts
    section = (building.folder / "README.md").read_text("utf-8").partition("\n## Merge\n")[2]
    use = MERGED_USE if parts.recipe.base.head == "causal-lm" else ""
    text = card(parts, f"## Merge\n{section}", use, library="transformers")
    (building.folder / "README.md").write_text(as_merge(text, parts.recipe.adapter.method), "utf-8")
    ends = _set_end(parts, building.folder)
    return {"certificate": "certificate.json", "eos_token_id": ends}


def vllm(building: Building) -> dict[str, Any]:
    """The adapter, and a script that serves it over its base."""
    parts = building.parts
    renderer = renderer_of(parts, "vLLM")
    rank = _check_vllm(parts)
    _write_peft(parts, building.folder / "adapter")
    (building.folder / "adapter" / "chat_template.jinja").write_text(servable_template(renderer), "utf-8")
    (building.folder / "serve.sh").write_text(vllm_command(parts, rank=rank), "utf-8")
    (building.folder / "README.md").write_text(card(parts, vllm_use(parts)), "utf-8")
    for line in over_other_weights(parts):
        building.reporter.note(line)
    building.reporter.note("vLLM itself was not started: its limits are checked, its answers are not")
    return {"max_lora_rank": rank, "started": False}


def merged_folder(building: Building, *, dtype: str) -> Path:
    """A certified merge of this run: the one in RUN/merged where it is whole and of this type, else a new one."""
    parts = building.parts
    found = parts.run.path / "merged"
    if _is_merge_of(found, parts, dtype):
        building.reporter.note(f"taken from the merge in {parts.run.path.name}/merged")
        return found
    folder = building.work / f"merged-{dtype}"
    merge(parts, output=folder, dtype=dtype, reporter=building.reporter)
    return folder


def _is_merge_of(folder: Path, parts: Parts, dtype: str) -> bool:
    if not (folder / "certificate.json").is_file():
        return False
    certificate = json.loads((folder / "certificate.json").read_text("utf-8"))
    written = certificate["written"]
    return (
        (written["dtype"], written["quantization"]) == (dtype, "none")
        and certificate["adapter"]["sha256"] == sha256(parts.run.adapter / ADAPTER_FILE)
        and all((folder / name).is_file() and sha256(folder / name) == of for name, of in written["files"].items())
    )


def _write_peft(parts: Parts, folder: Path) -> None:
    """Adapter and tokenizer, and nothing else of the run's; the base is named as others know it."""
    folder.mkdir(exist_ok=True)
    for name in (ADAPTER_FILE, *TOKENIZER_FILES):
        if (parts.run.adapter / name).is_file():
            shutil.copyfile(parts.run.adapter / name, folder / name)
    config = json.loads((parts.run.adapter / "adapter_config.json").read_text("utf-8"))
    config |= {"base_model_name_or_path": parts.location.public_name, "revision": parts.location.revision}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _check_vllm(parts: Parts) -> int:
    """The --max-lora-rank for the run's adapter. Raises all that vLLM has no support for."""
    config = PeftConfig.from_pretrained(str(parts.run.adapter))
    if config.peft_type.value != "LORA":
        raise _not_for_vllm(f"{config.peft_type.value}, which is no LoRA")
    ranks = max([config.r, *(config.rank_pattern or {}).values()])
    rank = vllm_rank(ranks)
    embeds = any("lora_embedding" in key for key in tensors_of(parts.run.adapter / ADAPTER_FILE))
    model_type = config_of(parts).model_type
    found = {
        LOFTQ: parts.recipe.adapter.method == "loftq",
        "modules_to_save, which it does not load": bool(config.modules_to_save),
        "DoRA, which it does not know": bool(config.use_dora),
        f"bias={config.bias!r}, which it does not load": config.bias != "none" or bool(config.lora_bias),
        "alpha_pattern or rank_pattern, which it scales by the one lora_alpha": bool(
            config.alpha_pattern or config.rank_pattern
        ),
        f"an adapter on the embedding of a {model_type}, which it takes for llama only": embeds
        and model_type not in ("llama", "mistral"),
        f"rank {ranks}, above the {512} it can be started with": rank is None,
    }
    faults: list[IftPeftError] = [_not_for_vllm(what) for what, is_so in found.items() if is_so]
    raise_all(faults)
    assert rank is not None
    return rank


def _not_for_vllm(found: str) -> ExportError:
    return ExportError(
        expected="an adapter that vLLM serves", found=found, fix="serve the merged model: ift export RUN --to merged"
    )


def renderer_of(parts: Parts, who: str) -> Renderer:
    """The renderer of a model that generates. Raises `ExportError` for a classifier, which `who` cannot run."""
    if not isinstance(parts.renderer, Renderer):
        raise ExportError(
            expected=f"a model that generates, for {who}",
            found="a base with a classifier's head",
            fix="export --to peft or merged",
        )
    return parts.renderer


def config_of(parts: Parts) -> Any:
    """The base's configuration."""
    return AutoConfig.from_pretrained(parts.location.folder, trust_remote_code=False, local_files_only=True)


def _set_end(parts: Parts, folder: Path) -> list[int]:
    """Let generation end where training's answers did, beside where the base's did; returns those tokens."""
    if not isinstance(parts.renderer, Renderer):
        return []
    there = (folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(folder) if there else GenerationConfig()
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys([parts.renderer.end_token_id, *(end for end in own if end is not None)]))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None:
        config.pad_token_id = parts.tokenizer.pad_token_id
    config.save_pretrained(folder)
    return ends
