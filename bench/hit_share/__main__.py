"""Does a live cluster find the share of prompt tokens in its prefix caches that the planner predicts?

A trace whose rows name their blocks (Mooncake's) is sent whole, with all lengths divided by --scale, to `tandem serve`
with the built-in model. A block's tokens follow from its name, so prompts share what the trace says; a RequestStream,
which the prediction uses, only knows one group and one shared length of each request. Requests go in a closed loop, in
the trace's order, so the speed of the machine hardly matters; the prediction is `tandem simulate`'s of the same plan in
the same loop.

    python -m bench.hit_share mooncake_conversation_trace.jsonl.gz
    python -m bench.hit_share trace.jsonl --scale 32 --kv-tokens 40000 --concurrency 8 --json result.json
"""

import argparse
import asyncio
import gzip
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import uvloop
from tqdm import tqdm

from bench.common.served import ServedCluster
from bench.load.__main__ import served_model
from tandem.cli.common import BUILT_IN_MODEL
from tandem.core.errors import TandemError
from tandem.core.plan import Plan, PlanGroup
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, NodeSection, SearchSection, SloFile, WorkloadSection
from tandem.placement.cluster import Cluster
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.simulator import simulate
from tandem.placement.workload.streams import trace_requests
from tandem.profiling.completion_client import CompletionClient
from tandem.profiling.errors import MeasurementError
from tandem.profiling.serving_profile import FIRST_TOKEN_ID, LAST_TOKEN_ID

_BLOCK_TOKENS = 512  # of the trace
_NUM_PARTS = 6  # of the trace, for the table
_SLO = SloClass(ttft_s=10.0, tpot_s=1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """A request. `blocks` are the names of its prompt's blocks, the last of which may be shorter."""

    timestamp: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    def prompt(self, block_tokens: int) -> list[int]:
        tokens: list[int] = []
        for block in self.blocks:
            random = np.random.default_rng(block)
            tokens += random.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, block_tokens).tolist()
        return tokens[: self.prompt_tokens]


@dataclass(frozen=True, slots=True)
class Cached:
    """Of each request, in the trace's order: prompt tokens, and how many of them were in a cache."""

    prompt_tokens: npt.NDArray[np.int64]
    cached_tokens: npt.NDArray[np.int64]

    def shares(self) -> list[float]:
        """Of all, then of each part."""
        parts = [slice(None), *(slice(*ends) for ends in _ends(len(self.prompt_tokens)))]
        return [float(self.cached_tokens[part].sum() / self.prompt_tokens[part].sum()) for part in parts]


def scaled_rows(path: Path, scale: int, max_tokens: int, count: int | None) -> list[Row]:
    """Those that the model takes, `max_tokens` at most."""
    text = path.read_bytes()
    values = map(orjson.loads, (gzip.decompress(text) if path.suffix == ".gz" else text).splitlines())
    rows = [
        Row(
            each["timestamp"],
            max(1, math.ceil(each["input_length"] / scale)),
            max(1, round(each["output_length"] / scale)),
            tuple(each["hash_ids"]),
        )
        for each in values
    ]
    return [row for row in rows if row.prompt_tokens + row.output_tokens <= max_tokens][:count]


def predicted(plan: Plan, slo: SloFile, concurrency: int) -> Cached:
    model, cluster = model_shape(plan.model), Cluster.of(slo.cluster)
    stream = trace_requests(slo.workload, slo.slo, seed=0, max_context_tokens=model.max_context_tokens).requests
    deployment = deployment_of(plan, cost_source_of(slo, model), cluster, model)
    result = simulate(deployment, stream, concurrency=concurrency)
    return Cached(stream.prompt_tokens, result.num_cached_tokens)


async def live(url: str, rows: Sequence[Row], block_tokens: int, concurrency: int) -> Cached:
    """Raises MeasurementError if a request fails."""
    client, model = CompletionClient(url), served_model(url)
    cached = np.zeros(len(rows), dtype=np.int64)
    waiting = iter(enumerate(rows))
    bar = tqdm(total=len(rows), unit="request", disable=None, leave=False)

    async def send() -> None:
        for index, row in waiting:
            request = client.make_request(model, row.prompt(block_tokens), row.output_tokens)
            timed = await client.complete(request, 600.0)
            if timed.usage is None:
                raise MeasurementError(f"request {index} failed: {timed.error}")
            details = timed.usage.get("prompt_tokens_details")
            cached[index] = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
            bar.update()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send())
    finally:
        client.close()
        bar.close()
    return Cached(np.array([row.prompt_tokens for row in rows]), cached)


def compare(rows: Sequence[Row], args: argparse.Namespace) -> dict[str, list[float]]:
    """`predicted` and `live` shares: of all requests, then of each part of the trace."""
    block_tokens = _BLOCK_TOKENS // args.scale
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.jsonl")
        fields = (
            {
                "timestamp": r.timestamp,
                "input_length": r.prompt_tokens,
                "output_length": r.output_tokens,
                "hash_ids": r.blocks,
            }
            for r in rows
        )
        trace.write_bytes(b"\n".join(map(orjson.dumps, fields)))
        num_instances = args.prefill + args.decode
        slo = SloFile(
            model=str(BUILT_IN_MODEL),
            cluster=ClusterSection(nodes=(NodeSection(device="cpu", devices=num_instances),)),
            slo=(_SLO,),
            workload=WorkloadSection(trace=trace),
            search=SearchSection(),
        )
        groups = tuple(
            PlanGroup(role=role, instances=count, device="cpu", kv_tokens=args.kv_tokens)
            for role, count in (("prefill", args.prefill), ("decode", args.decode))
        )
        plan = Plan(model=str(BUILT_IN_MODEL), verdict="disaggregate", groups=groups)
        of_planner = predicted(plan, slo, args.concurrency)
    # Not the plan itself: without a calibration `tandem serve` gives memory for numbers of four bytes.
    memory = math.ceil(args.kv_tokens * model_shape(plan.model).kv_bytes_per_token)
    sections: dict[str, object] = {
        group.role: {
            "instances": group.instances,
            "engine": {"device": "cpu", "dtype": "bfloat16", "kv_memory": memory},
        }
        for group in plan.groups
    }
    cluster = ServedCluster({"model": plan.model, **sections}, settings=args.settings)
    try:
        cluster.start()
        of_cluster = uvloop.run(live(cluster.http, rows, block_tokens, args.concurrency))
    finally:
        cluster.stop()
    return {"predicted": of_planner.shares(), "live": of_cluster.shares()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hit_share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--scale", type=int, default=32, help="lengths are divided by it (default: %(default)s)")
    parser.add_argument("--requests", type=int, metavar="N", help="the first ones only")
    parser.add_argument("--prefill", type=int, default=2, metavar="N", help="instances (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="instances (default: %(default)s)")
    parser.add_argument("--kv-tokens", type=int, default=42_500, help="of an instance (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of tandem serve")
    parser.add_argument("--json", type=Path, help="write the shares there")
    args = parser.parse_args(argv)
    try:
        rows = scaled_rows(args.trace, args.scale, model_shape(str(BUILT_IN_MODEL)).max_context_tokens, args.requests)
        shares = compare(rows, args)
    except TandemError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(rows):,} requests: share of prompt tokens that were in a cache")
    names = ["all", *(f"{first:,} to {last:,}" for first, last in _ends(len(rows)))]
    for name, of_planner, of_cluster in zip(names, shares["predicted"], shares["live"], strict=True):
        print(f"{name:18} predicted {of_planner:6.1%}   live {of_cluster:6.1%}   {of_planner - of_cluster:+.1%}")
    if args.json is not None:
        args.json.write_text(json.dumps(shares))
    return 0


def _ends(count: int) -> list[tuple[int, int]]:
    return [(count * part // _NUM_PARTS, count * (part + 1) // _NUM_PARTS) for part in range(_NUM_PARTS)]


if __name__ == "__main__":
    sys.exit(main())
