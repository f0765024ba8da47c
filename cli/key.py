"""`tandem key`: make an API key."""

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.output import print_line
from tandem.core.api_keys import ApiKeyFile, digest_of, new_key
from tandem.core.config_file import parse_config
from tandem.core.errors import ConfigError

EPILOG = """\
examples:
  tandem key alice-laptop --tenant alice
  tandem serve serve.yaml --set router.api_keys=file:keys.yaml
  TANDEM_API_KEY=tandem-... tandem chat

A router reads its file again within seconds of a change: remove an entry to withdraw the key. An entry may also have
expires, max_requests, requests_per_s, burst and names_tenants; see examples/api_keys.yaml."""


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the key, in logs and messages")],
    tenant: Annotated[str | None, typer.Option(help="whose it is (default: NAME)")] = None,
) -> int:
    """Make an API key. Print the key, which is kept nowhere, and its entry for the file that router.api_keys names. The
    entry holds the key's hash only."""
    key = new_key()
    entry = f'{{name: "{name}", tenant: "{tenant or name}", sha256: "{digest_of(key)}"}}'
    try:
        parse_config(f"keys: [{entry}]", "", Path(), ApiKeyFile)
    except ConfigError as error:
        raise ConfigError("NAME and --tenant are 1 to 64 letters, digits, '.', '_' or '-'") from error
    print_line(f"key, for the client:\n  {key}\nentry, for the list `keys` of the router's file:\n  - {entry}")
    return 0
