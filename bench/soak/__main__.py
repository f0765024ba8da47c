"""Does a cluster keep its promises for as long as it runs? Load, cancels, bad requests, slow readers, kills and stalls.

The cluster is started by `tandem serve`. Mixed: two prefill and two decode instances; every 30 s one of their processes
is killed or stopped. --short-requests: one pair, that many short requests, and nothing is disturbed, to see whether
objects are left behind. A share of the answers is compared with transformers, or with a repetition at the end. The exit
status is 1 if an answer is wrong or missing, a KV block leaks, or a process grows with the requests.

    python -m bench.soak                           15 minutes
    python -m bench.soak --minutes 2 --fault-every 10
    python -m bench.soak --short-requests 100000
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

import httpx
from tqdm import tqdm

from bench.common.served import ROOT, ServedCluster
from bench.soak.clients import Clients, Ended
from bench.soak.faults import FaultInjector
from bench.soak.references import AnswerSample, Checked, check
from bench.soak.report import FAULTY_OUTCOMES, SoakResult
from bench.soak.requests import MixedRequests, ShortRequests
from bench.soak.resources import Sampler, block_counts
from tandem.core.errors import TandemError

MODEL = ROOT / "models" / "tiny-python"
IDLE_TIMEOUT_S = 30.0
_MOST_FAULTY = 20  # are printed


@dataclass(slots=True)
class _Load:
    """The requests of a run so far. `is_over`: no more are sent."""

    requests: MixedRequests | ShortRequests
    sample: AnswerSample
    progress: "tqdm[Never]"
    outcomes: Counter[str] = field(default_factory=Counter)
    faulty: list[str] = field(default_factory=list)
    is_over: bool = False

    @property
    def answered(self) -> int:
        return self.outcomes.total()

    async def send_until_over(self, clients: Clients) -> None:
        while not self.is_over:
            self.add(await clients.send(self.requests.next()))

    def add(self, ended: Ended) -> None:
        self.outcomes[ended.outcome] += 1
        if ended.outcome in FAULTY_OUTCOMES and len(self.faulty) < _MOST_FAULTY:
            self.faulty.append(f"{ended.outcome} after {ended.took_s:.1f} s: {ended.detail}; {ended.request}"[:600])
        self.sample.offer(ended)
        self.progress.update()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="of mixed load (default: %(default)g)")
    parser.add_argument("--short-requests", type=int, metavar="N", help="N short requests on one pair instead")
    parser.add_argument("--clients", type=int, default=48, metavar="N", help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--fault-every", type=float, default=30.0, metavar="S", help="a kill or a stall; 0: none (default: %(default)g)"
    )
    parser.add_argument("--sample", type=float, default=0.05, help="share of answers compared (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    return parser.parse_args(argv)


def serve_file(*, prefill: int, decode: int) -> dict[str, object]:
    """float32, so that transformers in float32 is the reference; little memory, so that it fills."""
    engine = {"threads": 1, "kv_memory": "24MiB", "dtype": "float32"}
    return {
        "model": str(MODEL),
        "router": dict.fromkeys(("http", "grpc", "control"), "127.0.0.1:0"),
        "prefill": {"instances": prefill, "max_batch_tokens": 512, "engine": engine},
        "decode": {"instances": decode, "engine": engine},
    }


async def soak(args: argparse.Namespace, served: ServedCluster) -> SoakResult:
    is_short = args.short_requests is not None
    clients = Clients(served.http, served.grpc, args.clients)
    total = args.short_requests if is_short else None
    progress: tqdm[Never] = tqdm(total=total, desc="requests", unit="", smoothing=0.05, mininterval=1.0)
    requests = ShortRequests(args.seed) if is_short else MixedRequests(args.seed)
    load = _Load(requests, AnswerSample(args.sample, args.seed), progress)
    sampler = Sampler(served.http, served.processes, lambda: load.answered)
    injector = FaultInjector(served.processes, args.fault_every, args.seed)
    began_s = time.monotonic()
    senders = [asyncio.create_task(load.send_until_over(clients)) for _ in range(args.clients)]
    helpers = [asyncio.create_task(sampler.run())]
    if args.fault_every and not is_short:
        helpers.append(asyncio.create_task(injector.run()))
    while not _is_over(args, load, began_s):
        if failed := next((task for task in (*senders, *helpers) if task.done()), None):
            failed.result()  # raises: only a mistake of this program ends them
        await asyncio.sleep(0.2)
    load.is_over = True
    for helper in helpers:
        helper.cancel()
        with suppress(asyncio.CancelledError):
            await helper
    await asyncio.gather(*senders)
    minutes = (time.monotonic() - began_s) / 60
    progress.close()
    if args.fault_every and not is_short:
        await _restart_router(served, injector)
    blocks = await _wait_idle(served)
    pools = sampler.look_at_processes()
    checked = await _check(load.sample, clients)
    await clients.close()
    num_instances = sum("router" not in process.name for process in served.processes())
    return SoakResult(
        minutes=minutes,
        outcomes=load.outcomes,
        faulty=load.faulty,
        faults=injector.done,
        checked=checked,
        growths=sampler.samples.growths(),
        most_leaked_blocks=sampler.samples.most_leaked_blocks,
        blocks_at_end=blocks,
        pools_at_end=pools,
        expected_pools=num_instances,
    )


def _is_over(args: argparse.Namespace, load: _Load, began_s: float) -> bool:
    if args.short_requests is not None:
        return load.answered >= int(args.short_requests)
    return time.monotonic() - began_s > float(args.minutes) * 60


async def _restart_router(served: ServedCluster, injector: FaultInjector) -> None:
    """The last fault, when nothing runs any more and its growth has been measured."""
    router = next(process for process in served.processes() if "router" in process.name)
    await injector.kill(router)


async def _wait_idle(served: ServedCluster) -> dict[str, int]:
    """Blocks by owner once no instance holds any for a request, at the latest after `IDLE_TIMEOUT_S`."""
    blocks: dict[str, int] = {}
    until_s = time.monotonic() + IDLE_TIMEOUT_S
    async with httpx.AsyncClient(timeout=5.0) as client:
        while time.monotonic() < until_s:
            with suppress(httpx.HTTPError):
                blocks = block_counts((await client.get(f"{served.http}/metrics")).text)
                if blocks and blocks["total"] == blocks["free"] + blocks["cached"]:
                    await asyncio.sleep(1.0)  # heartbeats of all
                    return block_counts((await client.get(f"{served.http}/metrics")).text)
            await asyncio.sleep(0.5)
    return blocks


async def _check(sample: AnswerSample, clients: Clients) -> Checked:
    progress: tqdm[Never] = tqdm(total=len(sample.kept), desc="comparing answers", unit="", mininterval=1.0)
    checked = await check(sample.kept, clients, MODEL, lambda: _advance(progress))
    progress.close()
    return checked


def _advance(progress: "tqdm[Never]") -> None:
    progress.update()


def main(argv: Sequence[str] | None = None) -> int:
    """0: it passes; 1: it does not; 2: it could not be run."""
    args = parse_arguments(argv)
    each = 1 if args.short_requests is not None else 2
    served = ServedCluster(serve_file(prefill=each, decode=each), environment={"OMP_NUM_THREADS": "1"})
    result = None
    try:
        served.start()
        result = asyncio.run(soak(args, served))
    except TandemError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        logs = served.logs()
        left = served.stop()
        if result is None:
            for name, log in logs.items():
                print(f"--- {name}\n{log}", file=sys.stderr)
    result.left.extend(left)
    print(result.text())
    if result.failures():
        for name, log in logs.items():
            print("\n".join(itertools.chain([f"--- the end of {name}.log"], log.splitlines()[-15:])), file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(result.as_json(), indent=1, default=str))
    return 1 if result.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
