"""`tandem apply`: give the running cluster a changed plan or serve file."""

from tandem.cli.common import Grace, Pid, ServeFile, Settings, Timeout, ask_controller, find_run, print_change
from tandem.cli.prepare import prepare
from tandem.core.config import with_secrets
from tandem.deploy.topology import Machine

EPILOG = """\
examples:
  tandem apply plan.yaml
  tandem apply serve.yaml --set decode.instances=3"""

_MANY = 1 << 16
ELSEWHERE = Machine(cores=_MANY, gpus=_MANY, nodes=_MANY)
"""The machines of a cluster of several hosts. This command knows nothing of them; the cluster starts what has room."""


def run(
    file: ServeFile = None, *, settings: Settings, grace: Grace = None, timeout: Timeout = 900.0, pid: Pid = None
) -> int:
    """Make the running cluster one of these settings: start what is missing, stop what is too much, and replace what
    has other settings, one process after the other. Workers that leave finish their requests. If a process does not
    start with the new settings, no other is replaced. Addresses that FILE does not name stay as they are."""
    run = find_run(pid)
    prepared = prepare(file, settings, None if run.is_here else ELSEWHERE, is_running=True)
    settings_json = with_secrets(prepared.config).model_dump_json(exclude_unset=True)
    plan_json = "" if prepared.plan is None else prepared.plan.model_dump_json()
    print_change(ask_controller(run, lambda client: client.apply(settings_json, grace, plan_json), timeout))
    return 0
