"""The engine against transformers' generate, one prompt and one adapter at a time; and what requests may ask."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from ift_peft.errors import BusyError, Faults, ModelError
from ift_peft.infer.engine import Engine
from ift_peft.infer.request import Request
from ift_peft.infer.rows import RowsLayer
from ift_peft.infer.sampling import draw
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.infer.text import TextStream
from ift_peft.model.tokenizer import TINY
from tests.infer.adapters import END, make_adapter, out_of_memory, random_base, random_prompts, stock

TOKENIZER = AutoTokenizer.from_pretrained(TINY)
SIZE = len(TOKENIZER)
COMMON: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
FAMILIES = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(**GPT2, initializer_range=0.3, bos_token_id=1, eos_token_id=END, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "opt": OPTConfig(**COMMON, **OPT),
    "gemma3": Gemma3TextConfig(  # windows shorter than prompts
        **COMMON,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
LENGTHS = (5, 17, 2, 30, 9, 11, 3, 20)
Stacked = tuple[StackedAdapters, dict[str | None, Any]]
NAMES = (None, "0", "1", "2", "0", "1", "2", "2")
NEW = 16
PROMPTS = random_prompts(*LENGTHS, vocabulary=SIZE)


def stacked(base: Any, folder: Path) -> Stacked:
    """Three adapters of other ranks on `base`, and the models of stock PEFT by name."""
    models = {str(n): make_adapter(base, folder / str(n), seed=n, r=r) for n, r in enumerate((4, 12, 8))}
    stack = StackedAdapters(base)
    for name in models:
        stack.load(name, folder / name)
    return stack, {None: random_base(base.config), **models}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stacked:
    return stacked(random_base(FAMILIES["llama"]), tmp_path_factory.mktemp("llama"))


def engine_of(stack: StackedAdapters, **settings: Any) -> Engine:
    return Engine(stack.model, TOKENIZER, end_token_ids={END}, adapters=stack, **settings)


@pytest.fixture
def engine(llama: Stacked) -> Engine:
    return engine_of(llama[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_that_join_and_leave_are_stock_peft_token_for_token(family: str, tmp_path: Path) -> None:
    stack, models = stacked(random_base(FAMILIES[family]), tmp_path)
    limits = [NEW - number % 3 * 5 for number in range(len(PROMPTS))]
    wanted = [stock(models[name], ids, n) for name, ids, n in zip(NAMES, PROMPTS, limits, strict=True)]
    assert len(set(wanted)) == len(wanted)
    requests = [Request(ids, name, n) for name, ids, n in zip(NAMES, PROMPTS, limits, strict=True)]
    for max_rows in (3, 16):
        found = engine_of(stack, max_rows=max_rows).run(requests)
        assert [one.tokens for one in found] == wanted
        for one, prompt in zip(found, PROMPTS, strict=True):
            ended = one.tokens[-1] == END
            assert one.finish_reason == ("stop" if ended else "length")
            assert one.prompt_tokens == len(prompt)
            assert one.text == TOKENIZER.decode(one.tokens, skip_special_tokens=True)


@pytest.mark.slow
def test_a_real_base_with_adapters_is_stock_peft_token_for_token(stories: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    end = int(base.config.eos_token_id)
    models = {str(n): make_adapter(base, tmp_path / str(n), seed=n, size=0.05, r=4 * n + 2) for n in range(3)}
    stack = StackedAdapters(base)
    for name in models:
        stack.load(name, tmp_path / name)
    texts = ["Once upon a time", "Lily had a red ball.", "The dog", "One day, Tim and his mom went to the"]
    asked = [(tuple(tokenizer(text)["input_ids"]), name) for text in texts for name in models]
    engine = Engine(base, tokenizer, end_token_ids={end}, adapters=stack, max_rows=5)
    found = engine.run([Request(ids, name, 40) for ids, name in asked])
    for one, (ids, name) in zip(found, asked, strict=True):
        assert one.tokens == stock(models[name], ids, 40)


def test_bases_that_cannot_be_padded_are_refused_by_name() -> None:
    mamba = random_base(MambaConfig(vocab_size=SIZE, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ModelError, match="MambaForCausalLM, whose forward takes no past_key_values"):
        Engine(mamba, TOKENIZER, end_token_ids={END})
    base = random_base(FAMILIES["gpt2"])
    forward = base.transformer.forward
    base.transformer.forward = (  # places that count padding
        lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    )
    with pytest.raises(ModelError, match="standard deviations where another row pads"):
        Engine(base, TOKENIZER, end_token_ids={END})


def test_rows_of_a_base_with_longrope_stay_where_they_do_not_change_each_other() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 8.0, 16.0],
    }
    base = random_base(
        Phi3Config(**COMMON, num_key_value_heads=2, rope_parameters=rope, original_max_position_embeddings=24)
    )
    engine = Engine(base, TOKENIZER, end_token_ids={END})
    assert engine.positions == 24
    with pytest.raises(ModelError, match="shorter than the base's 24 positions"):
        engine.submit(Request(PROMPTS[3]))
    prompts = [PROMPTS[number] for number in (0, 1, 7)]
    for one, prompt in zip(engine.run([Request(prompt) for prompt in prompts]), prompts, strict=True):
        assert one.tokens == stock(base, prompt, 24 - len(prompt))


def test_keys_and_values_take_what_the_rows_of_now_need() -> None:
    cache, buffers = RowsLayer(), set()
    row = torch.ones(2, 50, 8)
    for _ in range(100):
        cache.join(row, row)
        assert cache.held is not None
        buffers.add(cache.held[0].shape)
    assert len(buffers) < 15
    for _ in range(99):
        cache.leave(0)
    for _ in range(3000):
        cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    assert cache.held is not None
    rows, _, columns, _ = cache.held[0].shape
    assert rows <= 2 and columns <= 3050 + 600
    cache.leave(0)
    assert cache.held is None and cache.get_seq_length() == 0


def test_draws_depend_on_the_seed_and_not_on_the_crowd(engine: Engine) -> None:
    def ask(number: int, seed: int) -> Request:
        return Request(PROMPTS[number], NAMES[number], NEW, temperature=1.0, top_p=0.9, seed=seed)

    crowd = engine.run([ask(number, 7) for number in range(8)])
    for number in range(8):
        (alone,) = engine.run([ask(number, 7)])
        assert alone.tokens == crowd[number].tokens
    (other,) = engine.run([ask(3, 8)])
    assert other.tokens != crowd[3].tokens
    (negative,) = engine.run([ask(3, -7)])
    assert negative.tokens != crowd[3].tokens
    (unseeded,) = engine.run([Request(PROMPTS[3], "2", NEW, temperature=1.0, top_p=0.9)])
    (again,) = engine.run([ask(3, unseeded.seed)])
    assert again.tokens == unseeded.tokens


def test_the_likeliest_tokens_are_told(engine: Engine) -> None:
    (told,) = engine.run([Request(PROMPTS[0], None, 1, logprobs=SIZE)])
    values = torch.tensor([value for _, value in told.logprobs[0].top])
    tokens = [token for token, _ in told.logprobs[0].top]
    assert values.exp().sum() == pytest.approx(1, abs=1e-4)
    assert tokens[0] == told.tokens[0]


def test_draws_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])
    wanted = (logits / 2).softmax(dim=0)
    assert draw(logits, temperature=1e-300, top_p=1.0, generator=random.Random(0)) == 1
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.8, [0, 1, 3]), (0.01, [1])):
        generator = random.Random(0)
        drawn = [draw(logits, temperature=2.0, top_p=top_p, generator=generator) for _ in range(2000)]
        shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), wanted[kept] / wanted[kept].sum())
        assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.04)


def test_logprobs_are_those_of_the_whole_text(engine: Engine, llama: Stacked) -> None:
    (one,) = engine.run([Request(PROMPTS[1], "1", 8, logprobs=2)])
    with torch.no_grad():
        logs = llama[1]["1"](torch.tensor([[*PROMPTS[1], *one.tokens]])).logits[0].log_softmax(-1)
    assert len(one.logprobs) == len(one.tokens)
    for at, told in enumerate(one.logprobs, start=len(PROMPTS[1]) - 1):
        assert told.token == one.tokens[at - len(PROMPTS[1]) + 1]
        assert told.logprob == pytest.approx(float(logs[at, told.token]), abs=1e-3)
        assert [value for _, value in told.top] == pytest.approx(logs[at].topk(2).values.tolist(), abs=1e-3)


def test_stop_strings_end_an_answer_before_them_across_tokens(engine: Engine) -> None:
    (whole,) = engine.run([Request(PROMPTS[1], "0", NEW)])
    text = whole.text
    tokens = [TOKENIZER.decode([token]) for token in whole.tokens]
    stop = next(  # the end of one token and the beginning of the next
        one[-1] + two[0]
        for one, two in pairwise(tokens)
        if one and two and "\ufffd" not in one + two and not any(one[-1] + two[0] in token for token in tokens)
    )
    stream = engine.submit(Request(PROMPTS[1], "0", NEW, stop=("never there", stop)))
    while engine.step():
        pass
    pieces = [piece.text for piece in stream]
    assert stream.result().finish_reason == "stop"
    assert stream.result().text == text[: text.index(stop)] == "".join(pieces)
    assert len(stream.result().tokens) < len(whole.tokens)


def test_text_that_might_become_a_stop_string_is_given_out_once_it_cannot() -> None:
    ids = TOKENIZER("abcd 好的👩‍👧 abcd", add_special_tokens=False)["input_ids"]
    whole = TOKENIZER.decode(ids)
    for stop in ((), ("cdX",), ("d 好吗", "👩‍👦"), ("Q",)):
        text = TextStream(TOKENIZER, stop)
        given = [text.push(token) for token in ids]
        assert all("\ufffd" not in piece for piece in given)
        assert "".join(given) + text.finish() == whole and not text.stopped
    cut = TextStream(TOKENIZER, ("的👩",))
    assert "".join(cut.push(token) for token in ids) + cut.finish() == whole[: whole.index("的👩")] and cut.stopped
    half = TextStream(TOKENIZER)
    emoji = TOKENIZER("👩", add_special_tokens=False)["input_ids"]
    if len(emoji) > 1:
        assert [half.push(token) for token in emoji[:-1]] == [""] * (len(emoji) - 1)
        assert half.finish() == TOKENIZER.decode(emoji[:-1])


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """As Llama 2's: what is no token of its own is tokens of bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_characters_of_byte_tokens_come_as_they_are_whole_and_stop_strings_among_them_stop(
    bytes_tokenizer: Any,
) -> None:
    ids = [256, *"好\n的".encode(), 256, 10, 10, *"👩".encode(), 257]
    text = TextStream(bytes_tokenizer)
    given = [text.push(token) for token in ids]
    assert [piece for piece in given if piece] == ["a", "好", "\n", "的", " a", "\n", "\n", "👩", "b"]
    assert "".join(given) == bytes_tokenizer.decode(ids) and text.finish() == ""
    for stop, until in (("\n", "好"), ("的 a\n\n", "好\n"), ("\n的", "好")):
        text = TextStream(bytes_tokenizer, (stop,))
        pieces = [text.push(token) for token in ids[1:]]
        assert "".join(pieces) == until and text.stopped


def test_bytes_that_are_no_character_are_shown_as_such_after_those_that_are(bytes_tokenizer: Any) -> None:
    for ids, wanted in (
        ([256, 10, 255, 10, 257, 256], "a\n\ufffd\ufffdb a"),
        ([*"好".encode(), 0xE5, 256], "好\ufffd a"),
        ([0xE5, 10, 256], "\ufffd\ufffd a"),
        ([256, 10, 0xE5], "a\n\ufffd"),
    ):
        text = TextStream(bytes_tokenizer)
        assert "".join(text.push(token) for token in ids) + text.finish() == wanted


def test_streams_give_the_answer_in_pieces_as_it_is_made(engine: Engine) -> None:
    stream = engine.submit(Request(PROMPTS[3], "1", NEW, logprobs=0))
    pieces, seen = [], []
    while engine.step():
        pieces += (new := stream.ready())
        seen.append(len(new))
    pieces += stream.ready()
    result = stream.result(timeout=0)
    assert sum(map(bool, seen)) > 3
    assert list(stream) == list(stream) == []  # once given, and not waited for again
    assert "".join(piece.text for piece in pieces) == result.text
    assert tuple(token for piece in pieces for token in piece.tokens) == result.tokens
    assert all(len(piece.logprobs) == len(piece.tokens) for piece in pieces)


def test_allowed_answers_are_given_whole_and_nothing_else(engine: Engine) -> None:
    answers = ((11, 12), (11, 12, 13), (11, 40), (50,))
    requests = [
        Request(prompt, name, NEW, temperature=2.0, seed=seed, choices=answers)
        for seed in range(12)
        for prompt, name in zip(PROMPTS[:4], NAMES, strict=False)
    ]
    found = [one.tokens for one in engine.run(requests)]
    assert set(found) == {(11, 12, END), (11, 12, 13), (11, 40), (50,)}  # a prefix of another ends with the end token
    assert all(one.finish_reason == "stop" for one in engine.run(requests[:4]))
    (told,) = engine.run([Request(PROMPTS[0], None, 1, logprobs=SIZE)])
    ranked = [token for token, _ in told.logprobs[0].top]
    (greedy,) = engine.run([Request(PROMPTS[0], None, NEW, choices=((ranked[900],), (ranked[500],), (ranked[700],)))])
    assert greedy.tokens == (ranked[500],)


def test_cancelling_frees_the_row_and_the_slot_and_leaves_the_others_as_they_are(
    llama: Stacked, tmp_path: Path
) -> None:
    stack, models = llama
    engine = engine_of(stack, max_rows=2)
    make_adapter(models[None], tmp_path / "x")
    stack.load("x", tmp_path / "x")
    gone = engine.submit(Request(PROMPTS[3], "x", NEW))
    other = engine.submit(Request(PROMPTS[1], "1", NEW))
    waits = engine.submit(Request(PROMPTS[0], "x", NEW))
    last = engine.submit(Request(PROMPTS[2], "2", NEW))
    for _ in range(3):
        engine.step()
    stack.remove("x")
    gone.cancel()
    waits.cancel()
    engine.step()
    assert gone.result(0).finish_reason == waits.result(0).finish_reason == "cancelled"
    assert 0 < len(gone.result(0).tokens) < NEW and waits.result(0).tokens == ()
    assert engine.running == 2 and engine.waiting == 0
    stack.load("y", tmp_path / "x")  # the slot of the removed one is free
    stack.remove("y")
    while engine.step():
        pass
    assert other.result(0).tokens == stock(models["1"], PROMPTS[1], NEW)
    assert last.result(0).tokens == stock(models["2"], PROMPTS[2], NEW)


def test_a_request_that_fails_leaves_the_others_as_they_are(llama: Stacked, tmp_path: Path) -> None:
    stack, models = llama
    engine = engine_of(stack)
    make_adapter(models[None], tmp_path / "x", size=1e30)
    stack.load("x", tmp_path / "x")
    bad = engine.submit(Request(PROMPTS[4], "x", NEW))
    good = [engine.submit(Request(PROMPTS[number], NAMES[number], NEW)) for number in (1, 2, 3)]
    while engine.step():
        pass
    stack.remove("x")
    with pytest.raises(ModelError, match="NaN or infinity for x"):
        bad.result(0)
    for stream, number in zip(good, (1, 2, 3), strict=True):
        assert stream.result(0).tokens == stock(models[NAMES[number]], PROMPTS[number], NEW)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(()), "at least one token"),
        (Request((SIZE,)), "token ids below"),
        (Request((5,) * 64), "shorter than the base's 64 positions"),
        (Request((5,), temperature=-1), "temperature"),
        (Request((5,), top_p=0), "top_p"),
        (Request((5,), stop=("",)), "stop strings"),
        (Request((5,), choices=((),)), "choices"),
        (Request((5,), max_new_tokens=1, choices=((1, 2),)), "choices of at most 1"),
        (Request((5,), choices=((7, END, 8),)), "no end token cuts short"),
        (Request((5,), "unknown"), "an adapter out of 0, 1, 2"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_at_once(engine: Engine, request_: Request, named: str) -> None:
    with pytest.raises((ModelError, Faults), match=named):
        engine.submit(request_)
    assert not engine.step()


def test_answers_end_at_the_last_position_of_the_base(engine: Engine) -> None:
    (one,) = engine.run([Request(PROMPTS[3] * 2, "0", 50)])
    assert len(one.tokens) <= 4


def held_slots(stack: StackedAdapters) -> int:
    return sum(stack._users.values())


@pytest.mark.parametrize("at", [1, 2, 5])
def test_rows_that_find_no_memory_to_join_fail_and_the_thread_answers_the_next(
    started: Engine, llama: Stacked, at: int
) -> None:
    stack, models = llama
    with out_of_memory(torch.Tensor, "new_zeros", at=at):  # a buffer for keys or for values, of either layer
        with stack.lock:  # so that they are taken together
            lost = [started.submit(Request(PROMPTS[number], str(number), NEW)) for number in (0, 1)]
        for stream in lost:
            with pytest.raises(torch.OutOfMemoryError):
                stream.result(20)
    found = started.submit(Request(PROMPTS[1], "1", NEW)).result(20)
    assert found.tokens == stock(models["1"], PROMPTS[1], NEW)
    started.stop()
    assert (started.running, started.waiting, held_slots(stack)) == (0, 0, 0)


def test_a_step_that_finds_no_memory_fails_its_rows_and_no_others(llama: Stacked) -> None:
    stack, models = llama
    engine = engine_of(stack, max_rows=2)
    streams = [engine.submit(Request(PROMPTS[number], str(number % 2), NEW)) for number in range(3)]
    engine.step()
    with out_of_memory(torch.nn.functional, "scaled_dot_product_attention", at=2):
        engine.step()
    while engine.step():
        pass
    for stream in streams[:2]:
        with pytest.raises(torch.OutOfMemoryError):
            stream.result(0)
    assert streams[2].result(0).tokens == stock(models["0"], PROMPTS[2], NEW)
    assert held_slots(stack) == 0


def test_what_interrupts_a_step_fails_every_request_and_lets_their_adapters_go(llama: Stacked) -> None:
    stack, models = llama
    engine = engine_of(stack, max_rows=2)
    streams = [engine.submit(Request(PROMPTS[number], "1", NEW)) for number in range(3)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    engine.step()
    hook = stack.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    for stream in streams:
        with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            stream.result(0)
    assert not engine.step() and held_slots(stack) == 0
    assert engine.run([Request(PROMPTS[0], "1", NEW)])[0].tokens == stock(models["1"], PROMPTS[0], NEW)


def test_prompts_that_fail_together_are_run_alone_without_what_the_batch_took(llama: Stacked) -> None:
    stack, models = llama
    engine = engine_of(stack)
    taken: list[weakref.ref[torch.Tensor]] = []

    def no_room_for_two(module: object, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert all(one() is None for one in taken)
        if len(output) > 1:
            taken.append(weakref.ref(output))
            raise torch.OutOfMemoryError("out of memory")

    hook = stack.model.lm_head.register_forward_hook(no_room_for_two)
    streams = [engine.submit(Request(PROMPTS[number], "1", 1)) for number in range(3)]
    engine.step()
    hook.remove()
    assert len(taken) == 1
    for number, stream in enumerate(streams):
        assert stream.result(0).tokens == stock(models["1"], PROMPTS[number], 1)


def test_a_listener_or_a_tokenizer_that_fails_ends_its_own_request_alone(llama: Stacked) -> None:
    class Undecodable:
        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def decode(self, *_: object, **__: object) -> str:
            raise OverflowError("decode")

    def gone() -> None:
        raise asyncio.CancelledError

    stack, models = llama
    engine = engine_of(stack)
    left = engine.submit(Request(PROMPTS[0], "1", NEW), on_change=gone)
    other = engine.submit(Request(PROMPTS[1], "1", NEW))
    while engine.step():
        pass
    assert left.result(0).finish_reason == "cancelled"
    assert other.result(0).tokens == stock(models["1"], PROMPTS[1], NEW)
    engine = Engine(stack.model, Undecodable(), end_token_ids={END}, adapters=stack)
    cancelled = engine.submit(Request(PROMPTS[0], "1", NEW))
    cancelled.cancel()
    assert not engine.step()
    with pytest.raises(OverflowError):
        cancelled.result(0)
    assert held_slots(stack) == 0


def test_a_refused_request_holds_no_adapter_and_takes_the_others_of_its_run_with_it(llama: Stacked) -> None:
    engine = engine_of(llama[0])
    with pytest.raises(TypeError):
        engine.submit(Request(PROMPTS[0], "1", NEW, temperature=1.0, seed=0.5))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="at least one token"):
        engine.run([Request(PROMPTS[0], "1", NEW), Request((), "1", NEW)])
    assert engine.waiting == 0 and held_slots(llama[0]) == 0


def test_a_full_queue_says_so(llama: Stacked) -> None:
    engine = engine_of(llama[0], max_waiting=1)
    engine.submit(Request(PROMPTS[0]))
    with pytest.raises(BusyError, match="fewer than 1"):
        engine.submit(Request(PROMPTS[0]))


@pytest.fixture
def started(llama: Stacked) -> Iterator[Engine]:
    engine = engine_of(llama[0], max_rows=4)
    engine.start()
    yield engine
    engine.stop(drain=False)


def test_a_thread_answers_many_clients_and_adapters_come_and_go(
    started: Engine, llama: Stacked, tmp_path: Path
) -> None:
    stack, models = llama
    make_adapter(models[None], tmp_path / "x")
    wanted = [stock(models[name], ids, NEW) for name, ids in zip(NAMES, PROMPTS, strict=True)]
    found: dict[int, tuple[int, ...]] = {}

    def client(number: int) -> None:
        stream = started.submit(Request(PROMPTS[number % 8], NAMES[number % 8], NEW))
        found[number] = tuple(token for piece in stream for token in piece.tokens)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for one in clients:
        one.start()
    for _ in range(5):
        stack.load("x", tmp_path / "x")
        stack.remove("x")
    for one in clients:
        one.join(timeout=60)
    assert found == {number: wanted[number % 8] for number in range(24)}
    late = [started.submit(Request(ids, "1", NEW)) for ids in PROMPTS]
    started.stop()
    assert all(stream.done for stream in late)
    assert all(a.result(0).tokens for a, _ in pairwise(late))
    with pytest.raises(BusyError, match="one that stopped"):
        started.submit(Request(PROMPTS[0]))
    started.start()
    assert started.submit(Request(PROMPTS[0], None, NEW)).result(20).tokens == wanted[0]


def test_stopping_without_draining_cancels_requests_whose_prompt_is_being_run(started: Engine, llama: Stacked) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        assert go_on.wait(20)

    hook = llama[0].model.register_forward_hook(wait)
    stream = started.submit(Request(PROMPTS[1], "1", 40))
    assert begun.wait(20)
    stopper = threading.Thread(target=started.stop, kwargs={"drain": False})
    stopper.start()
    while not started._stopping:
        pass
    hook.remove()
    go_on.set()
    stopper.join(20)
    assert stream.result(0).finish_reason == "cancelled" and len(stream.result(0).tokens) <= 2
