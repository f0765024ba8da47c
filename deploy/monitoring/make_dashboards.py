"""The Grafana dashboards, from which `python -m tandem.deploy.monitoring.make_dashboards` writes dashboards/*.json.

Every router reports every instance. So queries take the sum over routers for metrics of requests, and the largest value
of all routers for metrics of instances.
"""

from pathlib import Path

from tandem.deploy.monitoring.grafana import Dashboard, Panel, Query, render

FOLDER = Path(__file__).parent / "dashboards"

_TTFT_PARTS = "admission_s|dispatch_s|prefill_queue_s|prefill_s"
_LATER_PARTS = "transfer_s|decode_queue_s|second_token_s|decode_s"
_JOB = 'job=~"$job"'
_INSTANCE = f'{_JOB},tandem_instance=~"$tandem_instance"'


def _rate(metric: str, matchers: str = _JOB) -> str:
    return f"rate({metric}{{{matchers}}}[$__rate_interval])"


def _sum(by: str, metric: str, matchers: str = _JOB) -> str:
    return f"sum by ({by}) ({_rate(metric, matchers)})"


def _of_instance(metric: str, *labels: str, matchers: str = _INSTANCE) -> str:
    return f"max by ({', '.join(('tandem_instance', *labels))}) ({metric}{{{matchers}}})"


def _rate_of_instance(metric: str, *labels: str) -> str:
    return f"max by ({', '.join(('tandem_instance', *labels))}) ({_rate(metric, _INSTANCE)})"


def _quantiles(metric: str) -> list[Query]:
    return [
        Query(f"histogram_quantile({share}, {_sum('le', f'{metric}_bucket')})", f"p{share * 100:.0f}")
        for share in (0.5, 0.9, 0.99)
    ]


def _mean_parts(parts: str) -> list[Query]:
    matchers = f'{_JOB},part=~"{parts}"'
    total, count = (_sum("part", f"tandem_request_part_seconds_{what}", matchers) for what in ("sum", "count"))
    return [Query(f"{total} / {count}", "{{part}}")]


SERVICE = Dashboard(
    "service",
    "Tandem: service",
    {
        "Goodput": [
            Panel(
                "Goodput by SLO class",
                "Requests per second that met all their targets.",
                "reqps",
                [Query(_sum("slo_class", "tandem_slo_met_total"), "{{slo_class}}")],
            ),
            Panel(
                "Attainment by SLO class",
                "Share of the requests with targets that met them, and the share that the class promises.",
                "percentunit",
                [
                    Query(
                        f"{_sum('slo_class', 'tandem_slo_met_total')} / "
                        f"{_sum('slo_class', 'tandem_slo_requests_total')}",
                        "{{slo_class}}",
                    ),
                    Query(
                        f"max by (slo_class) (tandem_slo_attainment_target{{{_JOB}}})",
                        "{{slo_class}}: promised",
                    ),
                ],
                maximum=1.0,
            ),
            Panel(
                "Missed targets",
                "By class and target. A failed request has missed all that it had.",
                "reqps",
                [Query(_sum("slo_class, target", "tandem_slo_violations_total"), "{{slo_class}} {{target}}")],
            ),
            Panel(
                "Requests by outcome",
                "stop and length are complete ones.",
                "reqps",
                [Query(_sum("outcome", "tandem_requests_total"), "{{outcome}}")],
                is_stacked=True,
            ),
            Panel(
                "Best effort and refused",
                "Requests that would have missed their target: they became best effort, or were refused.",
                "reqps",
                [
                    Query(_sum("slo_class", "tandem_slo_demoted_total"), "{{slo_class}}: best effort"),
                    Query(_sum("slo_class", "tandem_slo_refused_total"), "{{slo_class}}: refused"),
                ],
            ),
            Panel(
                "Attempts that failed",
                "Attempts after the first: an instance was lost, or a transfer failed.",
                "ops",
                [Query(f"sum ({_rate('tandem_retries_total')})", "retries")],
            ),
        ],
        "Latency": [
            Panel(
                "Time to first token by part",
                "Mean seconds of complete requests in each part until the first token.",
                "s",
                _mean_parts(_TTFT_PARTS),
                is_stacked=True,
            ),
            Panel(
                "Time after the first token by part",
                "Mean seconds of complete requests in each part after the first token.",
                "s",
                _mean_parts(_LATER_PARTS),
                is_stacked=True,
            ),
            Panel("Time to first token", "All requests with a first token.", "s", _quantiles("tandem_ttft_seconds")),
            Panel("Time per output token", "After the first, complete ones.", "s", _quantiles("tandem_tpot_seconds")),
            Panel(
                "Gap between tokens, p99",
                "Time between two deliveries of tokens of one request.",
                "s",
                [
                    Query(
                        f"histogram_quantile(0.99, {_sum('le, slo_class', 'tandem_token_gap_seconds_bucket')})",
                        "{{slo_class}}",
                    )
                ],
            ),
            Panel(
                "Error of predictions",
                "Actual against predicted time, minus 1; only with router.policy goodput.",
                "percentunit",
                [
                    Query(
                        f'max by (time, quantile) (tandem_prediction_error_ratio{{{_JOB},quantile=~"0.1|0.5|0.9"}})',
                        "{{time}} p{{quantile}}",
                    )
                ],
            ),
        ],
        "Load": [
            Panel(
                "Requests",
                "Running ones have their first token, queued ones do not; held ones are those that wait in the router.",
                "short",
                [Query(f"sum (tandem_{state}_requests{{{_JOB}}})", state) for state in ("running", "queued", "held")],
            ),
            Panel(
                "Expected wait",
                "How long a new request would wait in the router.",
                "s",
                [Query(f"max (tandem_expected_wait_seconds{{{_JOB}}})", "wait")],
            ),
            Panel(
                "Tokens",
                "Of finished requests.",
                "short",
                [
                    Query(f"sum ({_rate('tandem_prompt_tokens_total')})", "prompt"),
                    Query(f"sum ({_rate('tandem_cached_prompt_tokens_total')})", "prompt, from a prefix cache"),
                    Query(f"sum ({_rate('tandem_output_tokens_total')})", "output"),
                ],
            ),
            Panel(
                "Distance from the plan",
                "Of the workload, from that of the plan; from 1 on the plan may be wrong. Only while a plan is served.",
                "short",
                [
                    Query(f"max (tandem_workload_drift{{{_JOB}}})", "drift"),
                    Query(f"max (tandem_replan_proposed_gain{{{_JOB}}})", "gain of the proposed plan"),
                ],
            ),
        ],
    },
)

INSTANCES = Dashboard(
    "instances",
    "Tandem: instances, KV memory and links",
    {
        "Instances": [
            Panel(
                "Usable instances by role",
                "Those that take work.",
                "short",
                [Query(f"sum by (role) ({_of_instance('tandem_instance_up', 'role')})", "{{role}}")],
            ),
            Panel(
                "Share of time in steps",
                "1: the instance always computes.",
                "percentunit",
                [Query(_rate_of_instance("tandem_instance_step_seconds_total"), "{{tandem_instance}}")],
                maximum=1.0,
            ),
            Panel(
                "Time of a step",
                "Mean.",
                "s",
                [
                    Query(
                        f"{_rate_of_instance('tandem_instance_step_seconds_total')} / "
                        f"{_rate_of_instance('tandem_instance_steps_total')}",
                        "{{tandem_instance}}",
                    )
                ],
            ),
            Panel(
                "Running requests",
                "As the instances report.",
                "short",
                [Query(_of_instance("tandem_instance_running_requests"), "{{tandem_instance}}")],
            ),
            Panel(
                "Waiting tokens",
                "Prompt tokens to be computed, and tokens whose KV has no blocks yet.",
                "short",
                [Query(_of_instance("tandem_instance_waiting_tokens"), "{{tandem_instance}}")],
            ),
            Panel(
                "Computed tokens",
                "Per second.",
                "short",
                [Query(_rate_of_instance("tandem_instance_computed_tokens_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Age of the step in progress",
                "An instance is stalled when a step takes ten times the longest recent one.",
                "s",
                [Query(_of_instance("tandem_instance_step_age_seconds"), "{{tandem_instance}}")],
            ),
            Panel(
                "Python's memory blocks",
                "They grow without end where something leaks.",
                "short",
                [
                    Query(_of_instance("tandem_instance_python_blocks"), "{{tandem_instance}}"),
                    Query(f"max by (instance) (tandem_router_python_blocks{{{_JOB}}})", "router {{instance}}"),
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
                        + _of_instance("tandem_kv_blocks", "owner", matchers=f'{_INSTANCE},owner!="total"')
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
                        + _of_instance("tandem_kv_blocks", "owner", matchers=f'{_INSTANCE},owner=~"running|leased"')
                        + ") / "
                        + _of_instance("tandem_kv_blocks", matchers=f'{_INSTANCE},owner="total"'),
                        "{{tandem_instance}}",
                    )
                ],
                maximum=1.0,
            ),
            Panel(
                "Prompt tokens from the prefix cache",
                "Per second.",
                "short",
                [Query(_rate_of_instance("tandem_prefix_cache_hit_tokens_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Preemptions",
                "Sequences that gave up their KV memory, to be computed again.",
                "ops",
                [Query(_rate_of_instance("tandem_preemptions_total"), "{{tandem_instance}}")],
            ),
            Panel(
                "Blocks without an owner",
                "More than 0 is a fault in Tandem.",
                "short",
                [
                    Query(
                        _of_instance("tandem_kv_blocks", matchers=f'{_INSTANCE},owner="leaked"'),
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
                        _rate_of_instance("tandem_transfer_bytes_total", "transport"),
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
                        f"{_rate_of_instance('tandem_transfer_bytes_total', 'transport')} / "
                        f"{_rate_of_instance('tandem_transfer_seconds_total', 'transport')}",
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
                        f"{_rate_of_instance('tandem_transfer_seconds_total', 'transport')} / "
                        f"{_rate_of_instance('tandem_transfers_total', 'transport')}",
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
                        _rate_of_instance("tandem_transfer_failures_total", "transport"),
                        "{{tandem_instance}} {{transport}}",
                    )
                ],
            ),
            Panel(
                "Links",
                "Instances from which an instance has received KV lately.",
                "short",
                [Query(_of_instance("tandem_links"), "{{tandem_instance}}")],
            ),
        ],
    },
    variables=("tandem_instance",),
)

DASHBOARDS = (SERVICE, INSTANCES)


def main() -> None:
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(render(dashboard))


if __name__ == "__main__":
    main()
