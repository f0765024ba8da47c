"""A check of the links between the instances of a running cluster."""

from collections.abc import Iterable, Iterator

from tandem.core.session import InstanceStatus
from tandem.deploy.finding import Finding, Grade


def check_links(instances: Iterable[InstanceStatus], expected_transport: str | None) -> Iterator[Finding]:
    """Whether links use the expected transport without failures, and every KV block has an owner.

    With `expected_transport` None any transport is accepted.
    """
    for status in instances:
        if status.blocks.leaked:
            text = f"{status.blocks.leaked} KV blocks of {status.instance_id} have no owner"
            yield Finding(
                "blocks",
                Grade.FAILED,
                text,
                "a fault in tandem: report it with the logs; restart the cluster",
            )
        for link in status.links:
            name = f"{link.peer_id} -> {status.instance_id}"
            if expected_transport is not None and link.transport != expected_transport:
                advice = f"{expected_transport} was expected: the log of {status.instance_id} says why it failed"
                yield Finding("link", Grade.FAILED, f"{name} uses the transport {link.transport}", advice)
            elif link.failures:
                advice = f"the log of {status.instance_id} says why"
                yield Finding("link", Grade.WARNING, f"{name}: {link.failures} transfers failed", advice)
            else:
                yield Finding("link", Grade.OK, f"{name}: {link.transport}, {link.transfers} transfers")
