import random

from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.noise import uniform

_integers = st.integers(min_value=-(1 << 70), max_value=1 << 70)


def test_known_values() -> None:
    """They are part of what a seeded request promises: changing them changes every answer."""
    assert [uniform(0, 0), uniform(0, 1), uniform(42, 7)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.7347204584623639,
    ]


@given(_integers, _integers)
def test_is_a_53_bit_number_below_one(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert (value * 2**53).is_integer()


def test_is_spread_evenly_over_seeds_and_positions() -> None:
    """Chi-square over 64 cells, 63 degrees of freedom: 103 is exceeded once in a thousand sound generators."""
    rows = {
        "positions": [uniform(1, n) for n in range(6400)],
        "seeds": [uniform(n, 1) for n in range(6400)],
        "far seeds": [uniform(random.Random(n).getrandbits(64), 3) for n in range(6400)],
    }
    for name, values in rows.items():
        counts = [0] * 64
        for value in values:
            counts[int(value * 64)] += 1
        assert sum((count - 100) ** 2 / 100 for count in counts) < 103, name


def test_neighbouring_seeds_are_not_shifted_copies() -> None:
    first = [uniform(1, n) for n in range(1000)]
    assert not set(first) & {uniform(2, n) for n in range(1000)}
