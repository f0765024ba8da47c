"""A planner of few plans: how many of a fixed number of equal instances are for prefill, and how many for decode."""

from collections.abc import Sequence
from pathlib import Path

from tandem.core.config_file import load_config
from tandem.core.plan import Expected, Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.deploy.replanner import ReplanResult
from tandem.placement.replanning.live_workload import RUNNING_PLAN_NAME, SLO_FILE_NAME
from tandem.placement.replanning.replan import Forecast, changes_between, forecast_of, gain_of
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace

MODEL, DEVICE, TP = "Llama-3.1-70B", "H100-80GB-SXM5", 2
_INSTANCES = 8
_KV_TOKENS = 60_000  # about what two such devices hold in addition to the weights


class SplitPlanner:
    """A `deploy.replanner.RunPlanner`. Forecasts are made once for each quarter of the way from one kind of
    traffic to the other, by the mean output length."""

    def __init__(self, mean_output_tokens: Sequence[float]) -> None:
        """`mean_output_tokens`: of the planned and of the other kind of traffic."""
        self._mean_output_tokens = mean_output_tokens
        self._forecasts: dict[tuple[int, int], Forecast] = {}

    def best(self, question: SloFile, rate: float) -> Plan:
        splits = range(2, _INSTANCES - 1)
        return max(
            (with_expectation(split(prefill), self._forecast(prefill, question, rate), rate) for prefill in splits),
            key=lambda plan: plan.expected.goodput if plan.expected else 0.0,
        )

    async def __call__(self, folder: Path) -> ReplanResult:
        question = load_config(folder / SLO_FILE_NAME, SloFile)
        assert question.workload.trace is not None, "live requests are a trace"
        rate = load_trace(question.workload.trace).rate
        running = load_config(folder / RUNNING_PLAN_NAME, Plan)
        proposed = self.best(question, rate)
        forecast = self._forecast(running.groups[0].instances, question, rate)
        rival = self._forecast(proposed.groups[0].instances, question, rate)
        gain = gain_of((running, forecast), (proposed, rival), question)
        changes = changes_between(running, proposed)
        return ReplanResult("; ".join(changes), changes, gain, regains=False, attainment=forecast.attainment)

    def _forecast(self, prefill: int, question: SloFile, rate: float) -> Forecast:
        requests = make_stream(question.workload, question.slo, count=question.search.requests, rate=rate, seed=0)
        planned, other = self._mean_output_tokens
        quarter = round(4 * (planned - float(requests.output_tokens.mean())) / (planned - other))
        key = (quarter, prefill)
        if key not in self._forecasts:
            self._forecasts[key] = forecast_of(split(prefill), question, rate, rate)
        return self._forecasts[key]


def split(prefill: int) -> Plan:
    """The plan with `prefill` instances for prefill, and the others for decode."""
    decode = _INSTANCES - prefill
    shape = {"device": DEVICE, "tp": TP, "kv_tokens": _KV_TOKENS, "max_batch": 256}
    groups = [{"role": "prefill", "instances": prefill}, {"role": "decode", "instances": decode}]
    return Plan(
        model=MODEL,
        verdict="disaggregate",
        groups=tuple(PlanGroup.model_validate(group | shape) for group in groups),
    )


def with_expectation(plan: Plan, forecast: Forecast, rate: float) -> Plan:
    goodput = forecast.goodput
    expected = Expected(
        rate=rate,
        goodput=goodput,
        goodput_ci=(goodput, goodput),
        goodput_per_device=goodput / plan.num_devices,
        classes=(),
    )
    return plan.model_copy(update={"expected": expected})
