"""`tandem scale`: change the number of workers while the cluster runs."""

import argparse
import os
import signal

from tandem.cli.common import add_pid_argument, find_run, say, state_folders
from tandem.core.errors import ConfigError

HELP = "change the number of workers"
DESCRIPTION = """\
Tell the running `tandem serve` how many workers there should be. New ones join when their model is loaded; those that
leave take no new requests and finish what they have. No request fails. Threads of running workers stay as they are."""
EPILOG = """\
examples:
  tandem scale --prefill 2
  tandem scale --prefill 1 --decode 3
  tandem status           shows when they have joined
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers there should be")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers there should be")
    add_pid_argument(parser)


def run(args: argparse.Namespace) -> int:
    asked = {"prefill": args.prefill, "decode": args.decode}
    given = {role: number for role, number in asked.items() if number is not None}
    if not given:
        raise ConfigError("say how many: --prefill N, --decode N or both")
    for role, number in given.items():
        if number < 1:
            raise ConfigError(f"--{role} must be at least 1, not {number}")
    state = find_run(args.pid)
    state_folders().leave_scale(state.pid, given)
    os.kill(state.pid, signal.SIGUSR1)
    words = " and ".join(f"{number} {role}" for role, number in given.items())
    say(f"asked for {words}; its terminal and `tandem status` show when it is done")
    return 0
