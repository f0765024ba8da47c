"""The machine's speed while several ranks are measured, by an engine of one rank."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from tandem.placement.costs.step_fit import Measurement
from tandem.profiling.engine_profile import EngineProfiler, ProfileCell, profile_grid
from tandem.profiling.shape_profile import OneRank
from tests.profiling.samples import ENGINE


class SlowProfiler:
    """Prompts take twice as long as `ENGINE` says, decode steps three times."""

    def measure(self, cells: Sequence[ProfileCell], budget_s: float) -> list[Measurement]:
        return [
            Measurement(
                **asdict(cell.load),
                seconds=(2 if cell.prompts else 3) * ENGINE.step(cell.load).total_s,
            )
            for cell in cells
        ]


def one_rank(max_model_len: int) -> OneRank:
    cells = profile_grid(2048, 64, max_model_len)
    return OneRank(cast(EngineProfiler, SlowProfiler()), ENGINE, cells)


def test_both_phases_are_compared_with_what_was_measured_before() -> None:
    prompts, decode = one_rank(4096).slowdown()
    assert (round(prompts, 9), round(decode, 9)) == (2.0, 3.0)


def test_a_model_with_a_short_context_is_compared_by_what_it_can_compute() -> None:
    prompts, decode = one_rank(100).slowdown()
    assert (round(prompts, 9), decode) == (2.0, 1.0), "its context is too short for the decode steps"
