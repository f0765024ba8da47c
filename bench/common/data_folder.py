"""The folder of public measurements and traces, which is too large for the repository."""

import argparse
from pathlib import Path


def add_data_argument(parser: argparse.ArgumentParser, subfolders: str) -> None:
    """`--data`. `subfolders`: those that the programme reads."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        metavar="DIR",
        help=f"public measurements and traces, with {subfolders} (default: %(default)s)",
    )
