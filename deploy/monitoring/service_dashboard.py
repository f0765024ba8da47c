"""The dashboard of what clients see: goodput, latency and load."""

from tandem.deploy.monitoring.grafana import Dashboard, Panel, Query
from tandem.deploy.monitoring.queries import JOB, mean_parts, quantiles, rate, rate_by

_TTFT_PARTS = "admission_s|dispatch_s|prefill_queue_s|prefill_s"
_LATER_PARTS = "transfer_s|decode_queue_s|second_token_s|decode_s"

SERVICE = Dashboard(
    "service",
    "Tandem: service",
    {
        "Goodput": [
            Panel(
                "Goodput by SLO class",
                "Requests per second that met all their targets.",
                "reqps",
                [Query(rate_by("slo_class", "tandem_slo_met_total"), "{{slo_class}}")],
            ),
            Panel(
                "Attainment by SLO class",
                "Share of the requests with targets that met them, and the share that the class promises.",
                "percentunit",
                [
                    Query(
                        f"{rate_by('slo_class', 'tandem_slo_met_total')} / "
                        f"{rate_by('slo_class', 'tandem_slo_requests_total')}",
                        "{{slo_class}}",
                    ),
                    Query(
                        f"max by (slo_class) (tandem_slo_attainment_target{{{JOB}}})",
                        "{{slo_class}}: promised",
                    ),
                ],
                maximum=1.0,
            ),
            Panel(
                "Missed targets",
                "By class and target. A failed request has missed all that it had.",
                "reqps",
                [Query(rate_by("slo_class, target", "tandem_slo_violations_total"), "{{slo_class}} {{target}}")],
            ),
            Panel(
                "Requests by outcome",
                "stop and length are complete ones.",
                "reqps",
                [Query(rate_by("outcome", "tandem_requests_total"), "{{outcome}}")],
                is_stacked=True,
            ),
            Panel(
                "Best effort and refused",
                "Requests that would have missed their target: they became best effort, or were refused.",
                "reqps",
                [
                    Query(rate_by("slo_class", "tandem_slo_demoted_total"), "{{slo_class}}: best effort"),
                    Query(rate_by("slo_class", "tandem_slo_refused_total"), "{{slo_class}}: refused"),
                ],
            ),
            Panel(
                "Attempts that failed",
                "Attempts after the first: an instance was lost, or a transfer failed.",
                "ops",
                [Query(f"sum ({rate('tandem_retries_total')})", "retries")],
            ),
        ],
        "Latency": [
            Panel(
                "Time to first token by part",
                "Mean seconds of complete requests in each part until the first token.",
                "s",
                mean_parts(_TTFT_PARTS),
                is_stacked=True,
            ),
            Panel(
                "Time after the first token by part",
                "Mean seconds of complete requests in each part after the first token.",
                "s",
                mean_parts(_LATER_PARTS),
                is_stacked=True,
            ),
            Panel("Time to first token", "All requests with a first token.", "s", quantiles("tandem_ttft_seconds")),
            Panel("Time per output token", "After the first, complete ones.", "s", quantiles("tandem_tpot_seconds")),
            Panel(
                "Gap between tokens, p99",
                "Time between two deliveries of tokens of one request.",
                "s",
                [
                    Query(
                        f"histogram_quantile(0.99, {rate_by('le, slo_class', 'tandem_token_gap_seconds_bucket')})",
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
                        f'max by (time, quantile) (tandem_prediction_error_ratio{{{JOB},quantile=~"0.1|0.5|0.9"}})',
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
                [Query(f"sum (tandem_{state}_requests{{{JOB}}})", state) for state in ("running", "queued", "held")],
            ),
            Panel(
                "Expected wait",
                "How long a new request would wait in the router.",
                "s",
                [Query(f"max (tandem_expected_wait_seconds{{{JOB}}})", "wait")],
            ),
            Panel(
                "Tokens",
                "Of finished requests.",
                "short",
                [
                    Query(f"sum ({rate('tandem_prompt_tokens_total')})", "prompt"),
                    Query(f"sum ({rate('tandem_cached_prompt_tokens_total')})", "prompt, from a prefix cache"),
                    Query(f"sum ({rate('tandem_output_tokens_total')})", "output"),
                ],
            ),
            Panel(
                "Distance from the plan",
                "Of the workload, from that of the plan; from 1 on the plan may be wrong. Only while a plan is served.",
                "short",
                [
                    Query(f"max (tandem_workload_drift{{{JOB}}})", "drift"),
                    Query(f"max (tandem_replan_proposed_gain{{{JOB}}})", "gain of the proposed plan"),
                ],
            ),
        ],
    },
)
