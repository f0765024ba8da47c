"""Stop strings: a choice ends before the first complete stop string, wherever the token boundaries are.

An Aho-Corasick automaton over the stop strings reads each character once. Its state is the longest suffix of the text
that is a prefix of a stop string; the length of this suffix (the state's depth) is the length of the text to hold back.
The text alone, and not its tokens, decides which stop string ends the choice: the one that is complete first, and the
longest of those that are complete at the same character.
"""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of one request's stop strings; immutable, shared by the request's choices."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "a stop string is not empty"
        self.edges: list[dict[str, int]] = [{}]
        self.fallback: list[int] = [0]
        self.depth: list[int] = [0]
        self.matched: list[int] = [0]  # length of the longest stop string that ends in this state
        for string in strings:
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        state = 0
        for char in string:
            following = self.edges[state].get(char)
            if following is None:
                following = len(self.edges)
                self.edges[state][char] = following
                self.edges.append({})
                self.fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = following
        self.matched[state] = len(string)

    def _link(self) -> None:
        """Set the fallbacks breadth first, since each needs those of shorter states."""
        queue = deque(self.edges[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self.edges[state].items():
                self.fallback[following] = self.step(self.fallback[state], char)
                self.matched[following] = max(self.matched[following], self.matched[self.fallback[following]])
                queue.append(following)

    def step(self, state: int, char: str) -> int:
        while (following := self.edges[state].get(char)) is None:
            if state == 0:
                return 0
            state = self.fallback[state]
        return following


class StopMatcher:
    """Finds stop strings in the text of one choice. Linear in the length of the text."""

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """New text -> (text to send now, whether a stop string is complete). After True, push no more text."""
        strings, state = self._strings, self._state
        for index, char in enumerate(text):
            state = strings.step(state, char)
            if length := strings.matched[state]:
                read = self._held + text[: index + 1]
                self._held = ""
                return read[: len(read) - length], True
        self._state = state
        text = self._held + text
        cut = len(text) - strings.depth[state]
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The text that is held back, for a choice that ends without a stop string."""
        held, self._held = self._held, ""
        return held
