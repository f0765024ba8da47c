"""What steps of an instance of several ranks take, on one host or on several: `python -m bench.ranks FILE`.

FILE is that of a worker. Where it has a section `ranks`, `tandem ranks FILE` runs on each other host; this command
takes the place of `tandem worker FILE`. Prints a table, and the same as a line of JSON.
"""

import argparse
import json
from pathlib import Path

from tandem.core.config import WorkerConfig, with_secrets
from tandem.core.config_file import load_config
from tandem.core.log_lines import configure_logging
from tandem.profiling.engine_profile import CellSequence, ProfileCell, open_profiler

CELLS = {
    "1 decoding sequence": ProfileCell(decodes=(CellSequence(1, 256),)),
    "16 decoding sequences": ProfileCell(decodes=(CellSequence(1, 256),) * 16),
    "a prompt of 256 tokens": ProfileCell(prompts=(CellSequence(256),)),
    "a prompt of 1024 tokens": ProfileCell(prompts=(CellSequence(1024),)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="for all cells together")
    args = parser.parse_args()
    config = with_secrets(load_config(args.file, WorkerConfig))
    configure_logging("text", "bench")
    section = config.instance.engine
    with open_profiler(config.model, section, config.ranks, config.cluster_token or "") as profiler:
        measured = profiler.measure(list(CELLS.values()), args.seconds)
    milliseconds = {name: round(1e3 * each.seconds, 3) for name, each in zip(CELLS, measured, strict=False)}
    hosts = 1 if config.ranks is None else len(config.ranks.per_host)
    for name, value in milliseconds.items():
        print(f"{section.shape} on {hosts} hosts, {name}: {value:.2f} ms")
    print(json.dumps({"shape": str(section.shape), "hosts": hosts, "milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
