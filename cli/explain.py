"""`tandem explain`: what became of a request, where its time went, and why it ran where it ran."""

import asyncio
from typing import Annotated

import typer

from tandem.cli.common import Pid
from tandem.cli.output import print_line
from tandem.cli.router_file import RouterFile, find_router
from tandem.deploy.run_state import RunState
from tandem.wire.channels import open_channel
from tandem.wire.fleet import explain_request

EPILOG = """\
examples:
  tandem explain                               the last requests, newest first
  tandem explain 63f0c2a91d5e4b7c8a1f2e3d      one of them; its id is in x-request-id and in the answer's id

Each decision lists the instances that were compared, best first, with the terms of their scores. The router remembers
the last thousand requests, without prompts and answers."""
_TIMEOUT_S = 5.0


def run(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="its id; without one: the last requests")] = "",
    pid: Pid = None,
    router: RouterFile = None,
) -> int:
    """Explain a finished request of the running cluster: its outcome, the parts of its time, its attempts, and for each
    the instances that the router compared."""
    print_line(asyncio.run(_ask(find_router(pid, router), _without_prefix(request))))
    return 0


async def _ask(run: RunState, request_id: str) -> str:
    async with open_channel(run.control, run.cluster_token, run.tls) as channel:
        return await explain_request(channel, request_id, _TIMEOUT_S) or "no request has ended yet"


def _without_prefix(request_id: str) -> str:
    """Answers of the OpenAI API call the request `cmpl-` or `chatcmpl-` and its id."""
    for prefix in ("chatcmpl-", "cmpl-"):
        request_id = request_id.removeprefix(prefix)
    return request_id
