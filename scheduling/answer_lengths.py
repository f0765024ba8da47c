"""How long answers turn out: requests will need less memory than they ask for, since most answers end earlier."""

FIRST_MEAN_TOKENS = 256.0  # until answers have shown it
_MEMORY = 64  # answers; older ones fade exponentially


class AnswerLengths:
    """`mean_tokens` of the last answers. Sums over many requests are near that of their means."""

    __slots__ = ("mean_tokens",)

    def __init__(self) -> None:
        self.mean_tokens = FIRST_MEAN_TOKENS

    def observe(self, num_tokens: int) -> None:
        """An answer has ended with that many tokens."""
        self.mean_tokens += (num_tokens - self.mean_tokens) / _MEMORY

    def expected_tokens(self, at_most: int) -> int:
        """Of an answer that cannot be longer than `at_most`."""
        return min(at_most, max(1, round(self.mean_tokens)))
