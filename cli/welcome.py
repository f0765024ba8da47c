"""What a cluster says when it is ready, and when it is about to stop."""

import asyncio
import json
import logging
import shlex

from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.core.log_lines import announce
from tandem.deploy.fleet_query import fetch_fleet
from tandem.deploy.run_state import RunState

log = logging.getLogger(__name__)

_PROMPT = "def read_json(path):"
_COUNT_TIMEOUT_S = 1.0


async def what_to_wait_for(config: ServeConfig, grace_s: float) -> str:
    try:
        async with asyncio.timeout(_COUNT_TIMEOUT_S):
            fleet = await fetch_fleet(config.router.control, config.cluster_token, config.cluster_tls)
    except (TandemError, TimeoutError):
        return ""
    requests = fleet.running_requests + fleet.queued_requests
    if not requests:
        return ""
    return f": waiting up to {grace_s:g} s for {requests} running request{'s' if requests > 1 else ''}"


def print_welcome(config: ServeConfig, state: RunState, took_s: float) -> None:
    body = shlex.quote(json.dumps({"model": state.model, "prompt": _PROMPT, "max_tokens": 64, "temperature": 0}))
    has_keys = config.router.api_keys is not None
    curl = (" --cacert CA" if state.has_tls else "") + (' -H "Authorization: Bearer KEY"' if has_keys else "")
    access = (", api_key='KEY'" if has_keys else "") + (", tls=ClientTls('CA')" if state.has_tls else "")
    python = (
        f"from tandem import Client{', ClientTls' if state.has_tls else ''}; "
        f"print(Client('{state.grpc}'{access}).generate("
        f"prompt='{_PROMPT}', max_tokens=64, temperature=0).text)"
    )
    page = f"\n  page  {state.url}/ui  (what the cluster does)" if config.router.ui else ""
    announce(
        log,
        f"""\
ready in {took_s:.1f} s: {", ".join(f"{section.instances} {role}" for role, section in config.kinds)}
  HTTP  {state.url}/v1  (OpenAI API; /health, /metrics){page}
  gRPC  {state.grpc}
  logs  {state.log_folder}

try:
  curl {state.url}/v1/completions{curl} -H 'Content-Type: application/json' -d {body}
  python -c "{python}"
  tandem chat

Ctrl-C ends it.""",
    )


def print_background_welcome(run: RunState) -> None:
    name = f" --name {run.cluster}" if run.cluster != "default" else ""
    announce(
        log,
        f"""\
ready:
  HTTP  {run.url}/v1  (OpenAI API; /health, /metrics)
  gRPC  {run.grpc}
  logs  {run.log_folder}

It goes on in the background: tandem status, tandem logs router-0, tandem chat. `tandem down{name}` ends it.""",
    )
