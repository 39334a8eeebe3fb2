"""What goes into the folder of each form of export."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import GenerationConfig

from ift_peft.adapters.checkpoint import sha256
from ift_peft.adapters.export.cards import (
    MERGED_USE,
    about,
    card,
    llama_use,
    ollama_use,
    on_the_hub,
    peft_use,
    vllm_command,
    vllm_rank,
    vllm_use,
)
from ift_peft.adapters.export.gguf_file import Outtype, check_gguf_installed, write_adapter, write_model
from ift_peft.adapters.export.ollama import go_template, modelfile
from ift_peft.adapters.export.proof import available, prove
from ift_peft.adapters.export.template import servable_template
from ift_peft.adapters.export.vocabulary import Vocabulary, vocabulary_of
from ift_peft.adapters.merge import merge
from ift_peft.adapters.plan import ADAPTER_FILE, why_in_memory
from ift_peft.data.render import Renderer
from ift_peft.errors import ExportError, IftPeftError, raise_all
from ift_peft.infer.load import Parts
from ift_peft.model.base import load_base, positions, quiet
from ift_peft.model.tokenizer import BaseLocation
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
UNPROVED = "llama-cpp-python is not installed"


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
    source = _merged(building, dtype=DTYPES[building.outtype])
    shutil.copytree(source, building.folder, dirs_exist_ok=True)
    parts = building.parts
    section = (building.folder / "README.md").read_text("utf-8").partition("\n## Merge\n")[2]
    use = MERGED_USE if parts.recipe.base.head == "causal-lm" else ""
    text = card(parts, f"## Merge\n{section}", use, library="transformers")
    (building.folder / "README.md").write_text(
        text.replace("A LoRA adapter for", "A merge of a LoRA adapter into", 1), "utf-8"
    )
    ends = _set_end(parts, building.folder)
    return {"certificate": "certificate.json", "eos_token_id": ends}


def vllm(building: Building) -> dict[str, Any]:
    """The adapter, and a script that serves it over its base."""
    parts = building.parts
    renderer = _renderer(parts, "vLLM")
    rank = _check_vllm(parts)
    _write_peft(parts, building.folder / "adapter")
    (building.folder / "adapter" / "chat_template.jinja").write_text(servable_template(renderer), "utf-8")
    (building.folder / "serve.sh").write_text(vllm_command(parts, rank=rank), "utf-8")
    (building.folder / "README.md").write_text(card(parts, vllm_use(parts)), "utf-8")
    building.reporter.note("vLLM itself was not started: its limits are checked, its answers are not")
    return {"max_lora_rank": rank, "started": False}


def gguf(building: Building) -> dict[str, Any]:
    """The merged model for llama.cpp, one file with tokenizer and chat template."""
    file, checked = _write_gguf(building)
    (building.folder / "README.md").write_text(_gguf_card(building, llama_use(file), checked), "utf-8")
    return checked


def ollama(building: Building) -> dict[str, Any]:
    """The merged model for Ollama: its file, and a Modelfile."""
    parts = building.parts
    renderer = _renderer(parts, "Ollama")
    template = go_template(renderer)
    file, checked = _write_gguf(building)
    data = parts.recipe.data.for_new_texts[0]
    text = modelfile(
        template,
        gguf=file,
        stop=str(parts.tokenizer.convert_ids_to_tokens(renderer.end_token_id)),
        context=positions(_config_of(parts)) or 4096,
        system=data.system,
        answer_tokens=None,
    )
    (building.folder / "Modelfile").write_text(text, "utf-8")
    use = ollama_use(building.name, tasked=data.instruction is not None)
    (building.folder / "README.md").write_text(_gguf_card(building, use, checked), "utf-8")
    building.reporter.note("Ollama itself was not started: its template was checked against the chat template")
    return {**checked, "ollama_template": "renders probes as the chat template does", "started": False}


def gguf_adapter(building: Building) -> dict[str, Any]:
    """The LoRA for llama.cpp's `--lora`, and the base for it where others cannot get that."""
    parts = building.parts
    vocabulary = _check_gguf(building)
    reason = why_in_memory(parts.location, parts.run.adapter, head=None)
    if reason:
        raise ExportError(
            expected="a plain LoRA, which is all that an adapter file of llama.cpp holds",
            found=reason,
            fix="export the merged model: --to gguf",
        )
    if parts.recipe.base.quantization != "none":
        building.reporter.note(
            f"trained over {parts.recipe.base.quantization} weights; on the unquantised base it answers nearly the same "
            "(ift merge measures how nearly)"
        )
    words, file = about(parts), f"{building.name}-lora-{building.outtype}.gguf"
    how = write_adapter(
        parts, building.folder / file, about=words, outtype=building.outtype, reporter=building.reporter
    )
    base = f"{parts.location.public_name.rpartition('/')[2]}-f32.gguf"
    where = building.work if on_the_hub(parts) else building.folder
    write_model(
        parts.location.folder,
        where / base,
        vocabulary=vocabulary,
        template=servable_template(_renderer(parts, "GGUF")),
        outtype="f32",
        about=replace(words, name=words.base, description=""),
        reporter=building.reporter,
    )
    checked = {**how, "outtype": building.outtype, **_differs(vocabulary)}
    reference = load_base(parts.location, compute_dtype="float32", device="cpu").model
    if available():
        with quiet():
            reference = PeftModel.from_pretrained(reference, parts.run.adapter).eval()
    lora = building.folder / file
    checked |= _prove(building, where / base, reference, vocabulary, building.outtype, lora=lora)
    use = llama_use(base if where == building.folder else "BASE.gguf", adapter=file)
    (building.folder / "README.md").write_text(_gguf_card(building, use, checked), "utf-8")
    return checked


def _write_gguf(building: Building) -> tuple[str, dict[str, Any]]:
    """The merged model as GGUF, proved where llama.cpp is there: its name, and what was found out."""
    parts = building.parts
    vocabulary = _check_gguf(building)
    template = servable_template(_renderer(parts, "GGUF"))
    source = _merged(building, dtype="float32")
    file = f"{building.name}-{building.outtype}.gguf"
    wide = write_model(
        source,
        building.folder / file,
        vocabulary=vocabulary,
        template=template,
        outtype=building.outtype,
        about=about(parts),
        reporter=building.reporter,
    )
    if wide:
        building.reporter.note(f"{len(wide)} weights are float16: q8_0 takes rows of multiples of 32 only")
    checked: dict[str, Any] = {"outtype": building.outtype, "kept_as_f16": wide, **_differs(vocabulary)}
    location = BaseLocation(parts.location.name, source, None)
    reference = load_base(location, compute_dtype="float32", device="cpu").model if available() else None
    return file, checked | _prove(building, building.folder / file, reference, vocabulary, building.outtype)


def _check_gguf(building: Building) -> Vocabulary:
    """The tokenizer as llama.cpp has it. Raises before anything is merged where the run cannot be had as GGUF."""
    from ift_peft.adapters.export.families import family_of

    check_gguf_installed()
    parts = building.parts
    renderer = _renderer(parts, "GGUF")
    config = _config_of(parts)
    family_of(config)
    vocabulary = vocabulary_of(parts.tokenizer, size=config.vocab_size, end_token_id=renderer.end_token_id)
    for text in vocabulary.differs:
        building.reporter.note(f"llama.cpp splits into other tokens: {text}")
    return vocabulary


def _prove(
    building: Building, path: Path, reference: Any, vocabulary: Vocabulary, outtype: str, *, lora: Path | None = None
) -> dict[str, Any]:
    if not available():
        building.reporter.note(
            f"not proved in llama.cpp: {UNPROVED} (pip install 'ift_peft[gguf-proof]', which compiles it)"
        )
        return {"proof": None, "why_no_proof": UNPROVED}
    building.reporter.note("running it in llama.cpp …")
    proof = prove(path, building.parts, reference, vocabulary=vocabulary, outtype=outtype, lora=lora)
    building.reporter.note(proof.describe())
    return {"proof": proof.to_json()}


def _merged(building: Building, *, dtype: str) -> Path:
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
    embeds = any("lora_embedding" in key for key in _keys(parts.run.adapter / ADAPTER_FILE))
    model_type = _config_of(parts).model_type
    found = {
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


def _keys(file: Path) -> list[str]:
    from ift_peft.adapters.checkpoint import tensors_of

    return list(tensors_of(file))


def _renderer(parts: Parts, who: str) -> Renderer:
    if not isinstance(parts.renderer, Renderer):
        raise ExportError(
            expected=f"a model that generates, for {who}",
            found="a base with a classifier's head",
            fix="export --to peft or merged",
        )
    return parts.renderer


def _config_of(parts: Parts) -> Any:
    from transformers import AutoConfig

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


def _differs(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre, "differs_for": list(vocabulary.differs)},
    }


def _gguf_card(building: Building, use: str, checked: dict[str, Any]) -> str:
    proof, differs = checked["proof"], checked["tokenizer"]["differs_for"]
    if proof:
        lines = [
            f"In llama.cpp (llama-cpp-python {proof['llama_cpp_python']}) {proof['prompts_equal']} of "
            f"{proof['prompts']} held-out prompts have the tokens of training, {proof['answers_equal']} of "
            f"{proof['answers']} greedy answers are the model's own token by token, and logits lie at most "
            f"{proof['max_logit_difference']:.2g} apart on {proof['positions']} positions."
        ]
    else:
        lines = ["It was not run in llama.cpp when it was written."]
    lines += [f"llama.cpp splits into other tokens than training: {text}." for text in differs]
    return card(building.parts, use, "## Proof\n\n" + " ".join(lines), library="gguf")


