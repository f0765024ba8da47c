"""Answers of /v1/completions: one JSON object, or server-sent events."""

from collections.abc import Sequence
from typing import Any

import orjson

from tandem.core.completion import Delta, Prompt, TextPrompt
from tandem.core.request import SampledToken, TokenLogprob
from tandem.router.openai.shapes import FINISH_WORDS, Answer, LegacyLogprobs
from tandem.router.tokenizer import TextTokenizer


class CompletionWriter:
    """Writes one request's answer; `n` choices belong to each prompt.

    With `echo` each answer begins with its prompt. With `is_silent` nothing else is in it (max_tokens 0).
    """

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        created_s: int,
        tokenizer: TextTokenizer,
        with_logprobs: bool,
        usage_chunk: bool,
        prompts: tuple[Prompt, ...],
        n: int,
        echo: bool,
        is_silent: bool,
    ) -> None:
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created_s, "model": model}
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._usage_chunk = usage_chunk
        self._prompts = prompts
        self._n = n
        self._echo = echo
        self._is_silent = is_silent
        self._prompt_token_ids: tuple[tuple[int, ...], ...] = ()
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        chunk = self._chunk([{"index": 0, "text": "\0", "logprobs": None, "finish_reason": None}])
        self._before, self._after = chunk.split(orjson.dumps("\0"))

    def begin(self, prompt_token_ids: tuple[tuple[int, ...], ...]) -> None:
        """Must be called before anything is written."""
        self._prompt_token_ids = prompt_token_ids

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self._usage_chunk:
            body["usage"] = usage
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def chunks(self, delta: Delta) -> bytes:
        """Events for one delta; none if there is nothing to say yet."""
        plain = not self._echo and not self._with_logprobs
        if delta.choice == 0 and plain and delta.finish is None:
            return self._before + orjson.dumps(delta.text) + self._after if delta.text else b""
        text, logprobs = self._body(delta.choice, delta.text, delta.tokens, delta.prompt_logprobs)
        word = None if delta.finish is None else FINISH_WORDS[delta.finish.reason]
        if not text and logprobs is None and word is None:
            return b""
        return self._chunk([{"index": delta.choice, "text": text, "logprobs": logprobs, "finish_reason": word}])

    def _body(
        self,
        choice: int,
        text: str,
        tokens: Sequence[SampledToken],
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None,
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of what is new; the first time also the echo's."""
        first = choice not in self._logprobs
        writer = self._logprobs.setdefault(choice, LegacyLogprobs(self._tokenizer))
        if self._is_silent:
            text, tokens = "", ()
        listed: list[tuple[int, TokenLogprob | None]] = []
        if first and self._echo:
            prompt = choice // self._n
            text = self._prompt_text(prompt) + text
            if prompt_logprobs is not None:
                self._prompt_logprobs[prompt] = prompt_logprobs
            known = self._prompt_logprobs.get(prompt, ())
            listed += zip(self._prompt_token_ids[prompt], known, strict=False)
        listed += [(token.token_id, token.logprob) for token in tokens]
        return text, writer.body(listed) if self._with_logprobs and listed else None

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompts[index]
        return prompt.text if isinstance(prompt, TextPrompt) else self._tokenizer.decode(self._prompt_token_ids[index])

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return self._chunk([], usage) if self._usage_chunk else b""

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finish is not None
            text, logprobs = self._body(index, answer.text, answer.tokens, answer.prompt_logprobs)
            word = FINISH_WORDS[answer.finish.reason]
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": word})
        return {**self._head, "choices": choices, "usage": usage}
