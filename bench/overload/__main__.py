"""What does a cluster do with more requests than it can answer?

Starts a router, a prefill and a decode worker. First it finds out what they can do: many clients that each ask again as
soon as they have an answer. Then requests come at 1.5 and at 3 times that rate, whether or not others are answered.
Every answer is compared with that of the same cluster when it was alone with the question.

The exit status is 1 if an answer was wrong, a request failed otherwise than with a refusal for load, a prompt was
computed twice, a lease on KV ended, throughput fell below 90 % of that at saturation, an answer began later than
--max-wait allows, or a process grew by more than --max-growth in the second half of an overload.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.overload.load import Outcome, Phase, answer_alone, draw_questions
from tandem.client import AsyncClient
from tandem.profiling.cluster import ClusterLauncher

_MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-python"
LEASE_S = 5.0  # far below the waits of an overload, so that what is not renewed is lost
SLACK_S = 5.0  # beyond --max-wait, for the prompt itself


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=_MODEL, help="checkpoint (default: the built-in one)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each overload (default: %(default)s)")
    parser.add_argument("--saturation-s", type=float, default=60.0, help="seconds at saturation (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="at saturation (default: %(default)s)")
    parser.add_argument("--loads", default="1.5,3", help="of the rate at saturation (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="that differ (default: %(default)s)")
    parser.add_argument("--kv-memory", default="16MiB", help="of each worker (default: %(default)s)")
    parser.add_argument("--max-wait", type=float, default=30.0, help="router.max_wait_s (default: %(default)s)")
    parser.add_argument("--max-growth", type=float, default=0.03, help="of memory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def growth(samples: Sequence[tuple[float, int]]) -> float:
    """Relative growth from the median of the third quarter to that of the last."""
    values = [value for _, value in samples]
    third, last = values[len(values) // 2 : -len(values) // 4], values[-len(values) // 4 :]
    return float(np.median(last) / np.median(third) - 1) if third and last else 0.0


def report(name: str, outcome: Outcome) -> None:
    def percentiles(values: Sequence[float]) -> str:
        return " / ".join(f"{value:.2f}" for value in np.percentile(values, (50, 90, 99))) if values else "none"

    counts = ", ".join(f"{count} {what}" for what, count in outcome.outcomes.most_common())
    print(f"\n--- {name}: {outcome.num_sent} requests in {outcome.duration_s:.0f} s: {counts}")
    print(
        f"  {outcome.tokens_per_s:.0f} tokens of answers a second; attempts beyond the first: {extra_attempts(outcome)}"
    )
    print(f"  first token after (s, median / p90 / p99): {percentiles(outcome.ttft_s)}")
    print(f"  refused after (s): {percentiles(outcome.refused_after_s)}")
    for process, samples in outcome.memory.items():
        first, last = samples[0][1] / 1e6, samples[-1][1] / 1e6
        print(f"  {process}: {first:.0f} -> {last:.0f} MB, {growth(samples):+.1%} in the second half")
    if outcome.first_error:
        print(f"  the first failure: {outcome.first_error}")


def extra_attempts(outcome: Outcome) -> int:
    return outcome.num_attempts - outcome.outcomes["answered"] - outcome.outcomes["wrong"]


def faults_of(name: str, outcome: Outcome, args: argparse.Namespace, saturated: Outcome) -> list[str]:
    faults = []
    if outcome.outcomes["wrong"]:
        faults.append(f"{outcome.outcomes['wrong']} wrong answers")
    if failed := outcome.num_sent - sum(outcome.outcomes[what] for what in ("answered", "wrong", "overloaded")):
        faults.append(f"{failed} requests failed: {outcome.first_error}")
    if extra_attempts(outcome):
        faults.append(f"{extra_attempts(outcome)} attempts more than requests")
    if outcome is not saturated:
        if not outcome.outcomes["overloaded"]:
            faults.append("nothing was refused, so this was no overload")
        if outcome.tokens_per_s < 0.9 * saturated.tokens_per_s:
            faults.append(f"throughput is {outcome.tokens_per_s / saturated.tokens_per_s:.0%} of that at saturation")
        if max(outcome.ttft_s, default=0.0) > args.max_wait + SLACK_S:
            faults.append(f"an answer began after {max(outcome.ttft_s):.1f} s")
        for process, samples in outcome.memory.items():
            if growth(samples) > args.max_growth:
                faults.append(f"{process} grew by {growth(samples):.1%}")
    return [f"{name}: {fault}" for fault in faults]


async def run(args: argparse.Namespace) -> dict[str, Outcome]:
    async with ClusterLauncher(args.model) as launcher:
        router = await launcher.start_router({"max_wait_s": args.max_wait})
        workers = await launcher.start_workers(router, {"kv_memory": args.kv_memory}, {"lease_s": LEASE_S})
        processes = {"router": router.process} | {role.value: worker for role, worker in workers.items()}
        pids = {name: started.process.pid for name, started in processes.items()}
        async with AsyncClient(router.grpc) as client:
            questions = draw_questions(args.questions, args.seed)
            questions = [
                await answer_alone(client, each) for each in tqdm(questions, "alone", disable=None, leave=False)
            ]

            outcomes = {}
            with tqdm(desc="saturation", unit="request", disable=None, leave=False) as bar:
                saturation = Phase(client, questions, pids, bar)
                outcomes["saturation"] = saturated = await saturation.saturate(args.clients, args.saturation_s)
            report("saturation", saturated)
            rate = saturated.outcomes["answered"] / args.saturation_s
            for load in map(float, args.loads.split(",")):
                name = f"{load:g} times that, {load * rate:.1f} requests/s"
                with tqdm(desc=name, unit="request", disable=None, leave=False) as bar:
                    overload = Phase(client, questions, pids, bar)
                    outcomes[name] = await overload.overload(load * rate, args.minutes * 60, args.seed + 1)
                report(name, outcomes[name])
                sys.stdout.flush()
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    outcomes = asyncio.run(run(args))
    if args.json is not None:
        args.json.write_text(
            json.dumps(
                {
                    name: asdict(replace(each, outcomes=dict(each.outcomes))) | {"tokens_per_s": each.tokens_per_s}  # type: ignore[arg-type]
                    for name, each in outcomes.items()
                }
            )
        )
    saturated = outcomes["saturation"]
    faults = [fault for name, outcome in outcomes.items() for fault in faults_of(name, outcome, args, saturated)]
    print()
    for fault in faults or ["every promise was kept"]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
