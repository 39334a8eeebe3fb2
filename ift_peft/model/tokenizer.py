"""Where a base is, and its tokenizer. Nothing here loads weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ift_peft.errors import ModelError, first_line
from ift_peft.plain_files import home_of, read_text

TINY = Path(__file__).resolve().parent / "tiny"
_SAMPLES = 16  # places read in each weight file for the fingerprint
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseLocation:
    """A base model on disk: the name the user gave it, the folder it is in, and the Hub revision, if any."""

    name: str
    folder: Path
    revision: str | None

    @property
    def public_name(self) -> str:
        """What may be written into files that are handed out: never a path of this machine."""
        return self.folder.name if Path(self.name).is_absolute() or self.name.startswith((".", "~")) else self.name

    def fingerprint(self) -> str:
        """sha256 over config.json and, for every weight file, its name, size and 16 MiB spread over it."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(self.folder.glob("*.safetensors")):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            for sample in _samples(path):
                digest.update(sample)
        return digest.hexdigest()

    def files(self) -> dict[str, dict[str, Any]]:
        """What the fingerprint covers, file by file: `bytes`, and the sha256 of what is read of it."""
        found = {}
        for path in (self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))):
            digest = hashlib.sha256()
            for sample in _samples(path):
                digest.update(sample)
            found[path.name] = {"bytes": path.stat().st_size, "sampled_sha256": digest.hexdigest()}
        return found

    def config(self) -> dict[str, Any]:
        """config.json, without what names places on the machine that wrote it (`_name_or_path`)."""
        content = json.loads((self.folder / "config.json").read_text("utf-8"))
        return {key: value for key, value in content.items() if not key.startswith("_")}


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)))
            yield file.read(_SAMPLE_BYTES)


def locate_base(model: str, *, revision: str | None = None) -> BaseLocation:
    """The folder of `tiny`, of a local path, or of a Hub id (from the cache, else downloaded).

    Raises `ModelError` for a base that is nowhere, and for one without config or safetensors weights.
    """
    if model == "tiny":
        return BaseLocation(model, TINY, None)
    folder = home_of(model)
    if not folder.is_dir():
        folder = _download(model, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(
            expected=f"config.json in {folder}", found="none", fix="give the folder that save_pretrained wrote"
        )
    if not list(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise ModelError(
            expected=f"safetensors weights in {folder}",
            found=f"only pickled ones ({', '.join(others)}), which can run code" if others else "no weights",
            fix="convert them where you trust them: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    _check_index(folder)
    return BaseLocation(model, folder, revision)


def _check_index(folder: Path) -> None:
    """Raises `ModelError` where the index of a base names shards that are not files of the base's own folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(read_text(index))["weight_map"].values())
        wrong = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        names, wrong = set(), [first_line(error)]
    if wrong or not names:
        raise ModelError(
            expected=f"plain names of files of safetensors in {index}",
            found=f"{(wrong or ['none'])[0]:.200}",
            fix="download the base again, or write it with save_pretrained",
        )


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
    reason = "nothing in the Hub cache"
    for local_only in (True, False):
        try:
            folder = Path(
                snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local_only)
            )
            if not local_only or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
                return folder
        except Exception as error:  # the hub client raises many unrelated types; the last is told
            reason = first_line(error)
    raise ModelError(
        expected="base.model to be tiny, a folder in Hugging Face format, or a Hub id, cached or downloadable",
        found=f"{model!r} ({reason})",
        fix="check the spelling and the network, or use base.model=tiny",
    )


def require_known_tokens(ids: Sequence[int], location: BaseLocation, tokenizer: Any, *, where: str) -> None:
    """Raises `ModelError` for a token that the tokenizer has and the base no row of its embedding for.

    Some published bases have such tokens, for images; none of them may stand in a text.
    """
    config = location.config()
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    unknown = max(ids, default=0)
    if isinstance(rows, int) and unknown >= rows:
        raise ModelError(
            expected=f"tokens below {rows:,}, the rows of its embedding, from the tokenizer of {location.folder}",
            found=f"{tokenizer.convert_ids_to_tokens([unknown])[0]!r} ({unknown:,}) in {where}",
            fix="take the token out of tokenizer.json or out of the text, or give a base with a row for it",
        )


def load_tokenizer(location: BaseLocation) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises `ModelError` where it cannot be loaded without running code of its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself, transformers what its files lead to
        raise ModelError(
            expected=f"a tokenizer in {location.folder}",
            found=f"{first_line(error):.300}",
            fix="give a folder with tokenizer.json and tokenizer_config.json",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer without a pad token the end token for padding; returns what was done, for the run's record.

    Labels never depend on it: they are made before padding, and padded positions are masked by position.
    """
    if tokenizer.pad_token is not None:
        return None
    if tokenizer.eos_token is None:
        raise ModelError(
            expected="a pad token or an end-of-sequence token", found="neither", fix="set one in tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token
    return f"the tokenizer has no pad token; {tokenizer.eos_token!r} pads instead (masked, so never learnt)"
