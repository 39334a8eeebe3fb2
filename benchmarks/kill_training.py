"""kill -9 at random moments of a training: the stock SFTTrainer beside ours, on one base, the same rows and settings.

    python -m benchmarks.kill_training --kills 16

Each kill is of a run of its own, at the same share of the seconds that training takes undisturbed; then the run is
resumed, the stock one by `trainer.train(resume_from_checkpoint=True)` where there is a checkpoint, as its documentation
has it, and the weights are compared with those of the undisturbed run byte for byte. Beside these, what can be
repeated: files missing or cut, one row that makes a NaN, a SIGTERM. Written to benchmarks/results/kill_training.json.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import write_result
from tests.faults.forks import Arm, Forked, Forks, forks
from tests.train.small import write_small

STEPS, EVERY, KEPT, POISONED = 24, 2, 2, 7
TARGETS = r".*self_attn\.[qv]_proj"
SIDES = ("stock", "ours")


def poison() -> Any:
    """A callback that makes NaN of one row in one step."""
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        hook: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            def spoil(module: Any, inputs: Any, output: Any) -> Any:
                output = output.clone()
                output[0] = float("nan")
                return output

            if state.global_step == POISONED:
                self.hook = model.get_input_embeddings().register_forward_hook(spoil)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.hook is not None:
                self.hook.remove()

    return Poison()


def stock(folder: str, *options: str) -> None:
    """Train as TRL's and transformers' documentation have it, from the newest checkpoint where there is one."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from ift_peft.model.tokenizer import TINY

    output = Path(folder) / "checkpoints"
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text("utf-8").splitlines()]
    data = [{"prompt": f"正面还是负面？\n{row['text']}", "completion": row["label"]} for row in rows]
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=KEPT,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        enable_jit_checkpoint="jit" in options,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[poison()] if "poison" in options else None,
    )
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    trainer.save_model(str(Path(folder) / "adapter"))


def ours(folder: str, *options: str) -> None:
    """Train by the package's own function, or resume the run in `folder`: the command cannot be given a callback."""
    import sys

    from ift_peft.cli import app

    settings = [f"training.max_steps={STEPS}", "training.save_strategy=steps", f"training.save_steps={EVERY}"]
    settings += [f"training.save_total_limit={KEPT}", f"adapter.target_modules={TARGETS}", "adapter.embeddings=false"]
    begun = list(Path(folder).glob("small/2*/manifest.json"))
    if "poison" in options and not begun:
        from ift_peft.train import run as training

        whole = training.train
        training.train = lambda *args, **kwargs: whole(*args, callbacks=(poison(),), **kwargs)
    command = ["--resume", str(begun[0].parent)] if begun else ["small.yaml", *settings, "--runs-dir", folder]
    sys.argv = ["ift", "train", *command]
    app()


@dataclass
class Side:
    """One of the two trainers: how it is started, and where it leaves its checkpoints and its adapter."""

    name: str
    server: Forks
    folder: Path
    seconds: float = 0.0
    """That it trains undisturbed, without what comes before and after."""
    weights: bytes = b""
    kills: Counter[str] = field(default_factory=Counter)

    def start(self, folder: Path, *options: str, arm: Arm | None = None) -> Forked:
        cache = {"IFT_PEFT_CACHE": str(self.folder / "cache"), "HF_HOME": str(self.folder / "hf")}
        target = f"benchmarks.kill_training:{self.name}"
        return self.server.start(str(folder), *options, cwd=self.folder, arm=arm, target=target, env=cache)

    def run(self, folder: Path, *options: str, arm: Arm | None = None) -> Forked:
        process = self.start(folder, *options, arm=arm)
        process.wait()
        return process

    def place(self, folder: Path) -> Path:
        """Of a run: stock writes into the folder itself, ours into a folder below it."""
        return next(iter(folder.glob("small/2*")), folder) if self.name == "ours" else folder

    def outcome(self, folder: Path, process: Forked) -> str:
        """How a process ended, and what weights it left."""
        path = self.place(folder) / "adapter" / "adapter_model.safetensors"
        if process.returncode:
            return f"error {process.returncode}" if process.returncode > 0 else f"killed by {-process.returncode}"
        if not path.is_file():
            return "exit code 0, no weights"
        if path.read_bytes() == self.weights:
            return "the same weights"
        return f"exit code 0, {'NaN in the' if has_nan(path) else 'other'} weights"


def has_nan(path: Path) -> bool:
    from safetensors.torch import load_file

    return any(bool(tensor.isnan().any()) for tensor in load_file(path).values())


def undisturbed(side: Side) -> None:
    process = side.start(side.folder / side.name / "whole")
    began = until_training(process)
    while process.poll() is None and process.phase != "measuring":
        time.sleep(0.01)
    side.seconds = time.monotonic() - began
    if process.wait():
        raise RuntimeError(f"{side.name}: {process.stderr}")
    path = side.place(side.folder / side.name / "whole") / "adapter" / "adapter_model.safetensors"
    side.weights = path.read_bytes()


def until_training(process: Forked) -> float:
    while process.poll() is None and process.phase == "preparing":
        time.sleep(0.005)
    return time.monotonic()


def kill_at(side: Side, number: int, share: float) -> dict[str, Any]:
    """Kill a run after this share of its training, resume it, and compare."""
    folder = side.folder / side.name / f"kill-{number}"
    process = killed(side, folder, share)
    while process.phase == "measuring":  # it was faster than the undisturbed one, and had trained
        shutil.rmtree(folder)
        share *= 0.9
        process = killed(side, folder, share)
    resumed = side.run(folder)
    found = side.outcome(folder, resumed)
    kind = found if found == "the same weights" else "other weights" if not resumed.returncode else "could not resume"
    side.kills[kind] += 1
    shutil.rmtree(folder)
    told = {} if not resumed.returncode else {"error": last_line(resumed, side)}
    return {"share": round(share, 3), "killed_in": process.phase, "resumed": kind, **told}


def killed(side: Side, folder: Path, share: float) -> Forked:
    process = side.start(folder)
    until_training(process)
    time.sleep(share * side.seconds)
    process.kill()
    process.wait()
    return process


def last_line(process: Forked, side: Side) -> str:
    """What a process said last, without the names of folders that differ from time to time."""
    return (process.stderr.strip().splitlines() or [""])[-1].replace(str(side.folder), "")[:200]


def newest(side: Side, folder: Path) -> Path:
    found = (side.place(folder) / "checkpoints").glob("checkpoint-*")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


HARMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "optimizer.pt deleted": ("optimizer.pt", Path.unlink),
    "rng_state.pth deleted": ("rng_state.pth", Path.unlink),
    "optimizer.pt cut in half": ("optimizer.pt", cut),
    "adapter_model.safetensors cut in half": ("adapter_model.safetensors", cut),
    "trainer_state.json cut in half": ("trainer_state.json", cut),
}


def harmed(side: Side, case: str) -> dict[str, Any]:
    """What resuming comes to when a file of the newest checkpoint was harmed."""
    name, harm = HARMS[case]
    folder = side.folder / side.name / name / case.split()[-1]
    side.run(folder, arm=Arm(save=4))
    harm(newest(side, folder) / name)
    resumed = side.run(folder)
    return {"resumed": side.outcome(folder, resumed), "said": last_line(resumed, side) if resumed.returncode else ""}


def disturbed(side: Side, *options: str, arm: Arm | None = None) -> dict[str, Any]:
    """How a run ends that is disturbed while it trains, and what resuming comes to where it has not ended."""
    folder = side.folder / side.name / f"disturbed-{'-'.join(options)}-{arm is not None}"
    process = side.run(folder, *options, arm=arm)
    found: dict[str, Any] = {"ended": side.outcome(folder, process), "exit_code": process.returncode}
    if process.returncode or arm is not None:
        resumed = side.run(folder, *(option for option in options if option != "poison"))
        found["resumed"] = side.outcome(folder, resumed)
    return found


def repeated(side: Side) -> dict[str, Any]:
    """The cases that come out the same each time."""
    found = {case: harmed(side, case) for case in HARMS}
    found["one row makes a NaN"] = disturbed(side, "poison")
    found["SIGTERM"] = disturbed(side, arm=Arm(save=4, signal=signal.SIGTERM))
    if side.name == "stock":
        arm = Arm(save=4, signal=signal.SIGTERM)
        found["SIGTERM, with enable_jit_checkpoint"] = disturbed(side, "jit", arm=arm)
    return found


def main(
    kills: Annotated[int, typer.Option(help="How often to kill each of the two.")] = 16,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    rng = random.Random(seed)
    shares = [rng.random() for _ in range(kills)]
    result: dict[str, Any] = {"steps": STEPS, "save_steps": EVERY, "save_total_limit": KEPT}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small(folder)
        with forks(folder / "forks", shim=False) as server:
            for side in (Side(one, server, folder) for one in SIDES):
                undisturbed(side)
                killed = []
                for number, share in enumerate(shares):
                    killed.append(kill_at(side, number, share))
                    print(side.name, killed[-1], flush=True)
                cases = repeated(side)
                print(json.dumps(cases, indent=2), flush=True)
                result[side.name] = {"counted": dict(side.kills), "kills": killed, "cases": cases}
    print({side: result[side]["counted"] for side in SIDES})
    write_result("kill_training", result)


if __name__ == "__main__":
    typer.run(main)
