"""The table that a run ends with, the same for a simulation and for a live run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tandem.core.plan import Quantiles
from tandem.core.slo import SloClass
from tandem.core.text_table import text_table
from tandem.core.timeline import PARTS, Stage
from tandem.placement.judging.judgement import Judgement, judge
from tandem.placement.report.words import PART_NAMES, interval, number, percent, rate, seconds
from tandem.placement.simulator.result import STAGES, SimulationResult
from tandem.placement.workload.requests import Floats


@dataclass(frozen=True, slots=True)
class Summary:
    """A run as a whole, and its judgement in steady state. Rates are per second of the time from the first arrival to
    the last answer; `goodput` counts requests that kept both targets. `parts_s`: means over all finished requests."""

    requests: int
    finished: int
    offered_rate: float
    duration_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput: float
    attempts: int
    judgement: Judgement
    parts_s: Mapping[str, float]


def summarise(result: SimulationResult, classes: Sequence[SloClass]) -> Summary:
    """Of a run with at least one request."""
    requests, finished = result.requests, result.finished
    assert len(requests) > 0
    last_s = float(np.nanmax(result.stage(Stage.FINISHED))) if finished.any() else result.end_s
    duration_s = max(last_s - float(requests.arrival_s[0]), 1e-9)
    whole_run = judge(result, classes, transient=True)
    kept = sum(judged.attainment * judged.requests for judged in whole_run.classes)
    return Summary(
        requests=len(requests),
        finished=int(finished.sum()),
        offered_rate=requests.rate,
        duration_s=duration_s,
        prompt_tokens_per_s=float(requests.prompt_tokens[finished].sum()) / duration_s,
        output_tokens_per_s=float(requests.output_tokens[finished].sum()) / duration_s,
        goodput=kept / duration_s,
        attempts=int(result.num_attempts.sum()),
        judgement=judge(result, classes),
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
    )


def parts_of(result: SimulationResult) -> dict[str, Floats]:
    """`Timeline.parts` of all finished requests at once; parts that nobody has are left out."""
    stamps = result.stamps[result.finished]
    parts: dict[str, Floats] = {}
    if not len(stamps):
        return parts
    previous_s = stamps[:, STAGES.index(Stage.RECEIVED)]
    for stage, name in PARTS:
        stamp_s = stamps[:, STAGES.index(stage)]
        if not np.isnan(stamp_s).all():
            reached_s = np.fmax(previous_s, stamp_s)
            parts[name] = reached_s - previous_s
            previous_s = reached_s
    return parts


def render_text(summary: Summary) -> str:
    """For a terminal."""
    judgement = summary.judgement
    judged = sum(one.requests for one in judgement.classes)
    lines = [
        f"{summary.requests:,} requests at {rate(summary.offered_rate)}, {summary.finished:,} finished"
        + (f" in {summary.attempts:,} attempts" if summary.attempts > summary.requests else "")
        + f"; {number(summary.prompt_tokens_per_s)} prompt and {number(summary.output_tokens_per_s)} output tokens/s",
        f"judged on {judged:,} of them: {judgement.warm_up:,} left out while it filled, {judgement.tail:,} while it "
        "emptied",
        "",
        *text_table([["CLASS", "TARGETS", "KEPT BOTH", "95 % INTERVAL", "TTFT", "TPOT"], *_attainment_rows(judgement)]),
        "",
        *text_table([["LATENCY", "MEAN", "P50", "P90", "P99"], *_latency_rows(judgement)]),
    ]
    if summary.parts_s:
        lines += ["", "where a request's time goes, mean:", *_part_lines(summary.parts_s)]
    return "\n".join([*lines, "", verdict(judgement)])


def verdict(judgement: Judgement) -> str:
    """One sentence."""
    if not judgement.stable:
        return "OVERLOADED: queues grow from end to end; a longer run would keep fewer of its targets."
    short = [one for one in judgement.classes if one.margin < 0]
    text = "All targets are kept."
    if short:
        worst = min(short, key=lambda one: one.margin)
        text = f"MISSED: class {worst.slo.name} keeps {percent(worst.attainment)}, not {percent(worst.slo.attainment)}."
    if not judgement.long_enough:
        text += " The run was too short for a steady state; take more requests."
    return text


def as_json(summary: Summary) -> dict[str, object]:
    """Plain values for json.dumps; what is not a number (no answer of two tokens, say) is null."""
    plain = asdict(summary)
    for judged, one in zip(plain["judgement"]["classes"], summary.judgement.classes, strict=True):
        judged.update(slo=one.slo.model_dump(), ttft_s=_plain(one.ttft_s), tpot_s=_plain(one.tpot_s))
    plain["judgement"].update(meets=summary.judgement.meets)
    return plain


def _plain(quantiles: Quantiles) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in quantiles.model_dump().items()}


def _attainment_rows(judgement: Judgement) -> list[list[str]]:
    return [
        [
            one.slo.name,
            f"{percent(one.slo.attainment)} within {seconds(one.slo.ttft_s)}, {seconds(one.slo.tpot_s)}",
            percent(one.attainment),
            interval(one.attainment_ci, "percent"),
            percent(one.ttft_attainment),
            percent(one.tpot_attainment),
        ]
        for one in judgement.classes
    ]


def _latency_rows(judgement: Judgement) -> list[list[str]]:
    return [
        [f"{name} {one.slo.name}", *(seconds(value) for value in quantiles.model_dump().values())]
        for one in judgement.classes
        for name, quantiles in (("TTFT", one.ttft_s), ("TPOT", one.tpot_s))
    ]


def _part_lines(parts_s: Mapping[str, float]) -> list[str]:
    total_s = sum(parts_s.values())
    rows = [
        [f"  {PART_NAMES[name]}", seconds(part_s), percent(part_s / total_s if total_s else 0.0)]
        for name, part_s in parts_s.items()
    ]
    return text_table([*rows, ["  total", seconds(total_s), ""]])
