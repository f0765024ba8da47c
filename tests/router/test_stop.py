from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from tandem.router.stop import StopMatcher, StopStrings

WORDS = st.text("ab", min_size=1, max_size=5)


def expected(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The stop string that is complete first counts, and of those that end together the longest."""
    found = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text, False
    end, minus_length = min(found)
    return text[: end + minus_length], True


def run(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(StopStrings(stops))
    out: list[str] = []
    for piece in pieces:
        text, found = matcher.push(piece)
        out.append(text)
        if found:
            return out, True
    return [*out, matcher.flush()], False


@given(pieces=st.lists(st.text("ab", max_size=6), max_size=12), stops=st.lists(WORDS, min_size=1, max_size=4))
@example(pieces=["abc", "d"], stops=["abcd", "bc"])
@example(pieces=["aab", "a", "ab"], stops=["aabaab", "b"])
def test_the_answer_does_not_depend_on_token_borders(pieces: list[str], stops: list[str]) -> None:
    out, found = run(pieces, stops)
    assert ("".join(out), found) == expected("".join(pieces), stops)


@given(pieces=st.lists(st.text("ab", max_size=6), max_size=12), stops=st.lists(WORDS, min_size=1, max_size=4))
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    read = given_out = ""
    for piece in pieces:
        text, found = matcher.push(piece)
        if found:
            return
        read, given_out = read + piece, given_out + text
        held = read.removeprefix(given_out)
        assert given_out + held == read
        ends = (read[start:] for start in range(len(read) + 1))
        assert held == next(end for end in ends if any(stop.startswith(end) for stop in stops))


def test_long_repetitive_texts_are_read_once() -> None:
    """Whoever looks back over the whole stop string at each character needs minutes for this."""
    stop = "a" * 1000 + "b"
    out, found = run(["a" * 50] * 4000 + ["b"], [stop])
    assert found
    assert "".join(out) == "a" * (200_000 - 1000)


def test_special_characters_mean_nothing() -> None:
    out, found = run(["x.*", "(y", ")z"], [".*(y)"])
    assert (found, "".join(out)) == (True, "x")
