"""A GGUF file run by llama.cpp itself (llama-cpp-python), and compared with the model that it was made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ift_peft.adapters.export.vocabulary import Vocabulary
from ift_peft.data.render import Renderer
from ift_peft.errors import ExportError
from ift_peft.infer.load import Parts, held_out_rows
from ift_peft.model.configuration import positions

# The largest difference of a logit that is allowed. llama.cpp adds up in another order, and rounds not only weights but
# activations to the type of the weights; q8_0 is 8 bits by blocks of 32.
BOUND = {"f32": 1e-3, "f16": 1e-1, "bf16": 1.0, "q8_0": 2.0}
PROMPTS = 8
NEW_TOKENS = 24
PROBES = (
    "今天天气很好，我们去公园吧。",
    "The quick brown fox can't jump over 12345 lazy dogs; I'VE seen it, they'll say!",
    "混合 mixed文本 with数字3.14和 punctuation……（括号）《书名》",
    "  two  spaces,\ttab,   and trailing  ",
    "line one\nline two\r\nline three\n\n\n  indented\n\nafter a blank line\n",
    "def f(x):\n    return {'a': x[0], \"b\": x**2}  # ok\n\n\nclass A: pass",
    "émigré naïve Ünïcödé Ελληνικά Русский العربية हिन्दी 日本語の文章 한국어 ไทย",
    "🚀😶‍🌫️✅ 3 33 333 3333 ३३ Ⅳ ½",
    "http://example.com/a-b_c?d=e&f=g#h <b>tags</b> &amp; @user #tag $9.99 50% a+b=c",
    "....!!!???''''``````\"\"\"\" ------=======",
    "word'S I'M we'Re 'tis '90s rock'n'roll",
)


@dataclass(frozen=True)
class Proof:
    """What was compared. Counts of texts with equal tokens, of equal greedy tokens, and how far logits lie apart."""

    llama_cpp_python: str
    prompts: int
    prompts_equal: int
    probes: int
    probes_equal: int
    answers: int
    answers_equal: int
    tokens: int
    tokens_equal: int
    largest_margin_where_unequal: float
    positions: int
    max_logit_difference: float
    bound: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        return (
            f"llama.cpp splits {self.prompts_equal} of {self.prompts} prompts and {self.probes_equal} of {self.probes} "
            f"probes alike, answers {self.answers_equal} of {self.answers} alike token by token; logits at most "
            f"{self.max_logit_difference:.2g} apart"
        )


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def prove(
    path: Path, parts: Parts, model: Any, *, vocabulary: Vocabulary, outtype: str, lora: Path | None = None
) -> Proof:
    """Run the file (with a `lora` file on it) and compare it with `model`, in float32, on held-out rows.

    Token ids of every held-out prompt and of PROBES; greedy answers to PROMPTS prompts; and logits at every position of
    these prompts with their answers. Keys and values are cached in float32.

    Raises `ExportError` where a prompt is split otherwise, a probe without a known reason (`vocabulary.differs`), a
    logit lies further away than BOUND, or a greedy token differs where rounding does not explain it.
    """
    assert isinstance(parts.renderer, Renderer)
    aligned = parts.renderer.aligned([row.prompt for row in held_out_rows(parts).rows])
    limit = positions(model.config) or 4096
    room = min(limit, max(len(prompt.ids) for prompt in aligned) + NEW_TOKENS)
    asked = sorted(aligned, key=lambda prompt: len(prompt.ids))[:: -(-len(aligned) // PROMPTS)]
    with running(path, room=room, lora=lora) as llama:
        unequal = [prompt.text for prompt in aligned if split(llama, prompt.text) != prompt.ids]
        probed = [split(llama, text) == parts.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
        end = parts.renderer.end_token_id
        compared = [
            compare(llama, model, prompt.ids, end=end, most=min(NEW_TOKENS, room - len(prompt.ids))) for prompt in asked
        ]
    proof = Proof(
        llama_cpp_python=metadata.version("llama_cpp_python"),
        prompts=len(aligned),
        prompts_equal=len(aligned) - len(unequal),
        probes=len(probed),
        probes_equal=sum(probed),
        answers=len(compared),
        answers_equal=sum(one.equal == one.tokens for one in compared),
        tokens=sum(one.tokens for one in compared),
        tokens_equal=sum(one.equal for one in compared),
        largest_margin_where_unequal=max(one.margin for one in compared),
        positions=sum(one.positions for one in compared),
        max_logit_difference=max(one.difference for one in compared),
        bound=BOUND[outtype],
    )
    _check(proof, path.name, vocabulary, unequal, [text for text, same in zip(PROBES, probed, strict=True) if not same])
    return proof


@dataclass(frozen=True)
class Compared:
    """An answer's tokens, how many are equal before the first that is not, by how much the model preferred its own
    there; and over how many positions logits were compared, with their largest difference."""

    tokens: int
    equal: int
    margin: float
    positions: int
    difference: float


@contextmanager
def running(path: Path, *, room: int, lora: Path | None = None) -> Iterator[Any]:
    """The file in llama.cpp on the CPU, with `room` tokens of context. Raises `ExportError` where it does not load."""
    from llama_cpp import GGML_TYPE_F32, Llama

    try:
        llama = Llama(
            str(path),
            n_ctx=room,
            n_batch=room,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=0,
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            lora_path=None if lora is None else str(lora),
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise ExportError(
            expected=f"llama.cpp to load {path.name}", found=str(error).replace(str(path), path.name), fix="report this"
        ) from error
    try:
        yield llama
    finally:
        llama.close()


def split(llama: Any, text: str) -> list[int]:
    """As a server splits what a chat template made: special tokens known, and those added that the file asks for."""
    return list(llama.tokenize(text.encode(), add_bos=True, special=True))


@torch.no_grad()
def compare(llama: Any, model: Any, prompt: Sequence[int], *, end: int, most: int) -> Compared:
    """The greedy answers of both to a prompt, up to `most` tokens or `end`, and their logits over the model's."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=end,
        pad_token_id=end,
    )[0].tolist()
    ours = output[len(prompt) :]
    logits = model(input_ids=torch.tensor([output], device=model.device)).logits[0].float().cpu().numpy()
    theirs = _continued(llama, prompt, end=end, most=most)
    llama.reset()
    llama.eval(output)
    scores = np.array(llama.scores[: len(output)])
    equal = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    margin = 0.0
    if equal < len(ours):
        row = logits[len(prompt) + equal - 1]
        margin = float(row[ours[equal]] - row[theirs[equal]])
    return Compared(len(ours), equal, margin, len(output), float(np.abs(scores - logits).max()))


def _continued(llama: Any, prompt: Sequence[int], *, end: int, most: int) -> list[int]:
    """llama.cpp's own greedy answer, token by token over its cache."""
    llama.reset()
    llama.eval(list(prompt))
    found: list[int] = []
    while len(found) < most:
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        if found[-1] == end:
            break
        llama.eval([found[-1]])
    return found


def _check(proof: Proof, name: str, vocabulary: Vocabulary, unequal: Sequence[str], probes: Sequence[str]) -> None:
    if unequal:
        raise ExportError(
            expected=f"llama.cpp to split every held-out prompt as training did, with {name}",
            found=f"{len(unequal)} of {proof.prompts} split otherwise, as {unequal[0][-80:]!r}",
            fix="; ".join(["nothing was written", *(f"known to differ: {text}" for text in vocabulary.differs)]),
        )
    if probes and not vocabulary.differs:
        raise ExportError(
            expected=f"llama.cpp to split texts as the tokenizer does, with {name}",
            found=f"another split of {probes[0]!r}",
            fix="nothing was written; export --to merged",
        )
    if not proof.max_logit_difference <= proof.bound or proof.largest_margin_where_unequal > 2 * proof.bound:
        raise ExportError(
            expected=f"logits of llama.cpp with {name} within {proof.bound:g} of the model's",
            found=f"a difference of {proof.max_logit_difference:.3g} on {proof.positions} positions",
            fix="nothing was written; --outtype f32 tells rounding from a fault",
        )
