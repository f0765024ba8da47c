"""How well does the roofline predict? Fits its efficiencies to half of the public measurements, and checks the rest.

    python -m bench.cost_model fit      fits and writes placement/data/efficiency.yaml, then checks
    python -m bench.cost_model check    relative errors of the existing file: operators, whole steps, and what engines
                                        served, by the simulator; then the same with a device or an engine left out

The measurements are not part of the repository (4 MB of tables from aiconfigurator, Vidur, LLMServingSim, Splitwise and
Sarathi; DistServe's lines are); --data names the folder that has them under latency/.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

from bench.common.data_folder import add_data_argument
from bench.cost_model.fit import as_yaml, fit
from bench.cost_model.open_loop import open_loop_errors
from bench.cost_model.operator_tables import read_samples
from bench.cost_model.report import (
    NO_OVERHEAD,
    model_error,
    open_loop_lines,
    operator_lines,
    served_lines,
    step_lines,
    transfer_lines,
)
from bench.cost_model.samples import OperatorSample
from bench.cost_model.served import PricedPoint, ServedPoint, priced, read_points
from bench.cost_model.served_fit import fit_served
from bench.cost_model.steps import StepSample, fit_overhead, read_steps
from tandem.core.errors import ConfigError
from tandem.placement.costs.catalogue import DATA
from tandem.placement.costs.efficiency import (
    ConvertingGemmEfficiency,
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
    pcie=LinkEfficiency(
        latency_s=5e-6, rank_s=1e-6, ramp_s=1e-6, bandwidth=0.6, hand_off_s=10e-6, send=0.75, sharing=1.0
    ),
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
_OPTIONAL_STARTS: Mapping[str, Any] = {  # parts of families that were measured
    "mixed_attention": _MIXED_START,
    "gemm_fp8": ConvertingGemmEfficiency(5e-6, compute=0.7, memory=0.8, sharpness=2.0, conversion=3.0),
    "experts_fp8": _START.experts,
    "decode_kv_fp8": _START.decode_attention,
}
_FAMILIES = {  # family -> the one whose values it keeps where it has no measurements
    "hopper": None,
    "ampere": None,
    "blackwell": None,
    "ada": None,
    "ada-rtx": "ada",
    "blackwell-rtx": "ada",
}
_OWN_PCIE = ("ada", "blackwell-rtx")
_COMPOSED = "llmservingsim"  # its steps are sums of operators, without the overheads of an engine

_HEADER = """\
# Written by `python -m bench.cost_model fit`; do not edit, but for `cpu`, which is a guess until one calibrates.
# Fitted to half of: aiconfigurator systems/data (Apache-2.0, 095f58a), Vidur data/profiling (MIT, 7d47513),
# LLMServingSim profiler/perf (MIT, 5daddb2); engines: Splitwise perf_model.csv (MIT, 8f99e7d), sarathi-serve
# osdi-experiments (Apache-2.0, ceaa066), DistServe's lines (Apache-2.0, 82831f1), and, through the simulator,
# aiconfigurator silicon_sample.csv (vllm, trtllm, sglang: H100, H200, B200, 2025 and 2026).
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
        samples, steps, points = read_samples(args.data), read_steps(args.data), read_points(args.data)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 1
    systems = sorted({step.system for step in steps} - {_COMPOSED})
    if args.action == "fit":
        families = _fit_families(samples)
        engines = {system: fit_overhead(_of(system, steps), families) for system in _progress(systems)}
        served = _priced(points, families)
        for engine in sorted({point.engine for point in points}):
            fitted = [one for one in served if one.point.engine == engine and not one.point.held_out]
            engines[engine] = fit_served(fitted)
        typical = model_error(steps, served, families, engines)
        args.out.write_text(_document(families, engines, typical), encoding="utf-8")
    else:
        families = {family: efficiency(family) for family in _FAMILIES}
        engines = {system: engine_overhead(system) for system in {*systems, *(point.engine for point in points)}}
        served = _priced(points, families)
        typical = model_error(steps, served, families, engines)
    print(*operator_lines(samples, families), *step_lines(steps, families, engines), sep="\n")
    open_loop = open_loop_errors(args.data, families, engines["vllm"])
    print(*served_lines(served, engines), *open_loop_lines(open_loop), *transfer_lines(served), sep="\n")
    print(f"\nmean over systems of the median held-out error: {typical:.1%}")
    return 0


def _priced(points: Sequence[ServedPoint], families: Mapping[str, Efficiency]) -> list[PricedPoint]:
    return [priced(point, families[point.device.family]) for point in _progress(points)]


def _fit_families(samples: Sequence[OperatorSample]) -> dict[str, Efficiency]:
    families: dict[str, Efficiency] = {}
    for family, base in _progress(_FAMILIES.items()):
        measured = [sample for sample in samples if sample.device.family == family]
        start = _START if base is None else families[base]
        operators = {sample.operator for sample in measured}
        start = replace(start, **{part: first for part, first in _OPTIONAL_STARTS.items() if part in operators})
        families[family] = fit(measured, start)
    # All other devices without NVLink take the links of the only ones that were measured.
    return {
        family: fitted if family in _OWN_PCIE else replace(fitted, pcie=families["ada"].pcie)
        for family, fitted in families.items()
    }


def _progress(items: Iterable[T]) -> Iterable[T]:
    return tqdm(list(items), unit="fit", disable=not sys.stderr.isatty())


def _of(system: str, steps: Sequence[StepSample]) -> list[StepSample]:
    return [step for step in steps if step.system == system]


def _document(families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead], error: float) -> str:
    previous: Any = yaml.safe_load((DATA / "efficiency.yaml").read_text("utf-8"))
    parts = {"default": as_yaml(families["hopper"])} | {name: as_yaml(family) for name, family in families.items()}
    overheads = {name: _rounded(asdict(overhead)) for name, overhead in {**engines, "none": NO_OVERHEAD}.items()}
    data = {
        "step_error": round(error, 3),
        "engines": overheads,
        "families": parts | {"cpu": previous["families"]["cpu"]},
    }
    return _HEADER + yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Three digits; what a fit brought nearly to 0 is 0."""
    numbers = {name: value if isinstance(value, bool) else float(f"{value:.3g}") for name, value in values.items()}
    return {
        name: 0.0 if not isinstance(value, bool) and 0 < value < 1e-12 else value for name, value in numbers.items()
    }


if __name__ == "__main__":
    sys.exit(main())
