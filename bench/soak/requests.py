"""The requests of a soak: what they ask for, by which API, and what their client does to them."""

from dataclasses import dataclass, field
from enum import Enum
from random import Random

FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 4000  # no special tokens
MAX_PROMPT_TOKENS = 2000


class Way(Enum):
    """How a client talks to the router."""

    GRPC = "grpc"
    HTTP = "http"
    HTTP_STREAM = "http stream"
    CHAT_STREAM = "chat stream"


class Behaviour(Enum):
    """What a client does."""

    READS = "reads"
    CANCELS = "cancels"
    READS_SLOWLY = "reads slowly"
    BAD = "bad request"


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """`temperature` 0 is greedy. `prefix`: a shared beginning of the prompt may be in a cache. `bad`: the fields that
    make it one."""

    number: int
    way: Way
    behaviour: Behaviour
    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    n: int = 1
    logprobs: int | None = None
    cancel_after_s: float = 0.0
    bad: dict[str, object] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def http_body(self) -> dict[str, object]:
        body: dict[str, object] = {
            "model": "tiny-python",
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "n": self.n,
            "ignore_eos": True,
            "stream": self.way in (Way.HTTP_STREAM, Way.CHAT_STREAM),
        }
        if self.way is Way.CHAT_STREAM:
            body["messages"] = [{"role": "user", "content": f"write a function number {self.number} that reads a file"}]
            if self.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": self.logprobs}
        else:
            body["prompt"] = list(self.token_ids)
            if self.logprobs is not None:
                body["logprobs"] = self.logprobs
        return body | self.bad


_BAD: tuple[dict[str, object], ...] = (
    {"temperature": -1},
    {"model": "other"},
    {"prompt": [5] * 5000},
    {"prompt": [999_999]},
    {"n": 99},
    {"max_tokens": 0},
    {"logprobs": 21},
    {"unknown_field": 1},
    {"prompt": {}},
)


class MixedRequests:
    """Drawn one after the other. Prompts of 1 to 2,000 tokens, most of them short; a third begins like others."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._shared = [self._ids(MAX_PROMPT_TOKENS) for _ in range(8)]
        self._number = 0

    def next(self) -> SoakRequest:
        draw = self._random
        self._number += 1
        way = draw.choices(list(Way), (4, 2, 3, 1))[0]
        behaviour = draw.choices(list(Behaviour), (16, 2, 1, 1))[0]
        length = int(MAX_PROMPT_TOKENS ** draw.random())
        kept = length // 2 if draw.random() < 1 / 3 else 0
        greedy = draw.random() < 0.6
        reads_slowly = behaviour is Behaviour.READS_SLOWLY  # one choice: those of three would take longer than a minute
        bad: dict[str, object] = {}
        if behaviour is Behaviour.BAD:
            way, bad = Way.HTTP, draw.choice(_BAD)
        return SoakRequest(
            number=self._number,
            way=way,
            behaviour=behaviour,
            token_ids=draw.choice(self._shared)[:kept] + self._ids(length - kept),
            max_tokens=draw.choice((1, 2, 8, 16, 40, 120)) if not reads_slowly else 400,
            temperature=0.0 if greedy else draw.choice((0.7, 1.0, 1.3)),
            seed=draw.randrange(1 << 31),
            n=1 if way is Way.GRPC or reads_slowly or draw.random() < 0.8 else 3,
            logprobs=draw.choice((None, None, 0, 5)),
            cancel_after_s=draw.choice((0.0, 0.01, 0.1, 0.5)) * draw.random(),
            bad=bad,
        )

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(count))


class ShortRequests:
    """Prompts of 1 to 32 tokens and answers of 1 to 4, greedy, over gRPC and HTTP alternately; from a set of
    `NUM_DIFFERENT`, so that every answer is compared with its reference."""

    NUM_DIFFERENT = 512

    def __init__(self, seed: int) -> None:
        draw = Random(seed)
        self._all = [
            SoakRequest(
                number=number,
                way=Way.GRPC if number % 2 else Way.HTTP,
                behaviour=Behaviour.READS,
                token_ids=tuple(
                    draw.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(draw.choice((1, 4, 16, 32)))
                ),
                max_tokens=draw.choice((1, 2, 4)),
                temperature=0.0,
                seed=number,
            )
            for number in range(self.NUM_DIFFERENT)
        ]
        self._count = 0

    def next(self) -> SoakRequest:
        self._count += 1
        return self._all[self._count % self.NUM_DIFFERENT]
