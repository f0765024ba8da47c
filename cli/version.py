"""`tandem version`."""

import importlib.metadata
import platform

from tandem.cli.output import print_line

EPILOG = "example:\n  tandem version"
_PACKAGES = ("torch", "ray", "grpcio", "protobuf", "tokenizers", "safetensors")


def run() -> int:
    """Show the version of tandem and of the libraries under it."""
    print_line(f"tandem {installed_version('tandem-serve')}")
    print_line(f"  python {platform.python_version()}")
    for package in _PACKAGES:
        print_line(f"  {package} {installed_version(package)}")
    return 0


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
