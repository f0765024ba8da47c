"""Sums and messages are measured between real processes, with the collectives of instances."""

import pytest

from tandem.core.parallel import ParallelShape
from tandem.profiling.collective_profile import Operation, measure_collective, measure_collectives
from tandem.profiling.errors import MeasurementError

SIZES = (1 << 10, 1 << 22)


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "ranks"), [("all_reduce", 2), ("all_reduce", 3), ("send", 3)])
def test_larger_ones_take_longer(operation: Operation, ranks: int) -> None:
    measured = measure_collective(operation, ranks, "cpu", SIZES)
    assert (measured.operation, measured.ranks) == (operation, ranks)
    small, large = measured.times
    assert 0 < small.seconds < large.seconds
    assert measured.cost.seconds(SIZES[0]) < measured.cost.seconds(SIZES[1])


def test_instances_of_one_rank_need_none() -> None:
    assert list(measure_collectives([ParallelShape()], "cpu")) == []


@pytest.mark.slow
def test_a_rank_that_fails_is_reported_with_its_last_line() -> None:
    with pytest.raises(MeasurementError, match="a rank of 2 failed in all_reduce: 'no-such-device' is not a device"):
        measure_collective("all_reduce", 2, "no-such-device", SIZES)
