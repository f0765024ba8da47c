"""`tandem version`."""

import argparse
import importlib.metadata
import platform

from tandem.cli.common import say

HELP = "show the version"
DESCRIPTION = "Show the version of tandem and of what it stands on."
EPILOG = "example:\n  tandem version\n"
_PACKAGES = ("torch", "ray", "grpcio", "protobuf", "tokenizers", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    del args
    say(f"tandem {installed_version('tandem-serve')}")
    say(f"  python {platform.python_version()}")
    for package in _PACKAGES:
        say(f"  {package} {installed_version(package)}")
    return 0


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
