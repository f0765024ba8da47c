"""`tandem schema`: what may stand in a file, for editors."""

import argparse
import json

from pydantic import BaseModel

from tandem.cli.common import say
from tandem.core.config import ServeConfig
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile

HELP = "print the JSON schema of a file, for editors"
DESCRIPTION = """\
Print the JSON schema of SLO files, plans or serve files: every setting with its type, its default and what it means.
Editors use it to complete and to check while you type."""
EPILOG = """\
examples:
  tandem schema slo > slo.schema.json

An editor with the YAML language server (VS Code's YAML extension, for one) takes it from the first line of your file:
  # yaml-language-server: $schema=slo.schema.json
"""

KINDS: dict[str, type[BaseModel]] = {"slo": SloFile, "plan": Plan, "serve": ServeConfig}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, help="slo: what to serve and how well; plan: what to run; serve: how")


def run(args: argparse.Namespace) -> int:
    say(schema_of(args.kind))
    return 0


def schema_of(kind: str) -> str:
    """Of a file of this kind, as JSON text."""
    return json.dumps(KINDS[kind].model_json_schema(), indent=2)
