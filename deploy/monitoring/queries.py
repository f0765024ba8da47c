"""Expressions of Prometheus that panels share.

Every router reports every instance. So queries take the sum over routers for metrics of requests, and the largest value
of all routers for metrics of instances.
"""

from tandem.deploy.monitoring.grafana import Query

JOB = 'job=~"$job"'
INSTANCE = f'{JOB},tandem_instance=~"$tandem_instance"'


def rate(metric: str, matchers: str = JOB) -> str:
    return f"rate({metric}{{{matchers}}}[$__rate_interval])"


def rate_by(by: str, metric: str, matchers: str = JOB) -> str:
    return f"sum by ({by}) ({rate(metric, matchers)})"


def of_instance(metric: str, *labels: str, matchers: str = INSTANCE) -> str:
    return f"max by ({', '.join(('tandem_instance', *labels))}) ({metric}{{{matchers}}})"


def rate_of_instance(metric: str, *labels: str) -> str:
    return f"max by ({', '.join(('tandem_instance', *labels))}) ({rate(metric, INSTANCE)})"


def quantiles(metric: str) -> list[Query]:
    return [
        Query(f"histogram_quantile({share}, {rate_by('le', f'{metric}_bucket')})", f"p{share * 100:.0f}")
        for share in (0.5, 0.9, 0.99)
    ]


def mean_parts(parts: str) -> list[Query]:
    matchers = f'{JOB},part=~"{parts}"'
    total, count = (rate_by("part", f"tandem_request_part_seconds_{what}", matchers) for what in ("sum", "count"))
    return [Query(f"{total} / {count}", "{{part}}")]
