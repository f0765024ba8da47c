"""Statuses of instances that do not exist."""

from dataclasses import replace

from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, Role

MODEL = "tiny"
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}  # by the first letter of the instance's name


def make_status(instance_id: str, role: Role, **changes: object) -> InstanceStatus:
    status = InstanceStatus(
        instance_id=instance_id,
        role=role,
        state=InstanceState.READY,
        address=f"127.0.0.1:{1000 + sum(instance_id.encode())}",
        model=MODEL,
        fingerprint="f",
        max_model_len=256,
        block_size=16,
        blocks=BlockCounts(total=64, free=64, running=0, cached=0, leased=0),
        waiting_requests=0,
        running_requests=0,
        uncomputed_tokens=0,
        unreserved_tokens=0,
    )
    return replace(status, **changes)  # type: ignore[arg-type]
