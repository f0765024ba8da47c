"""Settings of the routing machine and of its instance selectors."""

import math
from dataclasses import dataclass
from typing import Literal

from tandem.core.router_section import RouterSection
from tandem.scheduling.queue_order import QueueOrder

RoutingPolicy = Literal["balanced", "goodput"]


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """`max_queue` counts all requests in the router. `resume` allows a new attempt after tokens were handed on.

    An instance is without credit while this router's prompts of `outstanding_steps` of its steps wait to be computed
    there: what waits in an instance cannot be ordered, held or refused any more. Also while `max_outstanding_tokens` of
    them wait, to be computed or for memory to decode them (None: no request waits for credit at all); and while the
    requests that decode there are expected to fill more than its memory, by the lengths of the last answers. Requests
    for which no instance has credit wait in the router, for `max_wait_s` at most;
    one that would wait longer, or beyond its deadline, is refused when it comes. `queue_order` is the order in which
    they wait: see `scheduling.queue_order`. A request that cannot meet its TTFT target is made best effort, or
    refused, as its class says: when it comes, or when the time has passed while it waited.

    A request that has lost its instances waits `replacement_wait_s` for usable ones, and `retry_pause_s` before it goes
    back to an instance that failed it. `slack_tokens`: see `routing.choose_prefill`. `max_tracked_blocks`
    bounds what is remembered of an instance's prefix cache. `local_prefill` lets decode instances compute prompts while
    no prefill and no colocated instance is usable; with the policy "goodput" whenever that is better. Policies:
    `instance_selector` and `goodput_selector`.
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
        """Of a router with these settings, live or simulated."""
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
