"""What an engine is asked, and the stream of what it answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ift_peft.infer.sampling import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, the adapter that answers it (None: the base alone), and how.

    Greedy at `temperature` 0. `seed` None draws one. `logprobs` is how many of the likeliest tokens are told beside
    each token with its log-probability; None tells neither. `choices` are the allowed answers, as token ids: exactly
    one of them is given.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    choices: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Piece:
    """Text that is certain, the tokens that came since the last piece, and their log-probabilities if asked for.

    Tokens whose text is held back, as part of a character or of a possible stop string, come with a later piece.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` end with the end token where there was one; `completion_tokens` counts it."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)


class Stream:
    """The answer to one request while it is made: pieces to iterate over, once, or `result` for the whole.

    `on_change`, if given, is called by the engine's thread after each piece and at the end, as to wake an event loop
    that then takes what `ready` has; it must not block.
    """

    def __init__(self, request: Request, seed: int, on_change: Callable[[], None] | None = None) -> None:
        self.request, self.seed = request, seed
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self._on_change = on_change
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._all: list[Piece] = []

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def cancel(self) -> None:
        """End it at the engine's next step, with what was generated; nothing where it has ended."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer, waited for. Raises what the request failed with, or `TimeoutError`."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        if self.error is not None:
            raise self.error
        assert self.completion is not None
        return self.completion

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they come. Raises what the request failed with."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever iterates once more
        if self.error is not None:
            raise self.error

    def ready(self) -> list[Piece]:
        """The pieces that are there, without waiting; `done` says whether more will come, so ask it first."""
        found: list[Piece] = []
        while True:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                return found
            if piece is None:
                self._pieces.put(None)
                return found
            found.append(piece)

    def put(self, piece: Piece) -> None:
        """For the engine."""
        self._all.append(piece)
        self._pieces.put(piece)
        self._changed()

    def end(self, reason: FinishReason) -> None:
        """For the engine."""
        self.completion = Completion(
            text="".join(piece.text for piece in self._all),
            tokens=tuple(token for piece in self._all for token in piece.tokens),
            finish_reason=reason,
            prompt_tokens=len(self.request.prompt),
            seed=self.seed,
            logprobs=tuple(one for piece in self._all for one in piece.logprobs),
        )
        self._close()

    def fail(self, error: Exception) -> None:
        """For the engine."""
        self.error = error
        self._close()

    def _close(self) -> None:
        self._pieces.put(None)
        self._done.set()
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            try:
                self._on_change()
            except BaseException:  # whoever listened is gone, as a closed event loop is; the other requests are not
                self._on_change, self.cancelled = None, True
