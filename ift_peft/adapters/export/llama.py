"""Exports for llama.cpp and for Ollama, which runs it: a merged model, or an adapter, as GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ift_peft.adapters.export.building import Building, config_of, merged_folder, renderer_of
from ift_peft.adapters.export.cards import LOFTQ, about, card, llama_use, ollama_use, on_the_hub, over_other_weights
from ift_peft.adapters.export.families import family_of
from ift_peft.adapters.export.gguf_file import check_gguf_installed, write_adapter, write_model
from ift_peft.adapters.export.ollama import go_template, modelfile
from ift_peft.adapters.export.proof import available, prove
from ift_peft.adapters.export.template import servable_template
from ift_peft.adapters.export.vocabulary import Vocabulary, vocabulary_of
from ift_peft.adapters.plan import why_in_memory
from ift_peft.errors import ExportError
from ift_peft.infer.load import load_model
from ift_peft.model.base import load_base
from ift_peft.model.configuration import positions
from ift_peft.model.tokenizer import BaseLocation

UNPROVED = "llama-cpp-python is not installed"


def gguf(building: Building) -> dict[str, Any]:
    """The merged model for llama.cpp, one file with tokenizer and chat template."""
    file, checked = _write_gguf(building)
    (building.folder / "README.md").write_text(_gguf_card(building, llama_use(file), checked), "utf-8")
    return checked


def ollama(building: Building) -> dict[str, Any]:
    """The merged model for Ollama: its file, and a Modelfile."""
    parts = building.parts
    renderer = renderer_of(parts, "Ollama")
    template = go_template(renderer)
    file, checked = _write_gguf(building)
    data = parts.recipe.data.for_new_texts[0]
    text = modelfile(
        template,
        gguf=file,
        stop=str(parts.tokenizer.convert_ids_to_tokens(renderer.end_token_id)),
        context=positions(config_of(parts)) or 4096,
        system=data.system,
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
    if parts.recipe.adapter.method == "loftq":
        raise ExportError(
            expected="an adapter for the base as it is, on which llama.cpp lays it",
            found=LOFTQ,
            fix="export the merged model: --to merged or gguf",
        )
    for line in over_other_weights(parts):
        building.reporter.note(line)
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
        template=servable_template(renderer_of(parts, "GGUF")),
        outtype="f32",
        about=replace(words, name=words.base, description=""),
        reporter=building.reporter,
    )
    checked = {**how, "outtype": building.outtype, **_differs(vocabulary)}
    reference = load_model(parts, quantization="none", compute_dtype="float32")[0] if available() else None
    lora = building.folder / file
    checked |= _prove(building, where / base, reference, vocabulary, building.outtype, lora=lora)
    use = "\n\n".join(
        (llama_use(base if where == building.folder else "BASE.gguf", adapter=file), *over_other_weights(parts))
    )
    (building.folder / "README.md").write_text(_gguf_card(building, use, checked), "utf-8")
    return checked


def _write_gguf(building: Building) -> tuple[str, dict[str, Any]]:
    """The merged model as GGUF, proved where llama.cpp is there: its name, and what was found out."""
    parts = building.parts
    vocabulary = _check_gguf(building)
    template = servable_template(renderer_of(parts, "GGUF"))
    source = merged_folder(building, dtype="float32")
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
    check_gguf_installed()
    parts = building.parts
    renderer = renderer_of(parts, "GGUF")
    config = config_of(parts)
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
