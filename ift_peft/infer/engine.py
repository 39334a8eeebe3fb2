"""Continuous batching: rows join the batch after their own prompt was run and leave it at any step."""

from __future__ import annotations

import operator
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from ift_peft.errors import BusyError, IftPeftError, ModelError, raise_all
from ift_peft.infer.answering import Row
from ift_peft.infer.decoding import Batch
from ift_peft.infer.request import Completion, Request, Stream
from ift_peft.infer.rows import alike_positions
from ift_peft.infer.stacked import StackedAdapters


class Engine:
    """Answers requests for one base and the adapters stacked on it, up to `max_rows` in one batch.

    Either the caller steps it (`step`, `run`) or a thread of its own does (`start`, `stop`); `submit` and cancelling
    are for any thread. `model` may also be a `PeftModel` of any method, which then answers every request without
    `adapters`.
    `positions` is how many tokens a prompt and its answer can have together, None where nothing limits them.
    Raises `ModelError` for a base whose rows of different lengths cannot be run together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        end_token_ids: Collection[int],
        adapters: StackedAdapters | None = None,
        max_rows: int = 16,
        max_waiting: int | None = None,
        max_prompt_tokens: int = 4096,
    ) -> None:
        """`max_waiting` bounds the queue; at most `max_prompt_tokens` of several prompts are run in one step."""
        if max_waiting is not None and max_waiting < 1:
            raise ModelError(
                expected="max_waiting of at least 1", found=str(max_waiting), fix="leave it out, or raise it"
            )
        self.adapters, self.max_rows, self.max_waiting = adapters, max_rows, max_waiting
        self._tokenizer, self._end_tokens = tokenizer, frozenset(end_token_ids)
        self._vocabulary = len(model.get_input_embeddings().weight)
        self._lock = threading.RLock()
        pad = tokenizer.pad_token_id
        if pad is None or pad >= self._vocabulary:  # an added one may have no embedding
            pad = min(self._end_tokens)
        with self._running():
            self._batch = Batch(model, pad_token_id=pad, end_token_ids=self._end_tokens, adapters=adapters)
        self.positions = alike_positions(model.config)
        self._max_prompt_tokens = max_prompt_tokens
        self._waiting: deque[Row] = deque()
        self._wake = threading.Condition()  # guards `_waiting` and the following
        self._thread: threading.Thread | None = None
        self._stopping = self._cancelling = False

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Requests that are not yet in the batch."""
        return len(self._waiting)

    def submit(self, request: Request, *, on_change: Callable[[], None] | None = None) -> Stream:
        """Put a request into the queue. Its adapter is the one of that name now, whatever is loaded or removed later.

        Raises `ModelError` or `Faults` for a request that cannot be answered, `BusyError` where the queue is full.
        """
        limit = self._limit(request)
        if request.adapter is not None and self.adapters is None:
            raise ModelError(expected="no adapter", found=repr(request.adapter), fix="give the engine `adapters`")
        seed = secrets.randbits(63) if request.seed is None else operator.index(request.seed)
        stream = Stream(request, seed, on_change)
        row = Row(stream, limit, self._tokenizer, min(self._end_tokens))
        with self._wake:
            if self._stopping:
                raise BusyError(
                    expected="an engine that takes requests", found="one that stopped", fix="start it again"
                )
            if self._full():
                raise BusyError(
                    expected=f"fewer than {self.max_waiting} requests waiting",
                    found=str(len(self._waiting)),
                    fix="try again later",
                )
            if self.adapters is not None:
                row.slot = self.adapters.acquire(request.adapter)
            self._waiting.append(row)
            self._wake.notify()
        return stream

    def step(self) -> bool:
        """Run prompts that wait, as far as there are rows for them, then one token for each row. False if idle.

        Raises what is no fault of a request or of memory, as an interrupt; every request has failed with it then.
        """
        with self._running():
            try:
                self._drop_cancelled()
                self._take_prompts()
                self._batch.step()
            except BaseException as error:
                with self._wake:
                    waiting = list(self._waiting)
                    self._waiting.clear()
                self._batch.lose(error, waiting)
                raise
        return bool(self._batch.rows or self._waiting)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers to all, in order. Raises what the first failed request failed with."""
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self._submit_in_turn(request))
            while not all(stream.done for stream in streams):
                self._turn()
        except BaseException:
            for stream in streams:
                stream.cancel()
            if self._thread is None:  # no step may follow that would let their adapters go
                with self._running():
                    self._drop_cancelled()
            raise
        return [stream.result() for stream in streams]

    def _submit_in_turn(self, request: Request) -> Stream:
        """`submit`, once there is room in the queue, which others may fill as well."""
        while True:
            while self._full() and not self._stopping:
                self._turn()
            try:
                return self.submit(request)
            except BusyError:
                if self._stopping:
                    raise

    def start(self) -> None:
        """Step in a thread of its own, which sleeps while there is nothing to do."""
        with self._wake:
            if self._thread is not None:
                raise RuntimeError("the engine's thread is running")
            self._stopping = self._cancelling = False
            self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
            self._thread.start()

    def stop(self, *, drain: bool = True) -> None:
        """Take no more requests, until `start`, and end the thread, after those that it has (`drain`), or with them
        cancelled.
        """
        with self._wake:
            self._stopping = True
            self._cancelling = self._cancelling or not drain
            thread = self._thread
            self._wake.notify_all()
        if thread is not None:
            thread.join()
            with self._wake:
                if self._thread is thread:
                    self._thread = None

    def _drive(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._batch.rows or self._stopping):
                    self._wake.wait()
                if self._stopping and not (self._waiting or self._batch.rows):
                    return
            with suppress(BaseException):  # whoever asked was told; those who ask next are answered
                self.step()

    def _turn(self) -> None:
        """One step, or the time of one where a thread makes them."""
        if self._thread is None:
            self.step()
        else:
            threading.Event().wait(0.005)

    def _full(self) -> bool:
        return self.max_waiting is not None and len(self._waiting) >= self.max_waiting

    def _limit(self, request: Request) -> int:
        """New tokens that a request can have. Raises `ModelError` or `Faults` for one that cannot be answered."""
        faults: list[IftPeftError] = []

        def need(condition: bool, expected: str, found: object) -> None:
            if not condition:
                faults.append(ModelError(expected=expected, found=str(found), fix="correct the request"))

        tokens = [*request.prompt, *(token for one in request.choices or () for token in one)]
        need(bool(request.prompt), "a prompt of at least one token", "none")
        need(all(0 <= token < self._vocabulary for token in tokens), f"token ids below {self._vocabulary}", "others")
        need(request.max_new_tokens > 0, "max_new_tokens above 0", request.max_new_tokens)
        need(request.temperature >= 0, "a temperature of 0 or more", request.temperature)
        need(0 < request.top_p <= 1, "top_p above 0 and at most 1", request.top_p)
        need(all(request.stop), "stop strings that are not empty", repr(request.stop))
        need(0 <= (request.logprobs or 0) <= self._vocabulary, "logprobs of 0 or more", request.logprobs)
        limit = request.max_new_tokens
        if self.positions is not None:
            left = self.positions - len(request.prompt)
            need(left > 0, f"a prompt shorter than the base's {self.positions} positions", len(request.prompt))
            limit = min(limit, left)
        if request.choices is not None:
            need(bool(request.choices) and all(request.choices), "choices of at least one token each", "an empty one")
            longest = max(map(len, request.choices), default=0)
            need(longest <= limit, f"choices of at most {limit} tokens", longest)
            ends = any(token in self._end_tokens for one in request.choices for token in one[:-1])
            need(not ends, "choices that no end token cuts short", "one inside of a choice")
        raise_all(faults)
        return limit

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._batch.rows if self._is_cancelled(row)]:
            row.cancel()
            self._batch.leave(row)
        with self._wake:
            gone = [row for row in self._waiting if self._is_cancelled(row)]
            if gone:
                self._waiting = deque(row for row in self._waiting if row not in gone)
        for row in gone:
            row.cancel()
            self._batch.release(row)

    def _is_cancelled(self, row: Row) -> bool:
        return self._cancelling or row.stream.cancelled

    def _take_prompts(self) -> None:
        """Take from the queue what there are rows for."""
        longest, batch = 0, self._batch
        with self._wake:
            while self._waiting and len(batch.rows) + len(batch.joining) < self.max_rows:
                longest = max(longest, len(self._waiting[0].stream.request.prompt))
                if batch.joining and longest * (len(batch.joining) + 1) > self._max_prompt_tokens:
                    break
                batch.joining.append(self._waiting.popleft())

    def _running(self) -> AbstractContextManager[Any]:
        return self._lock if self.adapters is None else self.adapters.running()
