"""How fast does KV move between two processes, compared with a plain copy and with other engines?

By default: 1 to 256 MiB in one run of blocks and in scattered ones, whose contiguous pieces have 8, 64 and 256 KiB. A
*copy* is the bytes alone. A *hand-over* is everything that a decode worker waits for after the prefill: pull, check,
copy, acknowledge. The source is a prefill worker without an engine, in its own process. All ways take turns.

--engines adds mooncake-transfer-engine-non-cuda and nixl, each between two processes of an environment of their own:

    python3.11 -m venv /opt/engines; apt-get install libibverbs1 librdmacm1 libnuma1
    /opt/engines/bin/pip install numpy mooncake-transfer-engine-non-cuda
    /opt/engines/bin/pip install --no-deps nixl-cu12==1.5.1 nixl==1.5.1
    python -m bench.kv_transfer --engines /opt/engines/bin/python

Their times end when they say so themselves: nixl spins meanwhile, and its target does not look at the bytes.

--shapes: hand-overs between instances of other ranks and block sizes. Wall times need a quiet machine; the load is
printed first. The last line of the comparison is all of it as JSON.
"""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from bench.kv_transfer.comparison import PIECES_KIB, PLAIN, TransferCell, compare
from bench.kv_transfer.measure import HandoverTime, measure
from tandem.core.kv_layout import KvLayout
from tandem.profiling.errors import MeasurementError

_POOL_BYTES = 256 << 20
MEGABYTES = (1, 4, 16, 64, 256)


async def _print_comparison(options: argparse.Namespace) -> None:
    cells: list[TransferCell] = []
    for piece_kib in options.pieces:
        found = await compare(piece_kib, options.megabytes, options.repetitions, options.engines)
        cells += found
        print(f"\npieces of {piece_kib} KiB, GB/s (of a plain copy)")
        print(f"{'':>26}" + "".join(f"{size:>8} MiB    " for size in options.megabytes))
        for is_scattered in (False, True):
            plain = {cell.num_bytes: cell for cell in found if cell.way == PLAIN and cell.is_scattered is is_scattered}
            print("scattered" if is_scattered else "one run")
            for way in dict.fromkeys(cell.way for cell in found):
                row = [cell for cell in found if cell.way == way and cell.is_scattered is is_scattered]
                shares = [cell.gigabytes_per_s / plain[cell.num_bytes].gigabytes_per_s for cell in row]
                figures = [
                    f"{cell.gigabytes_per_s:>9.2f} ({share:>4.0%})" for cell, share in zip(row, shares, strict=True)
                ]
                print(f"{way:>26}" + "".join(figures), flush=True)
    print(json.dumps([asdict(cell) for cell in cells]))


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", action="store_true", help="between instances of other ranks and block sizes")
    parser.add_argument("--engines", type=Path, metavar="PYTHON", help="an interpreter that has mooncake and nixl")
    parser.add_argument("--megabytes", type=int, nargs="+", default=MEGABYTES, metavar="N", help="sizes, in MiB")
    parser.add_argument("--pieces", type=int, nargs="+", choices=PIECES_KIB, default=PIECES_KIB, help="in KiB")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    load = os.getloadavg()
    print(f"load average {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores", flush=True)
    try:
        asyncio.run(_print_shapes() if options.shapes else _print_comparison(options))
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
