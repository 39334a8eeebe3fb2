"""Training rows as token ids in a memory-mapped Arrow file: rendered once, kept by the hash of all that went in.

Rows pass through in pieces, so a set may be larger than memory; what is kept of it in memory is a number for each row.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from ift_peft.data.fit import Fit, Overlong, fit_batches, raise_unfit
from ift_peft.data.render import Rendered, TokenRenderer
from ift_peft.data.row import Row
from ift_peft.environment import version_of
from ift_peft.errors import DiskFull, IftPeftError, first_line, is_full
from ift_peft.sections import Data
from ift_peft.selection import Validation

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "source": Value("int16"),
        "where": Value("string"),
    }
)
_PACKAGES = (
    *("ift_peft", "transformers", "tokenizers", "trl", "rjieba", "numpy"),
    *("scikit-learn", "cleanlab", "datasketch", "ftfy", "phonenumbers", "python-stdnum"),
)


@dataclass(frozen=True)
class RenderedSet:
    """Rendered training rows on disk: `variants` renderings of each row one after another.

    `facts` holds rows, variants, tokens, supervised_tokens, truncated, dropped, sha256 of the ids and labels, and the
    first row's messages, ids and labels as `golden`.
    """

    dataset: Dataset
    facts: dict[str, Any]
    reused: bool
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return int(self.facts["rows"])

    @property
    def variants(self) -> int:
        return int(self.facts["variants"])

    def column(self, name: str) -> NDArray[np.int32]:
        """`length` or `source` of every rendering, shape (rows * variants,)."""
        column = self.dataset.with_format("numpy")[name]
        return np.asarray(column[:] if not isinstance(column, np.ndarray) else column, dtype=np.int32)

    def where(self, rendering: int) -> str:
        """File and line of a rendering's row, without the folders that it lay in when it was rendered."""
        return str(self.dataset[rendering]["where"])

    @property
    def fit(self) -> Fit:
        return Fit(truncated=self.facts["truncated"], dropped=self.facts["dropped"])


def cache_root() -> Path:
    """$IFT_PEFT_CACHE, or ift_peft in the user's cache folder. Everything in it can be deleted at any time."""
    own = os.environ.get("IFT_PEFT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ift_peft"


def content_key(
    data: Data, renderer: TokenRenderer, *, max_length: int | None, variants: int, validation: Validation | None = None
) -> str | None:
    """The sha256 of everything that decides the rendered rows: files, settings, tokenizer, template, code, versions.

    `validation` counts with what says which rows it sets aside. None for rows from the Hub, whose content is not known
    without reading it.
    """
    digest = hashlib.sha256()
    for part, _ in data.by_source():
        for source in (part.train, part.test, data.test):
            files = files_of(source)
            if files is None:
                return None
            for file in files:
                digest.update(file.name.encode() + file_digest(file))
    for path in [Path(name) for name in (data.augment.lexicons if data.augment else ())]:
        digest.update(file_digest(path) if path.is_file() else str(path).encode())
    package = Path(__file__).parent.parent
    for code in (*sorted(Path(__file__).parent.rglob("*")), package / "sections.py", package / "train" / "prepare.py"):
        if code.is_file() and "__pycache__" not in code.parts:
            digest.update(code.read_bytes())
    settings = {
        "data": data.model_dump(mode="json"),
        "versions": {name: version_of(name) for name in _PACKAGES},
        "tokenizer": hashlib.sha256(renderer.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in renderer.tokenizer.special_tokens_map.items()},
        "template": renderer.template_hash,
        "max_length": max_length,
        "variants": variants,
        "set_aside": None if validation is None else (validation.size, validation.seed),
    }
    digest.update(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def files_of(source: str | None) -> list[Path] | None:
    """The files of a source; None for one from the Hub."""
    if source is None:
        return []
    path = Path(source)
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else None


def file_digest(path: Path) -> bytes:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def render_set(
    rows: Callable[[], Iterable[Row]],
    renderer: TokenRenderer,
    *,
    key: str | None,
    variants: int,
    max_length: int | None,
    overlong: Overlong,
    progress: Callable[[int], None] | None = None,
) -> RenderedSet:
    """The renderings of `rows`, which yields `variants` of each row in turn; from the cache where `key` is in it.

    Where the cache cannot be written, or is full, they are made in a temporary folder, with a note. Raises `Faults`
    naming rows that cannot be rendered or do not fit, and `DiskFull` where there is no room in that folder either.
    """

    def write(folder: Path) -> None:
        try:
            facts = _write(
                rows(), renderer, folder, variants=variants, max_length=max_length, overlong=overlong, progress=progress
            )
            (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    if key is None:
        why = "token ids of rows from the Hub are not kept: they are made again in every run"
    else:
        kept = cache_root() / "rendered" / key
        if (kept / "facts.json").is_file():
            return _open(kept, reused=True)
        try:
            _keep(write, kept)
            return _open(kept, reused=False)
        except OSError as error:
            if isinstance(error, IftPeftError):
                raise
            why = f"token ids are not kept, the cache cannot be written ({first_line(error)}); set IFT_PEFT_CACHE"
    return _open(_temporary(write), reused=False, notes=(why,))


def _keep(write: Callable[[Path], None], kept: Path) -> None:
    """Write the folder `kept` of the cache, beside its place first. Raises `OSError`, and leaves nothing then."""
    folder = kept.parent / f".{kept.name[:16]}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    write(folder)
    try:
        folder.rename(kept)
    except OSError:  # another process has just put the same rows there
        shutil.rmtree(folder, ignore_errors=True)
        if not (kept / "facts.json").is_file():
            raise


def _temporary(write: Callable[[Path], None]) -> Path:
    """Write a folder that goes with this process. Raises `DiskFull`."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ift_peft-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        write(folder)
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskFull(
            expected=f"room for the token ids of the training rows in {tempfile.gettempdir()}",
            found=first_line(error),
            fix="make room there or in the cache, or set IFT_PEFT_CACHE or TMPDIR to a folder that has some",
        ) from error
    return folder


def _open(folder: Path, *, reused: bool, notes: tuple[str, ...] = ()) -> RenderedSet:
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    return RenderedSet(Dataset.from_file(str(folder / "rows.arrow")), facts, reused, notes)


def _write(
    rows: Iterable[Row],
    renderer: TokenRenderer,
    folder: Path,
    *,
    variants: int,
    max_length: int | None,
    overlong: Overlong,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    fit, digest = Fit(), hashlib.sha256()
    counts = {"rows": 0, "tokens": 0, "supervised_tokens": 0}
    golden: dict[str, Any] = {}
    seen = 0
    waiting: list[tuple[Row, Rendered] | None] = []
    with ArrowWriter(path=str(folder / "rows.arrow"), features=_FEATURES) as writer:
        for batch in fit_batches(rows, renderer, fit, max_length=max_length, overlong=overlong):
            waiting += batch
            whole = len(waiting) // variants * variants
            groups = [waiting[start : start + variants] for start in range(0, whole, variants)]
            waiting = waiting[whole:]
            seen += len(groups)
            # A row that does not fit in one wording is left out in all, so that every epoch holds the same rows.
            pairs = [pair for group in groups if None not in group for pair in group if pair is not None]
            if pairs:
                golden = golden or _golden(pairs[0])
                _write_pairs(writer, pairs, digest, counts)
            if progress is not None:
                progress(seen)
        if counts["rows"]:
            writer.finalize()
    raise_unfit(fit, rows=seen, kept=counts["rows"], max_length=max_length)
    return {
        **counts,
        "rows": counts["rows"] // variants,
        "variants": variants,
        "truncated": fit.truncated,
        "dropped": fit.dropped,
        "sha256": digest.hexdigest(),
        "golden": golden,
    }


def _golden(pair: tuple[Row, Rendered]) -> dict[str, Any]:
    row, rendered = pair
    return {"messages": list(row.messages), "input_ids": rendered.input_ids, "labels": rendered.labels}


def _write_pairs(writer: ArrowWriter, pairs: list[tuple[Row, Rendered]], digest: Any, counts: dict[str, int]) -> None:
    for _, rendered in pairs:
        digest.update(np.asarray([len(rendered.input_ids), *rendered.input_ids, *rendered.labels], "<i4").tobytes())
        counts["tokens"] += len(rendered.input_ids)
        counts["supervised_tokens"] += rendered.supervised
    counts["rows"] += len(pairs)
    writer.write_batch(
        {
            "input_ids": [rendered.input_ids for _, rendered in pairs],
            "labels": [rendered.labels for _, rendered in pairs],
            "length": [len(rendered.input_ids) for _, rendered in pairs],
            "source": [row.source for row, _ in pairs],
            "where": [row.key for row, _ in pairs],
        }
    )


def to_dataset(rendered: Sequence[Rendered]) -> Dataset:
    """Rendered rows, in memory, as the columns that a trainer reads."""
    return Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rendered], "labels": [row.labels for row in rendered]}
    )
