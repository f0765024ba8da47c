"""The summary of a run as text and JSON, for a simulation or a live run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tandem.core.plan import ExpectedWindow, Quantiles
from tandem.core.slo import SloClass
from tandem.core.text_table import text_table
from tandem.core.timeline import PARTS, Stage
from tandem.placement.evaluation.attainment import (
    ClassEvaluation,
    Evaluation,
    evaluate,
    evaluate_windows,
    expected_windows,
)
from tandem.placement.report.formatting import PART_NAMES, interval, number, percent, rate, seconds
from tandem.placement.simulator.result import STAGES, SimulationResult
from tandem.placement.workload.requests import Floats
from tandem.placement.workload.windows import Window


@dataclass(frozen=True, slots=True)
class Summary:
    """A run as a whole, and its evaluation in steady state. `refused` requests ended without an answer. Rates are per
    second from the first arrival to the last finish. `goodput` counts requests that met both targets, `attainment` is
    their share of all. `parts_s` are means over all finished requests. `cached_share` of the prompt tokens were found
    in a prefix cache; None if no prefix is shared. `windows` are those of a trace."""

    requests: int
    finished: int
    refused: int
    offered_rate: float
    duration_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput: float
    attempts: int
    attainment: float
    cached_share: float | None
    evaluation: Evaluation
    parts_s: Mapping[str, float]
    windows: tuple[ExpectedWindow, ...] = ()


def summarise(
    result: SimulationResult, classes: Sequence[SloClass], windows: Sequence[Window] = (), cover: float = 1.0
) -> Summary:
    """`result` has at least one request. `windows` and `cover`: see `evaluate_windows`."""
    requests, finished = result.requests, result.finished
    assert len(requests) > 0
    last_s = float(np.nanmax(result.stage(Stage.FINISHED))) if finished.any() else result.end_s
    duration_s = max(last_s - float(requests.arrival_s[0]), 1e-9)
    whole_run = evaluate(result, classes, transient=True)
    evaluation = evaluate_windows(result, classes, windows, cover) if windows else evaluate(result, classes)
    num_met = sum(of_class.attainment * of_class.requests for of_class in whole_run.classes)
    return Summary(
        requests=len(requests),
        finished=int(finished.sum()),
        refused=result.num_refused,
        offered_rate=requests.rate,
        duration_s=duration_s,
        prompt_tokens_per_s=float(requests.prompt_tokens[finished].sum()) / duration_s,
        output_tokens_per_s=float(requests.output_tokens[finished].sum()) / duration_s,
        goodput=num_met / duration_s,
        attempts=int(result.num_attempts.sum()),
        attainment=num_met / len(requests),
        cached_share=result.cached_share if np.any(requests.prefix_group >= 0) else None,
        evaluation=evaluation,
        windows=expected_windows(windows, evaluation) if windows else (),
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
    )


def parts_of(result: SimulationResult) -> dict[str, Floats]:
    """`Timeline.parts` of all finished requests: name -> seconds. Parts that no request has are left out."""
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
    """The summary for a terminal."""
    evaluation = summary.evaluation
    counted = sum(of_class.requests for of_class in evaluation.classes)
    lines = [
        f"{summary.requests:,} requests at {rate(summary.offered_rate)}, {summary.finished:,} finished"
        + (f", {summary.refused:,} refused" if summary.refused else "")
        + (f" in {summary.attempts:,} attempts" if summary.attempts > summary.requests else "")
        + f"; {number(summary.prompt_tokens_per_s)} prompt and {number(summary.output_tokens_per_s)} output tokens/s",
        *_share_lines(summary),
        *_window_lines(summary.windows),
        f"steady state: {counted:,} requests, without the first {evaluation.warm_up:,} (warm-up) and the last "
        f"{evaluation.tail:,}"
        if len(summary.windows) < 2
        else f"the window that decides: {counted:,} requests, after the first {evaluation.warm_up:,}",
        "",
        *text_table([["CLASS", "TARGETS", "MET BOTH", "95 % INTERVAL", "TTFT", "TPOT"], *_attainment_rows(evaluation)]),
        "",
        *text_table([["LATENCY", "MEAN", "P50", "P90", "P99"], *_latency_rows(evaluation)]),
    ]
    if summary.parts_s:
        lines += ["", "mean time of a request by part:", *_part_lines(summary.parts_s)]
    return "\n".join([*lines, "", conclusion(evaluation, summary.refused)])


def _share_lines(summary: Summary) -> list[str]:
    lines = []
    if summary.cached_share is not None:
        lines.append(f"{percent(summary.cached_share)} of the prompt tokens were in a prefix cache")
    if len(summary.windows) > 1:
        lines.append(f"{percent(summary.attainment)} of all requests met both targets")
    return lines


def window_rows(windows: Sequence[ExpectedWindow]) -> list[list[str]]:
    """A table of the windows of a trace, with its header."""
    header = ["WINDOW", "OF THE TIME", "RATE", "PROMPT", "OUTPUT", "REPEATED", "MET BOTH", "95 % INTERVAL", ""]
    return [header] + [
        [
            f"{seconds(window.begin_s)} to {seconds(window.end_s)}",
            percent(window.time_share),
            rate(window.rate),
            f"{number(window.prompt_tokens)} tokens",
            f"{number(window.output_tokens)} tokens",
            percent(window.repeated_share),
            percent(window.attainment),
            interval(window.attainment_ci, "percent"),
            "" if window.meets else "missed",
        ]
        for window in windows
    ]


def _window_lines(windows: Sequence[ExpectedWindow]) -> list[str]:
    return ["", *text_table(window_rows(windows)), ""] if len(windows) > 1 else []


def conclusion(evaluation: Evaluation, num_refused: int) -> str:
    """Whether the run met its targets, in one or two sentences."""
    if not evaluation.stable:
        return "OVERLOADED: queues grow during the run; a longer run would miss more targets. Lower the rate."
    worst: ClassEvaluation = min(evaluation.classes, key=lambda of_class: of_class.margin)
    text = "All targets are met."
    if worst.margin < 0 and num_refused:
        return f"OVERLOADED: {num_refused:,} requests found no instance in time and were refused. Lower the rate."
    if worst.margin < 0:
        text = (
            f"MISSED: {percent(worst.attainment)} of class {worst.slo.name} met both targets; "
            f"{percent(worst.slo.attainment)} are required."
        )
    if not evaluation.long_enough:
        text += " The run was too short for a steady state; use more requests."
    return text


def as_json(summary: Summary) -> dict[str, object]:
    """Plain values for json.dumps. NaN (a quantile without values) becomes null."""
    plain = asdict(summary)
    plain["windows"] = [window.model_dump() for window in summary.windows]
    del plain["evaluation"]["windows"]
    for values, of_class in zip(plain["evaluation"]["classes"], summary.evaluation.classes, strict=True):
        values.update(slo=of_class.slo.model_dump(), ttft_s=_plain(of_class.ttft_s), tpot_s=_plain(of_class.tpot_s))
    plain["evaluation"].update(meets=summary.evaluation.meets)
    return plain


def _plain(quantiles: Quantiles) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in quantiles.model_dump().items()}


def _attainment_rows(evaluation: Evaluation) -> list[list[str]]:
    return [
        [
            of_class.slo.name,
            f"{percent(of_class.slo.attainment)} within {seconds(of_class.slo.ttft_s)}, {seconds(of_class.slo.tpot_s)}",
            percent(of_class.attainment),
            interval(of_class.attainment_ci, "percent"),
            percent(of_class.ttft_attainment),
            percent(of_class.tpot_attainment),
        ]
        for of_class in evaluation.classes
    ]


def _latency_rows(evaluation: Evaluation) -> list[list[str]]:
    return [
        [f"{name} {of_class.slo.name}", *(seconds(value) for value in quantiles.model_dump().values())]
        for of_class in evaluation.classes
        for name, quantiles in (("TTFT", of_class.ttft_s), ("TPOT", of_class.tpot_s))
    ]


def _part_lines(parts_s: Mapping[str, float]) -> list[str]:
    total_s = sum(parts_s.values())
    rows = [
        [f"  {PART_NAMES[name]}", seconds(part_s), percent(part_s / total_s if total_s else 0.0)]
        for name, part_s in parts_s.items()
    ]
    return text_table([*rows, ["  total", seconds(total_s), ""]])
