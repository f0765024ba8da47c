"""The result of a soak: for a person, for a program, and whether it passes."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

from bench.soak.clients import UNANSWERED, WRONG
from bench.soak.faults import Fault
from bench.soak.references import Checked
from bench.soak.resources import Growth

LIMITS = {"resident bytes": 100.0, "python blocks": 1.0, "threads": 1e-3, "descriptors": 1e-3, "mapped pools": 1e-3}
"""Growth per request from which on something leaks. A Python object of 100 bytes is a block or two."""
MOST_MORE = {"threads": 10.0, "descriptors": 10.0}
"""Growth over a run from which on something leaks that has to do with deaths rather than with requests."""
FAULTY_OUTCOMES = (UNANSWERED, WRONG, "internal", "not an error of the API")


@dataclass(frozen=True, slots=True)
class SoakResult:
    """`faulty`: some of the requests with an outcome that must not be, in words. `left`: what was wrong at the end."""

    minutes: float
    outcomes: Counter[str]
    faulty: list[str]
    faults: list[Fault]
    checked: Checked
    growths: list[Growth]
    most_leaked_blocks: int
    blocks_at_end: dict[str, int]
    pools_at_end: dict[str, int]
    expected_pools: int
    left: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Why it does not pass; empty if it does."""
        failures = [
            f"{self.outcomes[outcome]} requests: {outcome}" for outcome in FAULTY_OUTCOMES if self.outcomes[outcome]
        ]
        if self.checked.wrong:
            failures.append(f"{len(self.checked.wrong)} wrong answers")
        if not self.checked.by_transformers:
            failures.append("no answer was compared with transformers")
        for growth in self.growths:
            limit = LIMITS[growth.what]
            if growth.exceeds(limit):
                failures.append(
                    f"{growth.process}: {growth.what} grow by {growth.per_request:.3g} "
                    f"+- {growth.half_width:.2g} a request; {limit:g} are allowed"
                )
            more = growth.last - growth.first
            if growth.has_enough and more > MOST_MORE.get(growth.what, math.inf):
                failures.append(f"{growth.process}: {more:.0f} {growth.what} more than at first")
        if self.most_leaked_blocks:
            failures.append(f"up to {self.most_leaked_blocks} KV blocks leaked")
        at_end = self.blocks_at_end
        if not at_end or at_end["free"] + at_end["cached"] != at_end["total"]:
            failures.append(f"the idle cluster holds KV blocks: {at_end or 'it does not answer'}")
        failures += [
            f"{life} maps {pools} KV pools; there are {self.expected_pools}"
            for life, pools in self.pools_at_end.items()
            if pools > self.expected_pools
        ]
        failures += [
            f"{fault.name} was not there again after it was {fault.what}"
            for fault in self.faults
            if fault.up_again_s is None
        ]
        return failures + self.left

    def as_json(self) -> dict[str, object]:
        fields = asdict(self)
        fields["outcomes"] = dict(self.outcomes)
        fields["checked"] = {
            "by_transformers": self.checked.by_transformers,
            "by_repetition": self.checked.by_repetition,
            "wrong": [repr(wrong) for wrong in self.checked.wrong],
        }
        return fields | {"limits": LIMITS, "failures": self.failures()}

    def text(self) -> str:
        total = sum(self.outcomes.values())
        lines = [f"{total} requests in {self.minutes:.1f} minutes ({total / self.minutes / 60:.1f} a second)"]
        lines += [f"  {count:8} {outcome}" for outcome, count in self.outcomes.most_common()]
        lines += [f"    {line}" for line in self.faulty]
        checked = self.checked
        lines += [
            "",
            f"answers compared: {checked.by_transformers} with transformers, "
            f"{checked.by_repetition} with a repetition; {len(checked.wrong)} wrong",
        ]
        lines += [f"  {wrong}"[:600] for wrong in checked.wrong[:5]]
        if self.faults:
            lines += ["", "faults"]
            for fault in self.faults:
                again = "" if fault.up_again_s == 0 else f", there again after {fault.up_again_s or float('inf'):.1f} s"
                lines.append(f"  {fault.at_s:6.0f} s  {fault.name} (pid {fault.pid}) {fault.what}{again}")
        lines += [
            "",
            f"{'growth per request':48}{'samples':>8}{'from':>14}{'to':>14}{'per request':>14}{'+-':>10}{'limit':>8}",
        ]
        lines += [
            f"  {growth.process[:28]:30}{growth.what:16}{growth.samples:8}{growth.first:14.0f}{growth.last:14.0f}"
            f"{growth.per_request:14.3g}{growth.half_width:10.2g}{LIMITS[growth.what]:8g}" + _note(growth)
            for growth in self.growths
        ]
        pools = ", ".join(f"{life} {count}" for life, count in self.pools_at_end.items())
        blocks = ", ".join(f"{count} {owner}" for owner, count in self.blocks_at_end.items())
        lines += ["", f"KV blocks of the idle cluster: {blocks}", f"mapped KV pools: {pools}", ""]
        failures = self.failures()
        lines += [f"FAILED: {failure}" for failure in failures] or ["passed"]
        return "\n".join(lines)


def _note(growth: Growth) -> str:
    if not growth.has_enough:
        return f"  not judged: {growth.requests} requests are too few"
    return "" if growth.half_width < LIMITS[growth.what] else "  a growth of the limit could not be seen"
