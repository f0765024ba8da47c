"""Responses of /v1/chat/completions and /v1/completions: one JSON object, or the chunks of a stream."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import orjson

from tandem.core.completion import CompletionRequest, Finish, TextDelta, TextPrompt
from tandem.core.errors import InternalError, TandemError
from tandem.core.request import FinishReason, SampledToken, TokenLogprob
from tandem.core.timeline import Stage, Timeline
from tandem.router.openai.logprobs import LegacyLogprobs, escaped, finite, text_or_none
from tandem.router.tokenizer import TextTokenizer

_DONE = b"data: [DONE]\n\n"
_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}


def error_body(error: TandemError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": None if isinstance(error, InternalError) else error.code,
        }
    }


def error_events(error: TandemError) -> bytes:
    """The end of a stream that fails after its first event."""
    return _event(error_body(error)) + _DONE


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """`usage_chunk`: a stream ends with a chunk for usage; `usage_in_chunks`: every chunk has the usage so far."""

    created_s: int
    with_logprobs: bool
    with_timelines: bool
    usage_chunk: bool
    usage_in_chunks: bool

    @property
    def has_plain_chunks(self) -> bool:
        """Whether a chunk may have nothing but text."""
        return not (self.with_logprobs or self.usage_in_chunks)


@dataclass(slots=True)
class _ChoiceSoFar:
    """`logprobs` has the lists of the log-probabilities, in JSON without brackets, one piece for each delta: objects
    for all tokens of a long response would take much memory, and the garbage collector's time."""

    texts: list[str] = field(default_factory=list)
    logprobs: dict[str, list[bytes]] | None = None
    finish: Finish | None = None

    def add_logprobs(self, logprobs: dict[str, Any]) -> None:
        if self.logprobs is None:
            self.logprobs = {name: [] for name in logprobs}
        for name, values in logprobs.items():
            if values:
                self.logprobs[name].append(orjson.dumps(values)[1:-1])

    def all_logprobs(self) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {name: orjson.Fragment(b"[" + b",".join(pieces) + b"]") for name, pieces in self.logprobs.items()}


class _ResponseWriter(ABC):
    """Writes the response to one request. `begin` comes first.

    For a stream: `chunks` with every delta, then `last_events`. Otherwise: `collect` with every delta, then `response`.
    """

    chunk_type: ClassVar[str]
    response_type: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(
        self,
        request: CompletionRequest,
        tokenizer: TextTokenizer,
        options: ResponseOptions,
        *,
        chunk_with_nul: dict[str, Any],
        hides_output: bool = False,
    ) -> None:
        """`chunk_with_nul` is the content of a chunk whose text is a NUL character."""
        self._request = request
        self._tokenizer = tokenizer
        self._options = options
        self._hides_output = hides_output
        self._head = {
            "id": f"{self.id_prefix}-{request.request_id}",
            "object": self.chunk_type,
            "created": options.created_s,
            "model": request.model,
        }
        self._prompt_token_ids: tuple[tuple[int, ...], ...] = ()
        self._num_output_tokens = 0
        self._choices_per_prompt = request.n  # not checked yet: nothing may be allocated for it
        self._choices: list[_ChoiceSoFar] = []
        # Most chunks of a stream differ only in their text, so only the text of such a chunk is encoded.
        self._before_text, self._after_text = self._chunk(0, chunk_with_nul).split(orjson.dumps("\0"))
        self._is_plain = False  # whether the next chunk of choice 0 has only text, if it is not the choice's last one

    def begin(self, prompt_token_ids: tuple[tuple[int, ...], ...]) -> None:
        """The request was accepted."""
        self._prompt_token_ids = prompt_token_ids
        self._choices = [_ChoiceSoFar() for _ in range(len(prompt_token_ids) * self._choices_per_prompt)]

    def chunks(self, delta: TextDelta) -> bytes:
        """Events for one delta; empty if the delta shows nothing."""
        if delta.finish is not None:
            self._choices[delta.choice].finish = delta.finish
        elif self._is_plain and delta.choice == 0:
            return self._before_text + orjson.dumps(delta.text) + self._after_text if delta.text else b""
        if self._options.usage_in_chunks and not self._hides_output:
            self._num_output_tokens += len(delta.tokens) + (delta.stop_token is not None)
        return self._chunks_of(delta)

    def last_events(self) -> bytes:
        if not self._options.usage_chunk:
            return _DONE
        return _event({**self._head, "choices": [], "usage": self._usage()}) + _DONE

    def collect(self, delta: TextDelta) -> None:
        choice = self._choices[delta.choice]
        text, logprobs = self._part(delta)
        choice.texts.append(text)
        if logprobs is not None:
            choice.add_logprobs(logprobs)
        choice.finish = delta.finish

    def response(self) -> bytes:
        choices = []
        for index, choice in enumerate(self._choices):
            assert choice.finish is not None, "every choice ends with a finish"
            reason = _FINISH_REASONS[choice.finish.reason]
            content = self._content("".join(choice.texts), choice.all_logprobs())
            choices.append({"index": index, **content, "finish_reason": reason})
        return orjson.dumps({**self._head, "object": self.response_type, "choices": choices, "usage": self._usage()})

    @abstractmethod
    def _chunks_of(self, delta: TextDelta) -> bytes: ...

    @abstractmethod
    def _part(self, delta: TextDelta) -> tuple[str, dict[str, Any] | None]:
        """What a delta adds to a response: text, and lists of log-probabilities."""

    @abstractmethod
    def _content(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A choice of a response, without index and finish reason."""

    def _chunk(
        self,
        choice: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        entry = {"index": choice, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        body: dict[str, Any] = {**self._head, "choices": [entry]}
        if self._options.usage_chunk:
            body["usage"] = self._token_counts(self._num_output_tokens) if self._options.usage_in_chunks else None
        return _event(body)

    def _token_counts(self, num_output_tokens: int) -> dict[str, Any]:
        """A prompt counts once, whatever its number of choices."""
        num_prompt_tokens = sum(map(len, self._prompt_token_ids))
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
        }

    def _usage(self) -> dict[str, Any]:
        """With timelines: `tandem.timeline` is that of choice 0; `tandem.timelines` has all, if there are several."""
        finishes = [choice.finish for choice in self._choices if choice.finish is not None]
        assert len(finishes) == len(self._choices), "every choice ends with a finish"
        num_output_tokens = 0 if self._hides_output else sum(finish.num_output_tokens for finish in finishes)
        num_cached_tokens = sum(finish.timeline.num_cached_tokens for finish in finishes[:: self._request.n])
        usage = self._token_counts(num_output_tokens)
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        if self._options.with_timelines:
            timelines = [_timeline_body(finish.timeline) for finish in finishes]
            usage["tandem"] = {"timeline": timelines[0]} | ({"timelines": timelines} if len(timelines) > 1 else {})
        return usage


class ChatWriter(_ResponseWriter):
    """Writes a response of /v1/chat/completions."""

    chunk_type = "chat.completion.chunk"
    response_type = "chat.completion"
    id_prefix = "chatcmpl"

    def __init__(self, request: CompletionRequest, tokenizer: TextTokenizer, options: ResponseOptions) -> None:
        super().__init__(request, tokenizer, options, chunk_with_nul={"delta": {"content": "\0"}})
        self._begun: set[int] = set()

    def _chunks_of(self, delta: TextDelta) -> bytes:
        events = b""
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            self._is_plain = 0 in self._begun and self._options.has_plain_chunks
            events += self._chunk(delta.choice, {"delta": {"role": "assistant", "content": "", "refusal": None}})
        if delta.text or (self._options.with_logprobs and delta.tokens):
            events += self._chunk(delta.choice, {"delta": {"content": delta.text}}, self._logprobs(delta.tokens))
        if delta.finish is not None:
            events += self._chunk(delta.choice, {"delta": {}}, finish_reason=_FINISH_REASONS[delta.finish.reason])
        return events

    def _part(self, delta: TextDelta) -> tuple[str, dict[str, Any] | None]:
        logprobs = self._logprobs(delta.tokens)
        return delta.text, None if logprobs is None else {"content": logprobs["content"]}

    def _content(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": None if logprobs is None else logprobs | {"refusal": None}}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self._options.with_logprobs:
            return None
        content = [
            self._logprob(token.token_id, token.logprob.logprob)
            | {"top_logprobs": [self._logprob(token_id, logprob) for token_id, logprob in token.logprob.top]}
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        """`token` of a part of a character has its bytes as \\x.., as OpenAI's API has it."""
        spelling = self._tokenizer.spelling(token_id)
        name = text_or_none(spelling)
        return {
            "token": escaped(spelling) if name is None else name,
            "logprob": finite(logprob),
            "bytes": list(spelling),
        }


class CompletionWriter(_ResponseWriter):
    """Writes a response of /v1/completions.

    With `echo` each choice begins with its prompt. With `hides_output` (max_tokens 0) a choice has nothing else.
    """

    chunk_type = response_type = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        request: CompletionRequest,
        tokenizer: TextTokenizer,
        options: ResponseOptions,
        *,
        echo: bool,
        hides_output: bool,
    ) -> None:
        super().__init__(request, tokenizer, options, chunk_with_nul={"text": "\0"}, hides_output=hides_output)
        self._is_plain = options.has_plain_chunks and not echo
        self._echo = echo
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}

    def _chunks_of(self, delta: TextDelta) -> bytes:
        text, logprobs = self._part(delta)
        reason = None if delta.finish is None else _FINISH_REASONS[delta.finish.reason]
        if not text and logprobs is None and reason is None:
            return b""
        return self._chunk(delta.choice, {"text": text}, logprobs, reason)

    def _part(self, delta: TextDelta) -> tuple[str, dict[str, Any] | None]:
        return self._text(
            delta.choice, delta.text, delta.tokens, delta.prompt_logprobs, is_last=delta.finish is not None
        )

    def _content(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def _text(
        self,
        choice: int,
        text: str,
        tokens: Sequence[SampledToken],
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None,
        *,
        is_last: bool,
    ) -> tuple[str, dict[str, Any] | None]:
        """New text and its log-probabilities; the first call for a choice puts the echo before them."""
        is_first = choice not in self._begun
        self._begun.add(choice)
        if self._hides_output:
            text, tokens = "", ()
        prompt = choice // self._request.n
        echoed = self._prompt_text(prompt) if is_first and self._echo else ""
        if not self._options.with_logprobs:
            return echoed + text, None
        if is_first:
            ids = self._prompt_token_ids[prompt]
            self._logprobs[choice] = LegacyLogprobs(self._tokenizer, ids, echo=self._echo)
        logprobs = self._logprobs[choice]
        if is_first and self._echo:
            if prompt_logprobs is not None:
                self._prompt_logprobs[prompt] = prompt_logprobs
            logprobs.add_prompt(echoed, self._prompt_logprobs.get(prompt, ()))
        logprobs.add(text, tokens)
        return echoed + text, logprobs.take(is_last=is_last)

    def _prompt_text(self, index: int) -> str:
        prompt = self._request.prompts[index]
        if isinstance(prompt, TextPrompt):
            return prompt.text
        return self._tokenizer.decode(self._prompt_token_ids[index], is_continued=not self._hides_output)


def _timeline_body(timeline: Timeline) -> dict[str, Any]:
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
