"""The dashboard of instances, their KV memory and their links."""

from tandem.deploy.monitoring.grafana import Dashboard, Panel, Query
from tandem.deploy.monitoring.queries import INSTANCE, JOB, of_instance, rate_of_instance

INSTANCES = Dashboard(
    "instances",
    "Tandem: instances, KV memory and links",
    {
        "Instances": [
            Panel(
                "Usable instances by role",
                "Those that take work.",
                "short",
                [Query(f"sum by (role) ({of_instance('tandem_instance_up', 'role')})", "{{role}}")],
            ),
            Panel(
                "Share of time in steps",
                "1: the instance always computes.",
                "percentunit",
                [Query(rate_of_instance("tandem_instance_step_seconds_total"), "{{tandem_instance}}")],
                maximum=1.0,
            ),
            Panel(
                "Time of a step",
                "Mean.",
                "s",
                [
                    Query(
                        f"{rate_of_instance('tandem_instance_step_seconds_total')} / "
                        f"{rate_of_instance('tandem_instance_steps_total')}",
                        "{{tandem_instance}}",
                    )
                ],
            ),
            Panel(
                "Running requests",
                "As the instances report.",
                "short",
                [Query(of_instance("tandem_instance_running_requests"), "{{tandem_instance}}")],
            ),
            Panel(
                "Waiting tokens",
                "Prompt tokens to be computed, and tokens whose KV has no blocks yet.",
                "short",
                [Query(of_instance("tandem_instance_waiting_tokens"), "{{tandem_instance}}")],
            ),
            Panel(
                "Computed tokens",
                "Per second.",
                "short",
                [Query(rate_of_instance("tandem_instance_computed_tokens_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Age of the step in progress",
                "An instance is stalled when a step takes ten times the longest recent one.",
                "s",
                [Query(of_instance("tandem_instance_step_age_seconds"), "{{tandem_instance}}")],
            ),
            Panel(
                "Python's memory blocks",
                "They grow without end where something leaks.",
                "short",
                [
                    Query(of_instance("tandem_instance_python_blocks"), "{{tandem_instance}}"),
                    Query(f"max by (instance) (tandem_router_python_blocks{{{JOB}}})", "router {{instance}}"),
                ],
            ),
        ],
        "KV memory": [
            Panel(
                "Blocks by owner",
                "Of all instances that are selected.",
                "short",
                [
                    Query(
                        "sum by (owner) ("
                        + of_instance("tandem_kv_blocks", "owner", matchers=f'{INSTANCE},owner!="total"')
                        + ")",
                        "{{owner}}",
                    )
                ],
                is_stacked=True,
            ),
            Panel(
                "Share of KV memory in use",
                "By sequences and leases. Cached prefixes can be evicted, and do not count.",
                "percentunit",
                [
                    Query(
                        "sum by (tandem_instance) ("
                        + of_instance("tandem_kv_blocks", "owner", matchers=f'{INSTANCE},owner=~"running|leased"')
                        + ") / "
                        + of_instance("tandem_kv_blocks", matchers=f'{INSTANCE},owner="total"'),
                        "{{tandem_instance}}",
                    )
                ],
                maximum=1.0,
            ),
            Panel(
                "Prompt tokens from the prefix cache",
                "Per second.",
                "short",
                [Query(rate_of_instance("tandem_prefix_cache_hit_tokens_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Preemptions",
                "Sequences that gave up their KV memory, to be computed again.",
                "ops",
                [Query(rate_of_instance("tandem_preemptions_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Blocks without an owner",
                "More than 0 is a fault in Tandem.",
                "short",
                [
                    Query(
                        of_instance("tandem_kv_blocks", matchers=f'{INSTANCE},owner="leaked"'),
                        "{{tandem_instance}}",
                    )
                ],
            ),
        ],
        "Links": [
            Panel(
                "Bytes of KV",
                "Per second, by the instance that receives.",
                "Bps",
                [
                    Query(
                        rate_of_instance("tandem_transfer_bytes_total", "transport"),
                        "{{tandem_instance}} {{transport}}",
                    )
                ],
            ),
            Panel(
                "Speed of transfers",
                "Bytes per second of transfer.",
                "Bps",
                [
                    Query(
                        f"{rate_of_instance('tandem_transfer_bytes_total', 'transport')} / "
                        f"{rate_of_instance('tandem_transfer_seconds_total', 'transport')}",
                        "{{tandem_instance}} {{transport}}",
                    )
                ],
            ),
            Panel(
                "Time of a transfer",
                "Mean.",
                "s",
                [
                    Query(
                        f"{rate_of_instance('tandem_transfer_seconds_total', 'transport')} / "
                        f"{rate_of_instance('tandem_transfers_total', 'transport')}",
                        "{{tandem_instance}} {{transport}}",
                    )
                ],
            ),
            Panel(
                "Transfers that failed",
                "Per second. The request continues in another attempt.",
                "ops",
                [
                    Query(
                        rate_of_instance("tandem_transfer_failures_total", "transport"),
                        "{{tandem_instance}} {{transport}}",
                    )
                ],
            ),
            Panel(
                "Links",
                "Instances from which an instance has received KV lately.",
                "short",
                [Query(of_instance("tandem_links"), "{{tandem_instance}}")],
            ),
        ],
    },
    variables=("tandem_instance",),
)
