"""The text of one choice, from the tokens of its generation."""

from collections.abc import AsyncGenerator

from tandem.core.completion import Finish, TextDelta
from tandem.core.generation import Generation
from tandem.core.request import FinishReason, SampledToken
from tandem.router.stop import StopMatcher, StopStrings
from tandem.router.tokenizer import TextTokenizer


class ChoiceStream:
    """The deltas of one choice, from the tokens of its generation."""

    def __init__(
        self,
        index: int,
        generation: Generation,
        tokenizer: TextTokenizer,
        stop_strings: StopStrings | None,
        *,
        echo: bool = False,
    ) -> None:
        self.index = index
        self._generation = generation
        self._detokenizer = tokenizer.detokenizer(generation.request.token_ids, keeps_prompt_end=echo)
        self._matcher = None if stop_strings is None else StopMatcher(stop_strings)
        self._stop_ids = frozenset(generation.request.sampling.stop_token_ids)
        self._num_tokens = 0

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Ends after the delta with a finish; closes the generation in every case."""
        try:
            wants_prompt = self._generation.request.sampling.prompt_logprobs is not None
            async for tokens in self._generation:
                self._num_tokens += len(tokens)
                delta, found = self._read(tokens)
                if wants_prompt:
                    delta = delta._replace(prompt_logprobs=self._generation.prompt_logprobs)
                    wants_prompt = False
                if found:
                    self._generation.finish_reason = FinishReason.STOP
                    await self._generation.aclose()
                    yield delta._replace(finish=self._finish(FinishReason.STOP))
                    return
                yield delta
            text, found = self._rest()
            reason = FinishReason.STOP if found else self._generation.finish_reason
            assert reason is not None, "a generation that ends without an error has a finish reason"
            yield TextDelta(self.index, text, finish=self._finish(reason))
        finally:
            await self._generation.aclose()

    def _read(self, tokens: tuple[SampledToken, ...]) -> tuple[TextDelta, bool]:
        """The delta, and whether it ends the choice because of a stop string.

        Only the last token can be a stop token: the workers end the generation with it.
        """
        stop_token = None
        if tokens[-1].token_id in self._stop_ids:
            tokens, stop_token = tokens[:-1], tokens[-1]
        push = self._detokenizer.push
        text = push(tokens[0].token_id) if len(tokens) == 1 else "".join([push(token.token_id) for token in tokens])
        if self._matcher is None:
            return TextDelta(self.index, text, tokens, stop_token), False
        text, found = self._matcher.push(text)
        return TextDelta(self.index, text, tokens, stop_token), found

    def _rest(self) -> tuple[str, bool]:
        """Text that was held back until the last token, and whether it completes a stop string."""
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text, False
        text, found = self._matcher.push(text)
        return text if found else text + self._matcher.flush(), found

    def _finish(self, reason: FinishReason) -> Finish:
        return Finish(reason, self._generation.timeline(), self._num_tokens)
