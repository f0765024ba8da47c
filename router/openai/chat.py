"""Answers of /v1/chat/completions: one JSON object, or server-sent events."""

from typing import Any

import orjson

from tandem.core.completion import Delta
from tandem.router.openai.shapes import FINISH_WORDS, Answer, chat_logprobs
from tandem.router.tokenizer import TextTokenizer


class ChatWriter:
    """Writes one request's answer. `usage_chunk` says whether the stream ends with a chunk for usage."""

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        created_s: int,
        tokenizer: TextTokenizer,
        with_logprobs: bool,
        usage_chunk: bool,
    ) -> None:
        self._head = {"id": f"chatcmpl-{request_id}", "created": created_s, "model": model}
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._usage_chunk = usage_chunk
        self._begun: set[int] = set()
        # A stream is mostly one chunk, again and again: only the text in it is new, so only the text is encoded.
        chunk = self._chunk([{"index": 0, "delta": {"content": "\0"}, "logprobs": None, "finish_reason": None}])
        self._before, self._after = chunk.split(orjson.dumps("\0"))

    def begin(self, prompt_token_ids: tuple[tuple[int, ...], ...]) -> None:
        """Prompts are not repeated here."""

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._usage_chunk:
            body["usage"] = usage
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def chunks(self, delta: Delta) -> bytes:
        """Events for one delta; none if there is nothing to say yet."""
        if delta.choice == 0 and not self._with_logprobs and delta.finish is None and 0 in self._begun:
            return self._before + orjson.dumps(delta.text) + self._after if delta.text else b""
        events = b""
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            events += self._event(delta.choice, {"role": "assistant", "content": "", "refusal": None})
        if delta.text or (self._with_logprobs and delta.tokens):
            logprobs = chat_logprobs(list(delta.tokens), self._tokenizer) if self._with_logprobs else None
            events += self._event(delta.choice, {"content": delta.text}, logprobs)
        if delta.finish is not None:
            events += self._event(delta.choice, {}, finish_word=FINISH_WORDS[delta.finish.reason])
        return events

    def _event(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_word: str | None = None,
    ) -> bytes:
        return self._chunk([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_word}])

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return self._chunk([], usage) if self._usage_chunk else b""

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion", "choices": self._choices(answers), "usage": usage}

    def _choices(self, answers: list[Answer]) -> list[dict[str, Any]]:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finish is not None
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": chat_logprobs(answer.tokens, self._tokenizer) if self._with_logprobs else None,
                    "finish_reason": FINISH_WORDS[answer.finish.reason],
                }
            )
        return choices
