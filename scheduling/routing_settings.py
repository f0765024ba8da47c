"""Settings of the routing machine and of its instance selectors."""

import math
from dataclasses import dataclass
from typing import Literal

from tandem.core.router_section import RouterSection
from tandem.scheduling.queue_order import QueueOrder

RoutingPolicy = Literal["balanced", "goodput"]


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """Queue: `max_queue` bounds all requests in the router; None: no bound. Requests for which no instance has credit
    wait in the `queue_order` (see `scheduling.queue_order`) for `max_wait_s` at most. A request that would wait longer,
    or beyond its deadline, is refused at once. A request that cannot meet its TTFT target is made best effort or
    refused, as its class says, at admission or once the time has passed.

    Credit: requests that wait in an instance can no longer be ordered, held back or refused. So an instance has no
    credit while this router's prompts for `outstanding_steps` of its steps wait there to be computed; while
    `max_outstanding_tokens` prompt tokens wait there, to be computed or for memory to decode them (None: instances
    always have credit); or while the requests that decode there are expected to need more than its memory, by the
    lengths of recent answers.

    Failures: a request has `max_attempts`; after its first tokens only with `resume`. A request that has lost its
    instances waits `replacement_wait_s` for usable ones, and `retry_pause_s` before it uses an instance again that has
    failed it.

    Selection: `policy` "balanced" is `instance_selector`, "goodput" is `goodput_selector`. `slack_tokens`: see
    `routing.choose_prefill`. `max_tracked_blocks` bounds the known blocks of one instance's prefix cache. With
    `local_prefill` decode instances compute prompts while no prefill and no colocated instance is usable, and with
    "goodput" whenever that is better.
    """

    max_queue: int | None = None
    max_attempts: int = 3
    resume: bool = True
    replacement_wait_s: float = 30.0
    retry_pause_s: float = 0.05
    outstanding_steps: float = 2.0
    max_outstanding_tokens: int | None = None
    max_wait_s: float = math.inf
    queue_order: QueueOrder = "goodput"
    slack_tokens: int = 4096
    max_tracked_blocks: int = 65536
    local_prefill: bool = True
    policy: RoutingPolicy = "balanced"

    @classmethod
    def of(cls, section: RouterSection) -> "RoutingSettings":
        """The settings of a router's configuration."""
        return cls(
            max_queue=section.max_queue,
            resume=section.resume,
            replacement_wait_s=section.replacement_wait_s,
            outstanding_steps=section.outstanding_steps,
            max_outstanding_tokens=section.max_outstanding_tokens,
            max_wait_s=section.max_wait_s,
            policy=section.policy,
            queue_order=section.queue_order,
        )
