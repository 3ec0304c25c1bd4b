"""Seeds of everything random, each a function of its purpose."""

from __future__ import annotations

from functools import reduce

STRIDE = 1_000_003
"""Between the seeds of two numbered parts: a prime larger than the numbers of samples in one set."""


def derive(*parts: int) -> int:
    """The seed of one of many draws.

    A polynomial in `STRIDE` whose coefficients are the parts. Parts that differ in the last one alone never collide:
    torch's CPU generator uses the lower 32 bits of a seed, and the last part is added to them.

    Args:
        parts: what the draw is for, from the general to the particular, such as the run's seed and a sample's number.

    Returns:
        In [0, 2^63).

    >>> derive(7), derive(0, 5), derive(2, 5)
    (7, 5, 2000011)
    """
    return reduce(lambda seed, part: seed * STRIDE + part, parts) % 2**63
