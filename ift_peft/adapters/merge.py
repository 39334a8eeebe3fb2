"""An adapter merged into its base, and the proof, after reloading from disk, that nothing changed on the way."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from ift_peft.adapters.bounds import BOUND, check_bound, check_labels, check_metric
from ift_peft.adapters.certificate import NAMES, Candidate, Onto, Prefer, choose, write_certificate
from ift_peft.adapters.checkpoint import default_shard_size, recast
from ift_peft.adapters.fidelity import Answered, agreement, answer, change, diverge, score
from ift_peft.adapters.in_memory import write_in_memory
from ift_peft.adapters.plan import check_tensors, plan_merge, why_in_memory
from ift_peft.adapters.shards import write_merged
from ift_peft.adapters.weights import Probed, check_weights, probe_weights
from ift_peft.data.fit import Fitted
from ift_peft.durable import scratch_beside
from ift_peft.errors import MergeError, ModelError
from ift_peft.evaluate.intervals import Estimate
from ift_peft.infer.load import Parts, class_head, held_out_rows, load_model
from ift_peft.model.base import DTYPES, LoadedBase, load_base, load_section
from ift_peft.model.heads import ClassHead
from ift_peft.model.quantization import dequantize
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.reporter import Reporter
from ift_peft.sections import Quantization


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, what was measured of each candidate on the run's held-out rows, and which was written.

    `run_metric` is accuracy or loss (`metric`) of the run as it was trained. `same_labels` and `max_logit_difference`
    are of the written model against the adapter on the weights that it was merged into.
    """

    folder: Path
    metric: str
    run_metric: Estimate
    written: Candidate
    candidates: tuple[Candidate, ...]
    same_labels: int | None

    @property
    def rows(self) -> int:
        return len(self.written.answered.tokens)

    @property
    def dtype(self) -> str:
        return self.written.dtype

    @property
    def max_logit_difference(self) -> float:
        return self.written.max_logit_difference


def merge(
    parts: Parts,
    *,
    output: Path,
    dtype: str,
    reporter: Reporter,
    prefer: Prefer = "fidelity",
    quantize: Literal["nf4"] | None = None,
    max_shard_size: int | str | None = None,
) -> MergeResult:
    """Merge the run's adapter into its base and write it to `output` with its certificate, whole or not at all.

    Of a run over a quantised base the dequantised and the unquantised weights are both merged into and measured, and
    `prefer` decides which is written; loftq's adapter, which makes up for what quantisation took, would bring that to
    the unquantised ones a second time, and is merged into the dequantised alone. With `quantize` it is quantised again.
    Shards are at most `max_shard_size` bytes of float32; by default as large as the base's, or 5 GB.

    Raises `MergeError` where `output` exists; where a merged model, reloaded, differs from the adapter over the same
    weights by more than the bound; and where the one to be written is certainly worse at the task than the run.
    `Faults` of all tensors of base and adapter that do not fit together come before anything is written.
    """
    if output.exists():
        raise MergeError(expected=f"no {output} yet", found="it exists", fix="remove it, or give another --output")
    head = class_head(parts.recipe, parts.tokenizer)
    reason = why_in_memory(parts.location, parts.run.adapter, head=head)
    if reason:
        reporter.note(f"merged in memory by PEFT, not shard by shard: {reason}")
        check_tensors(parts.location, parts.run.adapter, head=head)
    else:
        plan_merge(parts.location, parts.run.adapter, head=head)
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(output) as scratch:
        size = default_shard_size(parts.location.folder) if max_shard_size is None else max_shard_size
        merging = _Merging(parts, held_out_rows(parts), scratch, dtype, quantize, size, reason is not None, reporter)
        result = merging.result(output, prefer)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(parts.run.adapter, trust_remote_code=False, local_files_only=True)
            tokenizer.save_pretrained(result.written.folder)
        for path in result.written.folder.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
        os.replace(result.written.folder, output)
    return result


@dataclass
class _Merging:
    parts: Parts
    held_out: Fitted
    scratch: Path
    dtype: str
    quantize: Literal["nf4"] | None
    max_shard_size: int | str
    in_memory: bool
    reporter: Reporter
    untied: bool = False
    left_out: tuple[str, ...] = ()
    weights_checked: int = 0

    def result(self, output: Path, prefer: Prefer) -> MergeResult:
        """Every candidate made and measured, the one to be written chosen, checked and certified."""
        parts, quantised = self.parts, self.parts.recipe.base.quantization != "none"
        metric = "accuracy" if parts.labels else "loss"
        run: Answered | None = None
        bases: list[tuple[Onto, BaseLocation]] = []
        if quantised:
            run = self._answer(load_model(parts)[0], f"adapter on {parts.recipe.base.quantization} base")
            bases.append(("dequantized", self._store_dequantized()))
        if parts.recipe.adapter.method != "loftq":
            bases.append(("unquantized", parts.location))
        references, candidates = {}, []
        for onto, location in bases:
            model, _ = load_model(replace(parts, location=location), quantization="none", compute_dtype="float32")
            references[onto] = self._answer(model, f"adapter on {NAMES[onto]} base")
            weights = probe_weights(model)
            del model
            run = run or references[onto]
            candidates += self._candidates(onto, location, references[onto], run, weights)
        assert run is not None
        writable = candidates if self.quantize is None else [one for one in candidates if one.quantization != "none"]
        written = choose(writable, prefer=prefer, metric=metric)
        run_metric = score(parts, self.held_out.rows, run)
        check_metric(written, run_metric, metric)
        how = {"shard_by_shard": not self.in_memory, "untied": self.untied, "left_out": list(self.left_out)}
        how["weights_checked"] = self.weights_checked
        write_certificate(parts, written, candidates, run_metric=run_metric, metric=metric, prefer=prefer, how=how)
        same = agreement(references[written.onto], written.answered)
        return MergeResult(output, metric, run_metric, written, tuple(candidates), same)

    def _candidates(
        self, onto: Onto, location: BaseLocation, reference: Answered, run: Answered, weights: dict[str, Probed]
    ) -> list[Candidate]:
        """The model merged into the weights at `location`, and that model quantised again where it is asked for.

        It is merged, written, reloaded and compared in float32 first, where a difference can only be a fault, and
        rounded to its type then. Each of its weights must be what `weights` say of the adapter on the base.
        """
        exact = self.scratch / onto / "float32"
        self._write(location, exact)
        answered, probed = self._reloaded(exact, f"model merged into {NAMES[onto]} base")
        difference = diverge(reference, answered).max_logit_difference
        check_bound(difference, BOUND["float32"], f"the merged model ({NAMES[onto]} base)", len(answered.tokens))
        self.weights_checked = check_weights(weights, probed, dtype="float32", what="the merged model")
        check_labels(reference, answered)
        folder = exact
        if self.dtype != "float32":
            folder = self.scratch / onto / self.dtype
            shutil.copytree(exact, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
            recast(exact, folder, dtype=DTYPES[self.dtype])
            _set_dtype(folder, self.dtype)
            shutil.rmtree(exact)
            answered, probed = self._reloaded(folder, f"model merged into {NAMES[onto]} base, {self.dtype}")
            difference = diverge(reference, answered).max_logit_difference
            check_bound(difference, BOUND[self.dtype], f"the merged {self.dtype} model", len(answered.tokens))
            check_weights(weights, probed, dtype=self.dtype, what=f"the merged {self.dtype} model")
        found = [self._candidate(onto, "none", folder, answered, run, difference, BOUND[self.dtype])]
        if self.quantize is not None:
            found.append(self._quantized(onto, folder, run))
        return found

    def _quantized(self, onto: Onto, source: Path, run: Answered) -> Candidate:
        """The merged model in `source` packed by bitsandbytes; it must come back from disk as it was in memory."""
        location = BaseLocation(self.parts.location.name, source, None)
        target = self.scratch / onto / "nf4"
        packed = self._load(location, "nf4", packed=True)
        with quiet():
            packed.model.save_pretrained(target, max_shard_size=self.max_shard_size)
        before = self._answer(dequantize(packed.model), f"{NAMES[onto]}, merged, quantised to nf4 in memory")
        del packed
        reloaded = self._load(replace(location, folder=target), "nf4", packed=True)
        after = self._answer(dequantize(reloaded.model), f"{NAMES[onto]}, merged, quantised to nf4, reloaded")
        difference = diverge(before, after).max_logit_difference
        check_bound(difference, BOUND["float32"], "the nf4 model", len(after.tokens))
        return self._candidate(onto, "nf4", target, after, run, difference, BOUND["float32"])

    def _candidate(
        self,
        onto: Onto,
        quantization: Literal["none", "nf4"],
        folder: Path,
        answered: Answered,
        run: Answered,
        difference: float,
        bound: float,
    ) -> Candidate:
        rows = self.held_out.rows
        return Candidate(
            onto,
            quantization,
            self.dtype,
            folder,
            answered,
            diverge(run, answered),
            difference,
            bound,
            agreement(run, answered),
            score(self.parts, rows, answered),
            change(self.parts, rows, run, answered),
        )

    def _store_dequantized(self) -> BaseLocation:
        """The weights that the adapter was trained over, as a base on disk."""
        folder = self.scratch / "base"
        base = load_section(self.parts.location, self.parts.recipe.base, head=self._head)
        with quiet():
            dequantize(base.model).save_pretrained(folder, max_shard_size=self.max_shard_size)
        return replace(self.parts.location, folder=folder)

    def _write(self, location: BaseLocation, folder: Path) -> None:
        folder.mkdir(parents=True)
        if self.in_memory:
            with quiet():
                write_in_memory(replace(self.parts, location=location), folder, self.max_shard_size)
            return
        plan = plan_merge(location, self.parts.run.adapter, head=self._head)
        self.untied, self.left_out = plan.untied, plan.left_out
        if plan.left_out and location == self.parts.location:
            self.reporter.note(f"{len(plan.left_out)} weights that the model has no place for are left out")
        self.reporter.stage("merging", len(plan.weights))
        write_merged(
            plan,
            folder,
            base=location.folder,
            adapter=self.parts.run.adapter,
            max_shard_size=self.max_shard_size,
            progress=lambda done, total: self.reporter.advance(done),
        )
        self.reporter.finish()

    def _reloaded(self, folder: Path, who: str) -> tuple[Answered, dict[str, Probed]]:
        """What the model in `folder`, as stock transformers loads it in float32, makes of the rows; and its weights."""
        model = self._load(BaseLocation(self.parts.location.name, folder, None), "none").model
        return self._answer(model, who), probe_weights(model)

    def _load(self, location: BaseLocation, quantization: Quantization, *, packed: bool = False) -> LoadedBase:
        section = self.parts.recipe.base
        try:
            loaded = load_base(
                location,
                quantization=quantization,
                double_quantization=section.double_quantization,
                compute_dtype=self.dtype if packed else "float32",
                device=section.device,
                head=self._head,
                packed=packed,
            )
        except ModelError as error:
            raise MergeError(expected=error.expected, found=error.found, fix="nothing was written") from error
        if loaded.made:
            raise MergeError(
                expected="a merged model with all its weights",
                found=f"none for {', '.join(loaded.made)}",
                fix="train again; nothing was written",
            )
        return loaded

    @property
    def _head(self) -> ClassHead | None:
        return class_head(self.parts.recipe, self.parts.tokenizer)

    def _answer(self, model: Any, who: str) -> Answered:
        folder = self.scratch / "logits" / secrets.token_hex(4)
        return answer(model, self.parts, self.held_out, folder, who=who, reporter=self.reporter)


def _set_dtype(folder: Path, dtype: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.dtype = DTYPES[dtype]
    config.save_pretrained(folder)
