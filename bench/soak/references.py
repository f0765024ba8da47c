"""What the answers of a soak should have been: greedy ones by transformers, sampled ones by a repetition at the end."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.soak.clients import COMPLETE, Clients, Ended
from bench.soak.requests import Behaviour, SoakRequest, Way

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
    """Greedy tokens of the checkpoint in float32 on one thread.

    One pass over prompt and answer computes all positions at once: an answer is the greedy one if and only if each of
    its tokens is the likeliest after those before it. Only where one is not, tokens are generated, to have the last
    word on two that are all but equally likely, and something to show."""

    def __init__(self, model: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self._right: dict[tuple[int, ...], tuple[int, ...]] = {}

    def greedy(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> tuple[int, ...]:
        """What `given` should be."""
        if self._right.get(prompt, ())[: len(given)] != given:
            is_right = self._likeliest(prompt, given) == given
            self._right[prompt] = given if is_right else self._generate(prompt, len(given))
        return self._right[prompt][: len(given)]

    def text(self, token_ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _likeliest(self, prompt: tuple[int, ...], given: tuple[int, ...]) -> tuple[int, ...]:
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + given[:-1]]), logits_to_keep=len(given)).logits
        return tuple(logits[0].argmax(-1).tolist())

    def _generate(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        torch = self._torch
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(output[0, len(prompt) :].tolist())


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
            expected = await _greedy_answers(request, given, reference, clients)
        else:
            by_repetition += 1
            again = dataclasses.replace(request, behaviour=Behaviour.READS)  # reading slowly has been tried
            expected = _answers(await clients.send(again))
        if given != expected:
            wrong.append(WrongAnswer(request, given, expected))
        on_done()
    return Checked(by_transformers, by_repetition, tuple(wrong))


async def _greedy_answers(
    request: SoakRequest, given: tuple[Answer, ...], reference: TransformersReference, clients: Clients
) -> tuple[Answer, ...]:
    """HTTP gives no token ids, so those of a text are asked for over gRPC. Transformers judges them, and its tokenizer
    says what text they are."""
    over_grpc = dataclasses.replace(request, way=Way.GRPC, n=1, logprobs=None, behaviour=Behaviour.READS)
    token_ids = given[0] if request.way is Way.GRPC else _answers(await clients.send(over_grpc))[0]
    if isinstance(token_ids, str):
        return (token_ids,)
    right = reference.greedy(request.token_ids, token_ids)
    return (right if request.way is Way.GRPC else reference.text(right),) * request.n


def _answers(ended: Ended) -> tuple[Answer, ...]:
    return ended.answers if ended.answers is not None else (f"{ended.outcome}: {ended.detail}",)
