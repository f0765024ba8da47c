"""How long does a KV hand-over between two processes take, on each transport, compared with a plain copy?

The source is a prefill worker without an engine, in its own process. A hand-over is everything that a decode worker
waits for after the prefill: pull, check, copy, acknowledge.
"""

import argparse
import asyncio

from bench.handover.measure import measure
from tandem.core.kv_layout import KvLayout


async def _print_table() -> None:
    print(f"{'block':>9} {'bytes':>10} {'blocks':>9} {'transport':>14} {'ms':>8} {'GB/s':>6} {'of plain copy':>14}")
    for layers, heads, head_dim in ((8, 4, 64), (28, 2, 128), (32, 8, 128)):
        block_bytes = KvLayout(layers, 1, heads, 16, head_dim, "bfloat16", "bench").block_bytes
        layout = KvLayout(layers, (256 << 20) // block_bytes, heads, 16, head_dim, "bfloat16", "bench")
        for megabytes in (4, 64):
            for scattered in (False, True):
                for result in await measure(layout, (megabytes << 20) // block_bytes, scattered=scattered):
                    print(
                        f"{block_bytes >> 10:>5} KiB {result.num_bytes / 1e6:>7.1f} MB"
                        f" {'scattered' if scattered else 'one run':>9} {result.transport.value:>14}"
                        f" {result.handover_s * 1e3:>8.2f} {result.gigabytes_per_s:>6.2f}"
                        f" {result.share_of_plain:>13.0%}"
                    )


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m bench.handover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(_print_table())


if __name__ == "__main__":
    main()
