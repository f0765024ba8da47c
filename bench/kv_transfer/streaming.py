"""How much of a KV transfer does a client wait for, with and without streaming?

Two clusters of a router, a prefill and a decode worker run side by side and get such prompts in turns, one request at a
time. In one of them KV comes while the prompt is computed. `transfer` is the timeline's part from the first token to
the commit, so it is what is exposed. Medians, with the least and the most. The load of the machine is printed first:
wall times need a quiet one.

    python -m bench.kv_transfer.streaming --model small --transport gloo --tokens 2048 3500
"""

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from tandem import AsyncClient
from tandem.models.random_checkpoint import read_shape, write_random_checkpoint
from tandem.profiling.cluster import ClusterLauncher
from tandem.profiling.errors import MeasurementError

_SHAPES = Path(__file__).resolve().parents[1] / "engine" / "models.yaml"
_MIB = 1 << 20
_HEARTBEAT_S = 2.0  # until the workers have reported all transfers
VARIANTS: Mapping[str, Mapping[str, object]] = {"streamed": {}, "afterwards": {"stream_kv_from": None}}
PARTS = ("prefill_s", "transfer_s", "decode_queue_s", "second_token_s")


async def measure(
    model: Path, transport: str, lengths: Sequence[int], repetitions: int, threads: int, stages: int
) -> dict[tuple[int, str, str], list[float]]:
    """Seconds of each repetition by (tokens, variant, part). Raises MeasurementError."""
    draw = random.Random(5)
    seconds: dict[tuple[int, str, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        clients, routers = {}, {}
        for variant, settings in VARIANTS.items():
            launcher = await stack.enter_async_context(ClusterLauncher(model))
            router = await launcher.start_router()
            engine = {"threads": threads, "kv_memory": "512MiB", "dtype": "bfloat16", "pp": stages}
            instance = {"transport": transport, "prefix_cache": False, **settings}
            await launcher.start_workers(router, engine, instance)
            routers[variant] = router
            clients[variant] = await stack.enter_async_context(AsyncClient(router.grpc))
        for num_tokens in lengths:
            for i in range(repetitions + 1):
                for variant, client in clients.items():
                    token_ids = [draw.randrange(3, 8000) for _ in range(num_tokens)]
                    answer = await client.generate(token_ids=token_ids, max_tokens=3, ignore_eos=True, timeout_s=120.0)
                    if i > 0:  # the first one is a warm-up
                        parts = answer.timeline.parts() | {"ttft": answer.timeline.ttft_s or 0.0}
                        for part in (*PARTS, "ttft"):
                            seconds.setdefault((num_tokens, variant, part), []).append(parts[part])
        await asyncio.sleep(_HEARTBEAT_S)
        page = await asyncio.to_thread(lambda: httpx.get(f"http://{routers['streamed'].http}/metrics").text)
    streamed, moved = (_sum(page, f"tandem_transfer_{name}_total") for name in ("streamed_bytes", "bytes"))
    print(f"\n{transport}: {streamed / moved:.1%} of the bytes came before the end of their prefill", flush=True)
    return seconds


def _sum(page: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"{name}{{"))


async def _print(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="bench-streaming-") as folder:
        shape = read_shape(_SHAPES, options.model)
        model = write_random_checkpoint(Path(folder) / options.model, shape, seed=3, dtype="bfloat16")
        for transport in options.transport:
            seconds = await measure(
                model, transport, options.tokens, options.repetitions, options.threads, options.stages
            )
            for num_tokens in options.tokens:
                num_bytes = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * num_tokens
                print(f"\n{transport}, {num_tokens} tokens, {num_bytes / _MIB:.1f} MiB of KV; ms")
                print(f"{'':>16}" + "".join(f"{variant:>26}" for variant in VARIANTS))
                for part in ("ttft", *PARTS):
                    row = [seconds[num_tokens, variant, part] for variant in VARIANTS]
                    figures = [
                        f"{median(each) * 1e3:.2f} ({min(each) * 1e3:.2f}-{max(each) * 1e3:.2f})" for each in row
                    ]
                    print(f"{part.removesuffix('_s'):>16}" + "".join(f"{each:>26}" for each in figures), flush=True)
                exposed, whole = (median(seconds[num_tokens, variant, "transfer_s"]) for variant in VARIANTS)
                print(f"exposed: {exposed / whole:.0%} of the transfer", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_transfer.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("tiny", "small"), default="small", help="of bench/engine/models.yaml")
    parser.add_argument("--transport", nargs="+", default=["shared_memory", "gloo"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 3500])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--stages", type=int, default=1, help="pipeline stages of each engine")
    options = parser.parse_args()
    load = os.getloadavg()
    print(f"load average {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores", flush=True)
    try:
        asyncio.run(_print(options))
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
