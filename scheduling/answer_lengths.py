"""The mean length of recent answers: most end before `max_tokens`, so requests need less memory than they may."""

FIRST_MEAN_TOKENS = 256.0  # before any answer has ended
_MEMORY = 64  # answers after which the weight of an older one has fallen to 1/e


class AnswerLengths:
    """`mean_tokens` is the exponential moving average. The sum over many requests is close to the sum of means."""

    __slots__ = ("mean_tokens",)

    def __init__(self) -> None:
        self.mean_tokens = FIRST_MEAN_TOKENS

    def observe(self, num_tokens: int) -> None:
        """An answer of `num_tokens` tokens has ended."""
        self.mean_tokens += (num_tokens - self.mean_tokens) / _MEMORY

    def expected_tokens(self, at_most: int) -> int:
        """Expected length of an answer that has at most `at_most` tokens."""
        return min(at_most, max(1, round(self.mean_tokens)))
