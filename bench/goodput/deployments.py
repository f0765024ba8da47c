"""The systems that are compared, as data, and how Tandem is planned for a workload."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.common.served import ROOT
from bench.goodput.curve import Targets
from bench.goodput.servers import Server, serve_tandem, serve_vllm
from bench.goodput.workloads import GoodputWorkload
from tandem.core.config_file import load_config
from tandem.core.plan import Plan
from tandem.deploy.machine import usable_cores
from tandem.profiling.errors import MeasurementError

VLLM = "vllm"
_ROUTER_POLICIES = {"planned": "goodput", "planned-balanced": "balanced", "planned-slack": "goodput"}
PLANNED = frozenset(_ROUTER_POLICIES)
SYSTEMS = {
    "planned": "Tandem as `tandem plan` plans it for the workload and its targets",
    "planned-balanced": "the same plan, its router selects instances by the least work",
    "planned-slack": "as planned, and colocated instances spend the slack of those that decode on prompts",
    "disaggregated": "Tandem, one prefill and one decode instance, half of the cores each",
    "colocated": "Tandem, one colocated instance with all cores, chunked prompts",
    VLLM: "vLLM's CPU build with all cores",
}
_KV_MEMORY = "512MiB"
_PLAN_TIMEOUT_S = 900.0
_SLACK_TOKENS = 1024
_NO_PLAN_MEETS = 3  # exit status of `tandem plan`


@dataclass(frozen=True, slots=True)
class SystemDeployment:
    """What is started and measured. Its cells count for the targets of these `scales`; `note`: a sentence on it."""

    system: str
    name: str
    scales: tuple[float, ...]
    start: Callable[[], AbstractContextManager[Server]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentMaker:
    """Makes the deployments of a system. Calibrations, SLO files and plans are kept in `folder`, and used again."""

    model: Path
    folder: Path
    data: Path
    vllm_python: Path | None
    profile_s: float

    def make(self, system: str, workload: GoodputWorkload, targets: Mapping[float, Targets]) -> list[SystemDeployment]:
        """One; of the systems `PLANNED` one for each scale. `targets`: by their scale. Raises MeasurementError if there
        is no plan, ConfigError if there is no trace."""
        scales, cores = tuple(targets), usable_cores()
        if system in PLANNED:
            return self._planned(system, workload, targets)
        if system == VLLM:
            assert self.vllm_python is not None, "missing_of_vllm has been asked"
            caching = workload.shares_prefixes
            start = partial(serve_vllm, self.vllm_python, self.model, threads=cores, prefix_caching=caching)
            return [SystemDeployment(system, system, scales, start)]
        sections = {
            "disaggregated": {role: self._instance(max(1, cores // 2), workload) for role in ("prefill", "decode")},
            "colocated": {"colocated": self._instance(cores, workload)},
        }
        start = partial(serve_tandem, {"model": str(self.model), **sections[system]})
        return [SystemDeployment(system, system, scales, start)]

    def _instance(self, threads: int, workload: GoodputWorkload) -> dict[str, object]:
        engine = {"threads": threads, "kv_memory": _KV_MEMORY}
        return {"instances": 1, "prefix_cache": workload.shares_prefixes, "engine": engine}

    def _planned(
        self, system: str, workload: GoodputWorkload, targets: Mapping[float, Targets]
    ) -> list[SystemDeployment]:
        settings = (f"router.policy={_ROUTER_POLICIES[system]}",)
        found = []
        for scale, of_scale in targets.items():
            plan = self._plan(workload, scale, of_scale)
            served = plan.model_dump(mode="json", exclude_none=True)
            if plan.verdict == "infeasible":  # `tandem serve` refuses it; here it is the best that the planner knows
                served["verdict"] = _layout(plan)
            if system == "planned-slack":
                _spend_slack(served)
            note = f"{plan.verdict}: {_describe(plan)}"
            start = partial(serve_tandem, served, settings)
            found.append(SystemDeployment(system, f"{system}-{scale:g}", (scale,), start, note))
        return found

    def _plan(self, workload: GoodputWorkload, scale: float, targets: Targets) -> Plan:
        """The better of two plans: for instances with a core each, and for one instance with all cores. A cluster of
        the planner has devices of one size, and a CPU has none: its cores can be divided in several ways."""
        plans = []
        for devices, threads in dict.fromkeys(((usable_cores(), 1), (1, usable_cores()))):
            stem = f"{workload.name}-{scale:g}-{threads}t"
            slo, plan = self.folder / f"slo-{stem}.yaml", self.folder / f"plan-{stem}.yaml"
            if not plan.exists():
                slo.write_text(self._slo_text(workload, targets, devices, self._calibration(threads)))
                self._tandem("plan", str(slo), "-o", str(plan), "--report", str(plan.with_suffix(".html")))
            plans.append(load_config(plan, Plan))
        usable = [plan for plan in plans if plan.groups]
        if not usable:
            raise MeasurementError(f"`tandem plan` finds no deployment for workload {workload.name}")
        return max(usable, key=_merit)

    def _slo_text(self, workload: GoodputWorkload, targets: Targets, devices: int, calibration: Path) -> str:
        return yaml.safe_dump(
            {
                "model": str(self.model),
                "cluster": {
                    "nodes": [{"device": "cpu", "devices": devices, "calibration": str(calibration)}],
                    "kv_memory": _KV_MEMORY,
                },
                "slo": [{"ttft_s": round(targets.ttft_s, 4), "tpot_s": round(targets.tpot_s, 5), "attainment": 0.9}],
                "workload": workload.slo_section(self.data),
                "search": {"max_tp": 1, "max_pp": 1, "requests": 500},
            }
        )

    def _calibration(self, threads: int) -> Path:
        path = self.folder / f"calibration-{threads}t.yaml"
        if not path.exists():
            options = ["--threads", str(threads), "--kv-memory", _KV_MEMORY, "--seconds", str(self.profile_s)]
            if 2 * threads > usable_cores():  # two workers would measure a contention that one instance does not have
                options.append("--no-cluster")
            self._tandem("profile", str(self.model), "-o", str(path), *options)
        return path

    def _tandem(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tandem.cli.main", *arguments]
        print(f"tandem {' '.join(arguments)}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=_PLAN_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"tandem {arguments[0]} took more than {_PLAN_TIMEOUT_S:g} s") from error
        if done.returncode not in (0, _NO_PLAN_MEETS):
            raise MeasurementError(f"tandem {arguments[0]} ended with {done.returncode}: {done.stderr[-800:]}")


def _merit(plan: Plan) -> tuple[bool, float]:
    return plan.verdict != "infeasible", plan.expected.goodput if plan.expected else 0.0


def _spend_slack(plan: dict[str, Any]) -> None:
    """Its chunks of prompts are then as long as the slack of those that decode allows, up to _SLACK_TOKENS."""
    for group in plan["groups"]:
        if group["role"] == "colocated":
            group.update(policy="slack", max_batch_tokens=max(group["max_batch_tokens"], _SLACK_TOKENS))


def _layout(plan: Plan) -> str:
    roles = {group.role for group in plan.groups}
    if "colocated" not in roles:
        return "disaggregate"
    return "colocate" if len(roles) == 1 else "mixed"


def _describe(plan: Plan) -> str:
    parts = [
        f"{group.instances} {group.role} ({group.max_batch} sequences, {group.max_batch_tokens} prompt tokens, "
        f"{group.policy})"
        for group in plan.groups
    ]
    return " + ".join(parts) + (f", {plan.expected.goodput:.2f} requests/s predicted" if plan.expected else "")
