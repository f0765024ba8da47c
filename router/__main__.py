"""`python -m router --config FILE`: one router process, without Ray."""

import argparse
import sys
from pathlib import Path

from tandem.core.config import RouterConfig
from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.router.process import run_router


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description="Run one router process.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings of a RouterConfig")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that requests may take to end (default 10)")
    arguments = parser.parse_args()
    try:
        run_router(load_config(arguments.config, RouterConfig), arguments.grace)
    except TandemError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
