"""Requests of a test, and what their clients have received so far. Each answer is read by a thread of its own."""

import itertools
import threading
import time
import uuid
from dataclasses import dataclass

from tandem import Client
from tandem.core.errors import TandemError
from tandem.core.timeline import Timeline


@dataclass(frozen=True)
class Ask:
    """Sampled with a seed, so that a wrong position, a wrong context and a repeated token all show."""

    token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    timeout_s: float = 60.0


def asks(count: int, *, prompt_tokens: int = 24, max_tokens: int = 60, timeout_s: float = 60.0) -> list[Ask]:
    return [
        Ask(tuple(3 + (7919 * (i + 1) + 31 * j) % 4000 for j in range(prompt_tokens)), max_tokens, i, timeout_s)
        for i in range(count)
    ]


class Answer:
    """Begins at once. `tokens` and `times_s` grow while it is read."""

    def __init__(self, client: Client, ask: Ask) -> None:
        self.ask = ask
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.timeline: Timeline | None = None
        self.error: TandemError | None = None
        self._stream = client.stream(
            token_ids=ask.token_ids,
            max_tokens=ask.max_tokens,
            temperature=0.8,
            seed=ask.seed,
            ignore_eos=True,
            cache_salt=uuid.uuid4().hex,  # every prompt is computed
            timeout_s=ask.timeout_s,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_done(self) -> bool:
        return not self._reader.is_alive()

    def wait(self, timeout_s: float = 60.0) -> tuple[int, ...]:
        """All its tokens. Raises what the client got instead."""
        self._reader.join(timeout_s)
        assert self.is_done, f"no answer within {timeout_s} s; {len(self.tokens)} tokens are here"
        if self.error is not None:
            raise self.error
        return tuple(self.tokens)

    @property
    def num_attempts(self) -> int:
        assert self.timeline is not None, "known once the answer is complete"
        return self.timeline.num_attempts

    def longest_gap_s(self, since_s: float) -> float:
        """Between two of its messages, from `since_s` on (monotonic)."""
        times_s = [since_s, *(time_s for time_s in self.times_s if time_s > since_s)]
        return max((b - a for a, b in itertools.pairwise(times_s)), default=0.0)

    def cancel(self) -> None:
        self._stream.close()

    def _read(self) -> None:
        try:
            for delta in self._stream:
                self.tokens.extend(delta.token_ids)
                self.times_s.append(time.monotonic())
                self.timeline = delta.timeline or self.timeline
        except TandemError as error:
            self.error = error


def answer(client: Client, wanted: list[Ask]) -> list[Answer]:
    return [Answer(client, ask) for ask in wanted]


def tokens_of(client: Client, wanted: list[Ask]) -> list[tuple[int, ...]]:
    """All at once, complete."""
    return [each.wait() for each in answer(client, wanted)]
