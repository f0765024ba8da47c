"""How long does a KV hand-over between two processes take, on each transport, compared with a plain copy?

The source is a prefill worker without an engine, in its own process. A hand-over is everything that a decode worker
waits for after the prefill: pull, check, copy, acknowledge. With --shapes: between instances of other ranks and block
sizes.
"""

import argparse
import asyncio
from dataclasses import replace

from bench.handover.measure import HandoverTime, measure
from tandem.core.kv_layout import KvLayout

_POOL_BYTES = 256 << 20


async def _print_sizes() -> None:
    print(f"{'block':>9} {'bytes':>10} {'blocks':>9} {'transport':>14} {'ms':>8} {'GB/s':>6} {'of plain copy':>14}")
    for layers, heads, head_dim in ((8, 4, 64), (28, 2, 128), (32, 8, 128)):
        layout = _layout(layers, heads, head_dim)
        for megabytes in (4, 64):
            for scattered in (False, True):
                for result in await measure(layout, (megabytes << 20) // layout.block_bytes, scattered=scattered):
                    print(f"{layout.block_bytes >> 10:>5} KiB", _row(result, "scattered" if scattered else "one run"))


async def _print_shapes() -> None:
    """64 MiB in scattered blocks, of a model with 28 layers and 4 KV heads."""
    print(f"{'shapes':>22} {'bytes':>10} {'blocks':>9} {'transport':>14} {'ms':>8} {'GB/s':>6} {'of plain copy':>14}")
    one = _layout(28, 4, 128)
    two, four, stages = replace(one, tp=2), replace(one, tp=4), replace(one, layers_per_stage=(15, 13))
    small = replace(one, block_size=8, num_blocks=2 * one.num_blocks)
    pairs = {
        "1x1 to 1x1": (one, one),
        "2x1 to 1x1": (two, one),
        "1x1 to 2x1": (one, two),
        "4x1 to 2x1": (four, two),
        "1x2 to 2x1": (stages, two),
        "blocks of 8 to 16": (small, one),
        "blocks of 16 to 8": (one, small),
    }
    for name, (source, destination) in pairs.items():
        num_blocks = (64 << 20) // destination.block_bytes
        for result in await measure(destination, num_blocks, source_layout=source, scattered=True):
            print(f"{name:>22}", _row(result, "scattered"))


def _layout(layers: int, heads: int, head_dim: int) -> KvLayout:
    block_bytes = KvLayout(layers, 1, heads, 16, head_dim, "bfloat16", "bench").block_bytes
    return KvLayout(layers, _POOL_BYTES // block_bytes, heads, 16, head_dim, "bfloat16", "bench")


def _row(result: HandoverTime, blocks: str) -> str:
    return (
        f"{result.num_bytes / 1e6:>7.1f} MB {blocks:>9} {result.transport.value:>14}"
        f" {result.handover_s * 1e3:>8.2f} {result.gigabytes_per_s:>6.2f} {result.share_of_plain:>13.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.handover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", action="store_true", help="between instances of other ranks and block sizes")
    asyncio.run(_print_shapes() if parser.parse_args().shapes else _print_sizes())


if __name__ == "__main__":
    main()
