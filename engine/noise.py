"""Sampling noise as a pure function of (seed, position): the same on every worker, in every batch."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. Any integers are allowed, modulo 2^64.

    Two rounds of SplitMix64's finaliser (Steele, Lea, Flood 2014), the first over the seed alone, so that the sequences
    of consecutive seeds are unrelated.
    """
    return (_mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
