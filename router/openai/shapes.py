"""Parts of OpenAI's answers that both endpoints share: errors, usage, timelines, log-probabilities."""

from dataclasses import dataclass, field
from typing import Any

from tandem.core.completion import Delta, Finish
from tandem.core.errors import InternalError, TandemError
from tandem.core.request import FinishReason, SampledToken, TokenLogprob
from tandem.core.timeline import Stage, Timeline
from tandem.router.tokenizer import TextTokenizer

DONE = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity

FINISH_WORDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}


def error_body(error: TandemError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": None if isinstance(error, InternalError) else error.code,
        }
    }


@dataclass(slots=True)
class Answer:
    """One choice as collected so far."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish = delta.finish

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def timeline_body(timeline: Timeline) -> dict[str, Any]:
    """Seconds since the router received the request; the parts sum to `total_s`."""
    received_s = timeline.stamps[Stage.RECEIVED]
    stages = sorted((at_s - received_s, stage.value) for stage, at_s in timeline.stamps.items())
    return {
        "stages": {name: at_s for at_s, name in stages},
        "parts": timeline.parts(),
        "total_s": timeline.total_s,
        "ttft_s": timeline.ttft_s,
        "tpot_s": timeline.tpot_s,
        "num_attempts": timeline.num_attempts,
    }


def usage_body(
    finishes: list[Finish], *, num_prompt_tokens: int, num_output_tokens: int, n: int, with_timelines: bool
) -> dict[str, Any]:
    """`finishes` of all choices in order, `n` of them per prompt; a prompt counts once, as does what was cached of it.

    With timelines: `tandem.timeline` is the first choice's; with several choices, `tandem.timelines` has them all.
    """
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(finish.timeline.num_cached_tokens for finish in finishes[::n])},
    }
    if with_timelines:
        timelines = [timeline_body(finish.timeline) for finish in finishes]
        usage["tandem"] = {"timeline": timelines[0]} | ({"timelines": timelines} if len(timelines) > 1 else {})
    return usage


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def chat_logprobs(tokens: list[SampledToken], tokenizer: TextTokenizer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelling = tokenizer.spelling(token_id)
        return {"token": spelling.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelling)}

    content = [
        entry(token.token_id, token.logprob.logprob)
        | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.logprob.top]}
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """The `logprobs` object of /v1/completions, chunk by chunk; offsets are those of the returned text.

    `top_logprobs` always has the drawn token, so it may hold one more than was asked for.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def body(self, tokens: list[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """Of (token id, log-probability), where only the very first token of a prompt has none."""
        names = [self._tokenizer.spelling(token_id).decode(errors="replace") for token_id, _ in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [None if logprob is None else _finite(logprob.logprob) for _, logprob in tokens],
            "top_logprobs": [None if logprob is None else self._top(logprob) for _, logprob in tokens],
            "text_offset": offsets,
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        likeliest = ((logprob.token_id, logprob.logprob), *logprob.top)
        return {self._tokenizer.spelling(token_id).decode(errors="replace"): _finite(lp) for token_id, lp in likeliest}
