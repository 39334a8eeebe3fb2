"""Names and plain types of TRL's `SFTConfig`, read from the installed source without importing torch."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

# The classes whose fields make up SFTConfig, base last.
_SOURCES = (
    ("trl", "trl/trainer/sft_config.py", "SFTConfig"),
    ("trl", "trl/trainer/base_config.py", "_BaseConfig"),
    ("transformers", "transformers/training_args.py", "TrainingArguments"),
)

# What a recipe may not set, with the reason shown to the user.
RESERVED = {
    "output_dir": "checkpoints go into the run's own folder",
    "dataset_kwargs": "rows are rendered before the trainer sees them",
    "packing": "batches are grouped by length instead; packing needs variable-length attention",
    "padding_free": "it needs variable-length attention",
    "assistant_only_loss": "the loss is always on the answers alone",
    "completion_only_loss": "the loss is always on the answers alone",
    "remove_unused_columns": "the rendered rows hold only what the model takes",
    "truncation_mode": "text is shortened by data.overlong, so that no answer is lost",
    "trust_remote_code": "code that comes with a model is never run",
    "push_to_hub": "nothing leaves the machine",
    "use_cpu": "the device is base.device",
    "disable_tqdm": "progress is the command line's",
    "logging_nan_inf_filter": "a loss that is not a number must be seen",
    "eval_strategy": "set validation.every",
    "eval_steps": "set validation.every",
    "do_eval": "add a section `validation`",
    "eval_delay": "validation begins with the first epoch",
    "eval_on_start": "the base is measured before training, on the held-out rows",
    "load_best_model_at_end": "add a section `validation`: the best checkpoint is kept and used",
    "metric_for_best_model": "set validation.metric",
    "greater_is_better": "validation.metric says it",
    "restore_callback_states_from_checkpoint": "a resumed run goes on counting validation.patience by itself",
    "per_device_eval_batch_size": "set evaluation.per_device_eval_batch_size",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from",
    "ignore_data_skip": "a resumed run goes on with the rows it would have taken",
    "resume_from_checkpoint": "use ift train --resume RUN",
    "label_smoothing_factor": "set loss.label_smoothing",
    "loss_type": "the loss is described by the section `loss`",
    "model_init_kwargs": "the base is described by the section `base`",
    "chat_template_path": "the chat template belongs to the base's tokenizer",
    "eos_token": "the end token belongs to the chat template",
}

_PLAIN = {"int": int, "float": float, "str": str, "bool": bool}


@lru_cache
def training_fields() -> dict[str, str]:
    """Field name to annotation text, for every init field of the installed `SFTConfig`."""
    fields: dict[str, str] = {}
    for package, path, class_name in reversed(_SOURCES):
        source = Path(str(distribution(package).locate_file(path))).read_text("utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                fields.update(_annotated(node))
    return fields


def _annotated(node: ast.ClassDef) -> dict[str, str]:
    fields = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = ast.unparse(statement.annotation)
            if not annotation.startswith("ClassVar") and "init=False" not in ast.unparse(statement):
                fields[statement.target.id] = annotation
    return fields


def fits(value: object, annotation: str) -> bool:
    """Whether `value` can be what `annotation` says; annotations beyond int, float, str, bool, None accept anything."""
    kinds = [kind.strip().strip("'\"") for kind in annotation.split("|")]
    if not all(kind in _PLAIN or kind == "None" for kind in kinds):
        return True
    for kind in kinds:
        if kind == "None":
            matches = value is None
        elif kind == "float":
            matches = isinstance(value, int | float) and not isinstance(value, bool)
        elif kind == "int":
            matches = isinstance(value, int) and not isinstance(value, bool)
        else:
            matches = isinstance(value, _PLAIN[kind])
        if matches:
            return True
    return False
