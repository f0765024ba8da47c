"""Which routing policy gives the most goodput, in the simulator, on the same four instances and the same requests?

load        attainment of each policy at 70 to 130 % of the rate at which `balanced` meets the targets of 90 %
errors      the same at 100 and 120 %, with step costs that the router believes wrongly by up to 50 %, each coefficient
            of each instance by its own factor and never corrected, and with reports that come every 10 to 500 ms
balance     whether load swings between prefill and decode: the correlation of the two over time, and the most negative
            autocorrelation of each up to 30 s
instances   microseconds of a decision, on 4 to 1,000 instances at the same load, and attainment

Llama-3.1-8B on A100s, and a mixture of experts on H100s, by the roofline. Requests and arrivals are those of the
traces, scaled in time. The last line of the output is all of it as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np

from bench.common.data_folder import add_data_argument
from bench.policies.layered import LayeredCost, LayeredScheduler, layered_load
from bench.policies.selectors import LeastLoaded, PowerOfTwo, PrefixAffine, RoundRobin, with_stale_reports, with_timing
from tandem.core.instance_section import RoleName
from tandem.core.parallel import ParallelShape
from tandem.core.request_slo import RequestSlo
from tandem.core.step_coefficients import StepCoefficients
from tandem.core.text_table import text_table
from tandem.core.timeline import Stage
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec, NetworkSpec, RouterSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream
from tandem.placement.workload.traces import load_trace
from tandem.profiling.errors import MeasurementError
from tandem.scheduling.budget import Mixing
from tandem.scheduling.goodput_selector import GoodputSelector
from tandem.scheduling.instance_selector import InstanceSelector
from tandem.scheduling.routing_settings import RoutingSettings

PARTS = ("load", "errors", "balance", "instances")
LOADS = (0.7, 0.85, 1.0, 1.15, 1.3)
ERRORS = (0.0, 0.1, 0.25, 0.5)
PERIODS_S = (0.01, 0.05, 0.1, 0.5)
INSTANCES = (4, 40, 400, 1000)
ATTAINMENT = 0.9
_SHAPE = ParallelShape(1, 1)
_BLOCK_TOKENS = 16
_ROUTING = RoutingSettings(max_outstanding_tokens=16384)  # as a live router's
_WARM_UP_SHARE = 0.1
_COMPARED_FOR_ERRORS = (
    "balanced",
    "goodput",
    "goodput, slack",
    "round robin",
    "least loaded",
    "power of two",
    "prefix affine",
)
_FEW_REQUESTS, _REQUESTS_PER_INSTANCE = 2000, 15


@dataclass(frozen=True, slots=True)
class Case:
    """`prefill` and `decode` instances of disaggregated forms; colocated forms have as many in all."""

    trace: str
    prefill: int
    decode: int
    slo: RequestSlo
    model: str = "Llama-3.1-8B"
    device: str = "A100-80GB-SXM4"

    @property
    def name(self) -> str:
        form, targets = f"{self.prefill}P{self.decode}D", f"{self.slo.ttft_s:g}/{self.slo.tpot_s:g} s"
        return f"{self.model}, {self.trace.split('.')[0]} {form} {targets}"


CASES = (
    Case("azure_2023_conv.csv.gz", 2, 2, RequestSlo("a", 0.5, 0.05)),
    Case("azure_2023_conv.csv.gz", 2, 2, RequestSlo("a", 0.5, 0.025)),
    Case("azure_2023_code.csv.gz", 3, 1, RequestSlo("a", 0.5, 0.03)),
    Case("mooncake_conversation_trace.jsonl.gz", 3, 1, RequestSlo("a", 30.0, 0.1)),
    Case("azure_2023_conv.csv.gz", 2, 2, RequestSlo("a", 0.5, 0.03), "Qwen3-30B-A3B", "H100-80GB-SXM5"),
)


@dataclass(frozen=True, slots=True)
class Policy:
    selector_type: type[InstanceSelector]
    is_colocated: bool = False
    mixing: Mixing = "chunked"
    is_layered: bool = False


POLICIES = {
    "balanced": Policy(InstanceSelector),
    "goodput": Policy(GoodputSelector),
    "goodput, slack": Policy(GoodputSelector, mixing="slack"),
    "round robin": Policy(RoundRobin),
    "least loaded": Policy(LeastLoaded),
    "power of two": Policy(PowerOfTwo),
    "prefix affine": Policy(PrefixAffine),
    "colocated chunked": Policy(InstanceSelector, True),
    "colocated layered": Policy(InstanceSelector, True, is_layered=True),
    "colocated prompt first": Policy(InstanceSelector, True, "prompt_first"),
    "colocated slack": Policy(InstanceSelector, True, "slack"),
    "colocated goodput, slack": Policy(GoodputSelector, True, "slack"),
}


def make_deployment(case: Case, policy: Policy, *, scale: int = 1, error: float = 0.0) -> Deployment:
    """`error`: each coefficient that the router believes is off by a factor of up to 1 + `error`, up or down."""
    source, random = RooflineSource(model_shape(case.model), devices()), Random(1)
    cost = source.cost_model(case.device, _SHAPE)
    assert cost is not None
    roles: list[tuple[RoleName, int]] = [("prefill", case.prefill), ("decode", case.decode)]
    if policy.is_colocated:
        roles = [("colocated", case.prefill + case.decode)]
    truth = StepCoefficients.of(cost)
    instances = tuple(
        InstanceSpec(
            instance_id=f"{role}-{number}",
            role=role,
            cost=cost,
            num_blocks=source.kv_tokens(case.device, _SHAPE) // _BLOCK_TOKENS,
            block_size=_BLOCK_TOKENS,
            max_batch_tokens={"prefill": 2048, "decode": 2048, "colocated": 512}[role]
            if policy.mixing != "prompt_first"
            else 4096,
            policy="chunked" if role == "prefill" else policy.mixing,
            step_cost=StepCoefficients(*(each * (1 + error) ** random.uniform(-1, 1) for each in truth)),
        )
        for role, number_of in roles
        for number in range(number_of * scale)
    )
    if policy.is_layered:
        instances = tuple(
            replace(each, cost=LayeredCost(cost), scheduler_type=LayeredScheduler, load_of=layered_load)
            for each in instances
        )
    network = NetworkSpec(model_shape(case.model).kv_bytes_per_token, 250e9, 22e9, 0.001)
    return Deployment(
        instances, network, RouterSpec(slo=(case.slo,), routing=_ROUTING, selector_type=policy.selector_type)
    )


def attainment(result: SimulationResult, slo: RequestSlo) -> float:
    """Share of the requests after the warm-up that met both targets."""
    met = (result.ttft_s <= slo.ttft_s) & (np.isnan(result.tpot_s) | (result.tpot_s <= slo.tpot_s))
    return float(met[int(_WARM_UP_SHARE * len(met)) :].mean())


def capacity(case: Case, stream: RequestStream) -> float:
    """The rate at which `balanced` meets the targets of ATTAINMENT of the requests, to 3 %."""
    deployment = make_deployment(case, POLICIES["balanced"])
    low, high = 0.0, 0.05
    while attainment(simulate(deployment, stream.scaled_to(high)), case.slo) >= ATTAINMENT:
        low, high = high, 2 * high
    if low == 0.0:
        raise MeasurementError(f"{case.name}: the targets are met at no rate")
    while high > 1.03 * low:
        middle = (low * high) ** 0.5
        meets = attainment(simulate(deployment, stream.scaled_to(middle)), case.slo) >= ATTAINMENT
        low, high = (middle, high) if meets else (low, middle)
    return low


def compare_loads(case: Case, stream: RequestStream, rate: float) -> dict[str, list[float]]:
    return {
        name: [
            attainment(simulate(make_deployment(case, policy), stream.scaled_to(load * rate)), case.slo)
            for load in LOADS
        ]
        for name, policy in POLICIES.items()
    }


def compare_errors(case: Case, stream: RequestStream, rate: float) -> dict[str, list[float]]:
    """Rows by policy and load, columns as ERRORS and then PERIODS_S."""
    rows = {}
    for name in _COMPARED_FOR_ERRORS:
        for load in (1.0, 1.2):
            policy, requests = POLICIES[name], stream.scaled_to(load * rate)
            stale = [
                replace(policy, selector_type=with_stale_reports(policy.selector_type, period_s))
                for period_s in PERIODS_S
            ]
            runs = [make_deployment(case, policy, error=error) for error in ERRORS]
            runs += [make_deployment(case, each) for each in stale]
            rows[f"{name}, {load:.0%}"] = [attainment(simulate(run, requests), case.slo) for run in runs]
    return rows


def compare_balance(case: Case, stream: RequestStream, rate: float) -> dict[str, list[float]]:
    """At 100 %: correlation of prefill and decode load, and the least autocorrelation of each."""
    rows = {}
    for name in ("balanced", "goodput", "goodput, slack", "least loaded"):
        result = simulate(make_deployment(case, POLICIES[name]), stream.scaled_to(rate))
        times = np.arange(0, result.end_s, 0.25)
        first = result.stage(Stage.FIRST_TOKEN)
        series = [
            _open_at(times, result.stage(Stage.RECEIVED), first),
            _open_at(times, first, result.stage(Stage.FINISHED)),
        ]
        middle = slice(len(times) // 10, len(times) * 9 // 10)
        prefill, decode = (each[middle] for each in series)
        rows[name] = [_correlation(prefill, decode), _least_autocorrelation(prefill), _least_autocorrelation(decode)]
    return rows


def _open_at(times: Floats, begin_s: Floats, end_s: Floats) -> Floats:
    return np.searchsorted(np.sort(begin_s), times).astype(float) - np.searchsorted(np.sort(end_s), times)


def _correlation(one: Floats, other: Floats) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def _least_autocorrelation(series: Floats) -> float:
    return min(_correlation(series[:-lag], series[lag:]) for lag in range(4, min(120, len(series) // 4)))


def compare_instances(case: Case, stream: RequestStream, rate: float) -> dict[str, list[float]]:
    """At 100 %: microseconds of a decision (a request takes two), 99 % of them, and of the whole simulation for a
    request; then attainment. For each of INSTANCES, with as many requests for each instance, but those of the trace at
    most."""
    rows: dict[str, list[float]] = {}
    for name in ("balanced", "goodput", "least loaded", "power of two"):
        columns: list[list[float]] = [[], [], [], []]
        for instances in INSTANCES:
            scale, seconds = instances // (case.prefill + case.decode), list[float]()
            policy = replace(POLICIES[name], selector_type=with_timing(POLICIES[name].selector_type, seconds))
            deployment = make_deployment(case, policy, scale=scale)
            requests = stream.head(max(_FEW_REQUESTS, _REQUESTS_PER_INSTANCE * instances))
            began_s = time.perf_counter()
            result = simulate(deployment, requests.scaled_to(rate * scale))
            whole_s = (time.perf_counter() - began_s) / len(requests)
            decision_s = (float(np.mean(seconds)), float(np.quantile(seconds, 0.99)))
            found = (*(1e6 * each for each in (*decision_s, whole_s)), attainment(result, case.slo))
            for column, value in zip(columns, found, strict=True):
                column.append(value)
        rows[name] = [value for column in columns for value in column]
    return rows


Compare = Callable[[Case, RequestStream, float], dict[str, list[float]]]
_COMPARISONS: dict[str, tuple[Compare, tuple[str, ...]]] = {
    "load": (compare_loads, tuple(f"{load:.0%}" for load in LOADS)),
    "errors": (
        compare_errors,
        tuple(f"error {error:.0%}" for error in ERRORS) + tuple(f"{1000 * each:.0f} ms" for each in PERIODS_S),
    ),
    "balance": (compare_balance, ("prefill~decode", "prefill", "decode")),
    "instances": (
        compare_instances,
        tuple(f"{what}, {n}" for what in ("us", "us p99", "us in all", "at") for n in INSTANCES),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser, "traces/")
    parser.add_argument("--part", choices=PARTS, help="one of them (default: all)")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="one of the cases (default: all)")
    parser.add_argument("--requests", type=int, default=2000, help="of each simulation (%(default)s)")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for case in CASES if options.case is None else (CASES[options.case],):
        path: Path = options.data / "traces" / case.trace
        if not path.exists():
            print(f"{path} does not exist; give the data folder with --data", file=sys.stderr)
            return 1
        whole = load_trace(path)
        stream = whole.head(options.requests)
        try:
            rate = capacity(case, stream)
        except MeasurementError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"\n{case.name}: balanced meets the targets of {ATTAINMENT:.0%} at {rate:.2f} requests/s", flush=True)
        for part in PARTS if options.part is None else (options.part,):
            compare, columns = _COMPARISONS[part]
            requests = whole if part == "instances" else stream
            rows = found.setdefault(case.name, {})[part] = compare(case, requests, rate)
            cells = [[name, *(f"{each:.3g}" for each in row)] for name, row in rows.items()]
            print(*text_table([[part, *columns], *cells]), sep="\n", flush=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
