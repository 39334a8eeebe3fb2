"""Make the built-in base `tiny`: tokenizer, then a small Llama, pretrained from nothing on `tiny_corpus`.

    python -m ift_peft.model.pretrain_tiny --corpora DIR --out DIR --steps 6000

Run again with the same arguments to continue after an interruption. The schedule is warm-up, constant, linear decay
(WSD, arXiv:2404.06395), so a finished run also continues to more steps from where its decay began.
Matrices are trained by Muon (Keller Jordan, 2024; `torch.optim.Muon`), the embedding and norms by AdamW.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ift_peft.model.tiny_corpus import ASSISTANT, END, ORIGINS, SOURCES, USER, read_documents

PAD, SYSTEM = "<|endoftext|>", "<|system|>"
CONTEXT = 512
HELD_OUT_EVERY = 100  # one document in this many is never trained on
SPLIT = (
    r"\p{Han}+|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[^\W\d_\p{Han}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


MODEL_CARD = """---
license: apache-2.0
language: [zh, en]
library_name: transformers
---

# tiny

A causal language model of {millions:.1f} million parameters (Llama architecture, {layers} layers of {hidden},
byte-level BPE of {vocabulary:,} pieces, {context} positions), made so that the whole workflow of ift_peft runs on a
laptop without network or account. It is a base to fine-tune in minutes, not a model to talk to.

Pretrained from nothing on {trained:,} tokens ({passes:.1f} passes over {one_pass:,}), loss on held-out documents
{loss:.3f} nats per token. Made by `python -m ift_peft.model.pretrain_tiny`; the exact settings are in pretraining.json.

## What it has read

| set | licence | what | from |
|---|---|---|---|
{sources}

No review or sentiment set is among them, nor any row that ships with ift_peft: judging sentiment is left to adapters.

## Chat format

`<|user|>question<|end|><|assistant|>answer<|end|>`; the chat template carries generation markers, and `<|end|>` has
been trained after every answer.

## Limits

It writes locally plausible Chinese and English and knows next to nothing. It follows no instruction reliably, mixes
languages, and repeats what its sources contain, medical and technical advice included: none of it is to be relied on.
Texts beyond {context} tokens are outside what it has seen.
"""


@dataclass(frozen=True)
class Plan:
    """What a pretraining run is made of; two runs with equal plans take equal steps."""

    hidden_size: int
    layers: int
    vocab_size: int
    steps: int
    decay_from: int
    tokens_per_step: int
    learning_rate: float
    seed: int


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose pieces never mix Han characters with letters, and take digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT, padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Corpus:
    """The tokenised documents, and the token stream of any training step."""

    def __init__(self, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        separator = tokenizer.convert_tokens_to_ids(PAD)
        self.seed = seed
        self.passes: list[float] = []
        self.ids: list[NDArray[np.uint16]] = []
        held_out: list[list[int]] = []
        backend = tokenizer.backend_tokenizer
        count = 0
        for source in SOURCES:
            for encoding in backend.encode_batch(documents[source.name]):
                ids = [*encoding.ids, separator]
                count += 1
                if count % HELD_OUT_EVERY == 0:
                    held_out.append(ids)
                else:
                    self.ids.append(np.asarray(ids, dtype=np.uint16))
                    self.passes.append(source.passes)
        random.Random(0).shuffle(held_out)  # so that a part of it is a part of every source
        self.held_out = [token for ids in held_out for token in ids]

    def _epoch(self, epoch: int) -> NDArray[np.uint16]:
        rng = np.random.default_rng((self.seed, epoch))
        repeats = np.floor(np.asarray(self.passes) + rng.random(len(self.passes))).astype(int)
        order = rng.permutation(np.repeat(np.arange(len(self.ids)), repeats))
        return np.concatenate([self.ids[i] for i in order])

    def batches(self, tokens_per_step: int, *, first_step: int, long_from: int) -> Iterator[Tensor]:
        """Token ids, int64 of shape (rows, window + 1), beginning with the batch of `first_step`.

        The window is half of CONTEXT, which is cheaper, and all of it from step `long_from` on.
        """
        step, epoch = 0, 0
        rest = np.empty(0, dtype=np.uint16)
        while True:
            rest = np.concatenate([rest, self._epoch(epoch)])
            epoch += 1
            while len(rest) >= 2 * tokens_per_step:
                window = CONTEXT if step >= long_from else CONTEXT // 2
                rows = tokens_per_step // window
                piece, rest = rest[: rows * (window + 1)], rest[rows * (window + 1) :]
                step += 1
                if step > first_step:
                    yield torch.from_numpy(piece.astype(np.int64).reshape(rows, window + 1))


def learning_rate_at(step: int, plan: Plan) -> float:
    """Warm-up over 100 steps, constant, then linear to zero from `plan.decay_from`."""
    if step < 100:
        return plan.learning_rate * (step + 1) / 100
    if step < plan.decay_from:
        return plan.learning_rate
    return plan.learning_rate * max(0.0, (plan.steps - step) / (plan.steps - plan.decay_from))


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=plan.vocab_size,
            hidden_size=plan.hidden_size,
            intermediate_size=math.ceil(plan.hidden_size * 8 / 3 / 64) * 64,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.hidden_size // 32,
            num_key_value_heads=plan.hidden_size // 32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; `tokens` int64 of shape (rows, length + 1)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(tokens[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, corpus: Corpus, *, windows: int = 64) -> float:
    count = min(windows, len(corpus.held_out) // (CONTEXT + 1))
    tokens = torch.tensor(corpus.held_out[: count * (CONTEXT + 1)]).view(count, CONTEXT + 1)
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, rows) for rows in tokens.split(8)]
    model.train()
    return float(torch.stack(losses).mean())


def save_state(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, facts: dict[str, Any]) -> None:
    """Write the Hugging Face folder (bfloat16 weights) and how it was made.

    Embedding and head were one matrix in training and become two here, so that an adapter on the embedding merges
    without changing the head.
    """
    state = {name: tensor.to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.dtype = torch.bfloat16
    model.config.tie_word_embeddings = False
    untied = LlamaForCausalLM(model.config).to(torch.bfloat16)
    untied.load_state_dict(state)
    untied.generation_config = model.generation_config
    untied.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(facts), "utf-8")
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def model_card(facts: dict[str, Any]) -> str:
    plan = facts["plan"]
    return MODEL_CARD.format(
        millions=facts["parameters"] / 1e6,
        layers=plan["layers"],
        hidden=plan["hidden_size"],
        vocabulary=plan["vocab_size"],
        context=CONTEXT,
        trained=facts["tokens_trained"],
        one_pass=facts["tokens_of_one_pass"],
        passes=facts["tokens_trained"] / facts["tokens_of_one_pass"],
        loss=facts["held_out_loss_nats_per_token"],
        sources="\n".join(
            f"| {s['name'].split('/')[0]} | {s['licence']} | {s['kind']} | {s['origin']} |" for s in facts["sources"]
        ),
    )


def restore(
    plan: Plan,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    out: Path,
    *,
    planned: dict[str, Any] | None,
) -> int:
    """Load the state to go on from and return its step: 0 without one.

    A run prolonged to more steps than were `planned` goes back to where its decay began, if it had.
    """
    for name in ("last.pt", "stable.pt"):
        if planned is None or not (out / name).exists():
            continue
        state = torch.load(out / name, weights_only=True)
        constant = state["step"] <= min(plan.decay_from, planned["decay_from"])
        if name == "stable.pt" or constant or plan.steps == planned["steps"]:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            return int(state["step"])
    return 0


def take_step(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def train(plan: Plan, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, out: Path, *, compiled: bool) -> None:
    """Run or continue `plan`, logging to `out`/log.jsonl and writing the finished base to `out`/base."""
    model = build_model(plan, tokenizer)
    optimizers = build_optimizers(model, plan)
    first = restore(plan, model, optimizers, out, planned=_planned(out))
    (out / "plan.json").write_text(json.dumps(asdict(plan), indent=2) + "\n", "utf-8")
    step_loss = torch.compile(loss_of) if compiled else loss_of
    started, seen = time.monotonic(), 0
    batches = corpus.batches(plan.tokens_per_step, first_step=first, long_from=plan.decay_from)
    for step, tokens in enumerate(batches, start=first):
        if step == plan.decay_from:
            save_state(out / "stable.pt", model, optimizers, step)
        if step >= plan.steps:
            break
        loss = step_loss(model, tokens)
        take_step(model, optimizers, loss, learning_rate_at(step, plan))
        seen += tokens.numel()
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": loss.item(), "tokens_per_s": seen / (time.monotonic() - started)}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % 200 == 0:
            save_state(out / "last.pt", model, optimizers, step + 1)
    facts = {
        "plan": asdict(plan),
        "parameters": model.num_parameters() + model.lm_head.weight.numel(),  # untied in export
        "tokens_trained": plan.steps * plan.tokens_per_step,
        "tokens_of_one_pass": int(sum(len(ids) * p for ids, p in zip(corpus.ids, corpus.passes, strict=True))),
        "held_out_loss_nats_per_token": round(held_out_loss(model, corpus), 4),
        "sources": [
            {"name": s.name, "origin": ORIGINS[s.folder], "licence": s.licence, "kind": s.kind, "passes": s.passes}
            for s in SOURCES
        ],
        "torch": torch.__version__,
    }
    export(model, tokenizer, out / "base", facts)
    typer.echo(json.dumps({k: facts[k] for k in ("parameters", "tokens_trained", "held_out_loss_nats_per_token")}))


def _planned(out: Path) -> dict[str, Any] | None:
    path = out / "plan.json"
    planned: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return planned


def main(
    corpora: Annotated[Path, typer.Option(help="Folder holding one folder for each source.")],
    out: Annotated[Path, typer.Option(help="Where checkpoints, log and the finished base go.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of tokens-per-step tokens.")] = 4000,
    hidden_size: int = 256,
    layers: int = 6,
    vocab_size: int = 8192,
    tokens_per_step: int = 8192,
    learning_rate: float = 3e-3,
    decay: Annotated[float, typer.Option(help="Share of the steps spent decaying the learning rate.")] = 0.25,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile (needs a C++ compiler).")] = True,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Pretrain the built-in base `tiny`."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(corpora)
    if (out / "tokenizer").is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        texts = (text for source in SOURCES if source.passes >= 1 for text in documents[source.name])
        tokenizer = train_tokenizer(texts, vocab_size)
        tokenizer.save_pretrained(out / "tokenizer")
    plan = Plan(
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=len(tokenizer),
        steps=steps,
        decay_from=steps - int(steps * decay),
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        seed=seed,
    )
    train(plan, Corpus(documents, tokenizer, seed=seed), tokenizer, out, compiled=compiled)


if __name__ == "__main__":
    typer.run(main)
