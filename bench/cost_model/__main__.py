"""How well does the roofline predict? Fits its efficiencies to half of the public measurements, and checks the rest.

    python -m bench.cost_model fit      fits and writes placement/data/efficiency.yaml, then checks
    python -m bench.cost_model check    relative errors of the existing file: operators, then whole steps

The measurements are not part of the repository (4 MB of tables from aiconfigurator, Vidur, LLMServingSim, Splitwise and
Sarathi); --data names the folder that has them under latency/.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from tqdm import tqdm

from bench.common.data_folder import add_data_argument
from bench.cost_model.fit import as_yaml, errors, fit
from bench.cost_model.operator_tables import read_samples
from bench.cost_model.samples import OperatorSample
from bench.cost_model.steps import StepSample, fit_overhead, read_steps
from tandem.core.errors import ConfigError
from tandem.placement.costs.catalogue import DATA
from tandem.placement.costs.efficiency import (
    DecodeAttentionEfficiency,
    Efficiency,
    ElementwiseEfficiency,
    EngineOverhead,
    ExpertsEfficiency,
    GemmEfficiency,
    LinkEfficiency,
    MixedAttentionEfficiency,
    PrefillAttentionEfficiency,
    efficiency,
    engine_overhead,
)

T = TypeVar("T")

_START = Efficiency(
    gemm=GemmEfficiency(latency_s=5e-6, compute=0.8, memory=0.8, sharpness=3.0),
    experts=ExpertsEfficiency(latency_s=20e-6, compute=0.6, memory=0.8, sharpness=2.0, padding_rows=32.0),
    prefill_attention=PrefillAttentionEfficiency(latency_s=10e-6, compute=0.6, memory=0.5, idle=0.3, head_s=1e-6),
    decode_attention=DecodeAttentionEfficiency(latency_s=12e-6, memory=0.9, idle=0.5, head_s=10e-9, compute=0.6),
    latent_prefill=PrefillAttentionEfficiency(latency_s=10e-6, compute=0.6, memory=0.8, idle=0.5, head_s=1e-6),
    latent_decode=DecodeAttentionEfficiency(latency_s=12e-6, memory=0.8, idle=1.0, head_s=1e-9, compute=0.6),
    mixed_attention=None,
    link=LinkEfficiency(latency_s=5e-6, rank_s=0.2e-6, ramp_s=20e-6, bandwidth=0.8, hand_off_s=10e-6, send=0.75),
    elementwise=ElementwiseEfficiency(latency_s=10e-6, core_bytes_per_s=20e9, memory=1.5, cached=1.0),
)
_MIXED_START = MixedAttentionEfficiency(
    latency_s=8e-6,
    compute=0.6,
    memory=0.8,
    query_rows=64.0,
    cached=0.5,
    in_flight=0.75,
    walk_s=20e-9,
    tail=0.3,
    head_s=10e-9,
)
_FAMILIES = {  # family -> the one whose values it keeps where it has no measurements
    "hopper": None,
    "ampere": None,
    "blackwell": None,
    "ada": None,
    "ada-rtx": "ada",
    "blackwell-rtx": "ada",
}
_NO_OVERHEAD = EngineOverhead(step_s=0.0, sequence_s=0.0, eager_layer_s=0.0, graph_decode=True)
_COMPOSED = "llmservingsim"  # its steps are sums of operators, without the overheads of an engine

_HEADER = """\
# Written by `python -m bench.cost_model fit`; do not edit, but for `cpu`, which is a guess until one calibrates.
# Fitted to half of: aiconfigurator systems/data (Apache-2.0, 095f58a), Vidur data/profiling (MIT, 7d47513),
# LLMServingSim profiler/perf (MIT, 5daddb2); engines: Splitwise perf_model.csv (MIT, 8f99e7d), sarathi-serve
# osdi-experiments (Apache-2.0, ceaa066), aiconfigurator silicon_sample.csv (vllm, trtllm: H100, 2026).
# Meaning of the numbers: placement/costs/efficiency.py. A family nobody measured (cdna3) takes `default`, hopper's.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("fit", "check"))
    add_data_argument(parser, "latency/")
    parser.add_argument("--out", type=Path, default=DATA / "efficiency.yaml", help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        samples, steps = read_samples(args.data), read_steps(args.data)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 1
    systems = sorted({step.system for step in steps} - {_COMPOSED})
    if args.action == "fit":
        families = _fit_families(samples)
        engines = {system: fit_overhead(_of(system, steps), families) for system in _progress(systems)}
        args.out.write_text(_document(families, engines, _step_error(steps, families, engines)), encoding="utf-8")
    else:
        families = {family: efficiency(family) for family in _FAMILIES}
        engines = {system: engine_overhead(system) for system in systems}
    print(*_operator_lines(samples, families), *_step_lines(steps, families, engines), sep="\n")
    return 0


def _fit_families(samples: Sequence[OperatorSample]) -> dict[str, Efficiency]:
    families: dict[str, Efficiency] = {}
    for family, base in _progress(_FAMILIES.items()):
        measured = [sample for sample in samples if sample.device.family == family]
        start = _START if base is None else families[base]
        if any(sample.operator == "mixed_attention" for sample in measured):
            start = replace(start, mixed_attention=_MIXED_START)
        families[family] = fit(measured, start)
    return families


def _progress(items: Iterable[T]) -> Iterable[T]:
    return tqdm(list(items), unit="fit", disable=not sys.stderr.isatty())


def _of(system: str, steps: Sequence[StepSample]) -> list[StepSample]:
    return [step for step in steps if step.system == system]


def _document(families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead], error: float) -> str:
    previous: Any = yaml.safe_load((DATA / "efficiency.yaml").read_text("utf-8"))
    parts = {"default": as_yaml(families["hopper"])} | {name: as_yaml(family) for name, family in families.items()}
    overheads = {name: _rounded(asdict(overhead)) for name, overhead in {**engines, "none": _NO_OVERHEAD}.items()}
    data = {
        "step_error": round(error, 3),
        "engines": overheads,
        "families": parts | {"cpu": previous["families"]["cpu"]},
    }
    return _HEADER + yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, bool) else float(f"{value:.3g}") for name, value in values.items()}


def _relative_errors(
    steps: Iterable[StepSample], families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead]
) -> dict[tuple[str, str, str, bool], list[float]]:
    """(system, phase, device, held out) -> signed relative errors."""
    found: dict[tuple[str, str, str, bool], list[float]] = {}
    for step in steps:
        overhead = engines.get(step.system, _NO_OVERHEAD)
        error = step.predict(families[step.device.family], overhead) / step.seconds - 1
        found.setdefault((step.system, step.phase, step.device.name, step.held_out), []).append(error)
    return found


def _step_error(
    steps: Sequence[StepSample], families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead]
) -> float:
    """Mean over the systems of the median held-out error."""
    found = _relative_errors((step for step in steps if step.held_out), families, engines)
    by_system: dict[str, list[float]] = {}
    for (system, *_), signed in found.items():
        by_system.setdefault(system, []).extend(signed)
    return float(np.mean([np.median(np.abs(signed)) for signed in by_system.values()]))


def _operator_lines(samples: Sequence[OperatorSample], families: Mapping[str, Efficiency]) -> list[str]:
    lines = [_line("operator", "source", "device", "half", "rows", "median", "p90", "bias")]
    for error in errors(samples, families):
        half = "held out" if error.held_out else "fitted"
        figures = (f"{error.median:.1%}", f"{error.p90:.1%}", f"{error.bias:+.1%}")
        lines.append(_line(error.operator, error.source, error.device, half, str(error.count), *figures))
    return lines


def _step_lines(
    steps: Sequence[StepSample], families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead]
) -> list[str]:
    lines = ["", _line("step", "system", "device", "half", "rows", "median", "p90", "bias")]
    found = _relative_errors(steps, families, engines)
    for (system, phase, device, held_out), signed in sorted(found.items()):
        absolute, half = np.abs(signed), "held out" if held_out else "fitted"
        figures = (f"{np.median(absolute):.1%}", f"{np.quantile(absolute, 0.9):.1%}", f"{np.median(signed):+.1%}")
        lines.append(_line(phase, system, device, half, str(len(signed)), *figures))
    lines.append(f"mean over systems of the median held-out error: {_step_error(steps, families, engines):.1%}")
    return lines


def _line(*cells: str) -> str:
    widths = (18, 15, 23, 9, 7, 8, 8, 8)
    left, right = zip(cells[:4], widths[:4], strict=True), zip(cells[4:], widths[4:], strict=True)
    return "".join([cell.ljust(width) for cell, width in left] + [cell.rjust(width) for cell, width in right])


if __name__ == "__main__":
    sys.exit(main())
