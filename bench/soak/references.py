"""What the answers of a soak should have been: greedy ones by transformers, sampled ones by a repetition at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.soak.clients import COMPLETE, Clients, Ended
from bench.soak.requests import SoakRequest, Way

Answer = tuple[int, ...] | str


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    request: SoakRequest
    given: tuple[Answer, ...]
    expected: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """How many answers were compared with transformers, and with a repetition; those that differ."""

    by_transformers: int
    by_repetition: int
    wrong: tuple[WrongAnswer, ...]


class TransformersReference:
    """Greedy tokens of the checkpoint in float32 on one thread. Each request is computed once."""

    def __init__(self, model: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self._tokens: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def answer(self, request: SoakRequest) -> Answer:
        """Token ids over gRPC, text over HTTP."""
        tokens = self._greedy(request.token_ids, request.max_tokens)
        return tokens if request.way is Way.GRPC else str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _greedy(self, token_ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        key = (token_ids, max_tokens)
        if key not in self._tokens:
            torch = self._torch
            with torch.inference_mode():
                output = self._model.generate(
                    torch.tensor([token_ids]),
                    attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    min_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self._tokens[key] = tuple(output[0, len(token_ids) :].tolist())
        return self._tokens[key]


class AnswerSample:
    """A share of the complete answers, drawn while they come."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._random = Random(seed)
        self.kept: list[Ended] = []

    def offer(self, ended: Ended) -> None:
        if ended.outcome == COMPLETE and self._random.random() < self._share:
            self.kept.append(ended)


async def check(kept: Sequence[Ended], clients: Clients, model: Path, on_done: Callable[[], None]) -> Checked:
    """Compare each answer. Chat prompts are rendered by the router, so chats are compared with a repetition, as sampled
    answers are. The cluster has nothing else to do meanwhile."""
    reference = TransformersReference(model)
    by_transformers = by_repetition = 0
    wrong = []
    for ended in kept:
        request, given = ended.request, ended.answers
        assert given is not None, "the sample has complete answers only"
        if request.is_greedy and request.way is not Way.CHAT_STREAM:
            by_transformers += 1
            expected: tuple[Answer, ...] = (reference.answer(request),) * request.n
        else:
            by_repetition += 1
            again = await clients.send(request)
            expected = again.answers if again.answers is not None else (f"{again.outcome}: {again.detail}",)
        if given != expected:
            wrong.append(WrongAnswer(request, given, expected))
        on_done()
    return Checked(by_transformers, by_repetition, tuple(wrong))
