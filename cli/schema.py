"""`tandem schema`: the settings of a file, for editors."""

import json
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from tandem.cli.output import print_line
from tandem.core.config import ServeConfig
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.deploy.kubernetes.values import ChartValues

EPILOG = """\
examples:
  tandem schema slo > slo.schema.json

An editor with the YAML language server (VS Code's YAML extension, for one) reads it when your file begins with:
  # yaml-language-server: $schema=slo.schema.json"""

KINDS: dict[str, type[BaseModel]] = {"slo": SloFile, "plan": Plan, "serve": ServeConfig, "values": ChartValues}


def run(
    kind: Annotated[
        Literal["slo", "plan", "serve", "values"],
        typer.Argument(
            help="slo: what to serve and how well; plan: what to run; serve: how to run it; values: of the Helm chart"
        ),
    ],
) -> int:
    """Print the JSON schema of SLO files, plans, serve files, or values of the Helm chart: each setting with its type,
    default and meaning. Editors use it to complete and to check a file while you type."""
    print_line(schema_of(kind))
    return 0


def schema_of(kind: str) -> str:
    """Of a file of this kind, as JSON text."""
    return json.dumps(KINDS[kind].model_json_schema(), indent=2)
