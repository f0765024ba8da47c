"""Which metrics and labels PromQL expressions name, and which the router has."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.session import BLOCK_OWNERS
from tandem.deploy.monitoring.make_dashboards import FOLDER
from tandem.router import fleet_metrics, metrics, slo_metrics
from tandem.router.dispatch import Dispatcher
from tandem.router.metric_descriptions import Description
from tandem.router.metrics import Metrics

RULES = FOLDER.parent / "rules.yaml"
_FROM_PROMETHEUS = frozenset({"job", "instance"})
_METRIC = re.compile(r"(?<![:\w])(tandem_\w+)(?![\w:])(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SUFFIXES = {
    "histogram": {"_bucket": {"le"}, "_sum": set(), "_count": set()},
    "counter": {"_total": set()},
    "gauge": {"": set()},
}
_VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$tandem_instance": ".*"}


@dataclass(frozen=True, slots=True)
class Use:
    """A metric in an expression, with the matchers of its labels."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def uses(expression: str) -> list[Use]:
    return [
        Use(match[1], tuple(_MATCHER.findall(match[2] or "")))
        for match in _METRIC.finditer(_GROUPING.sub("", expression))
    ]


def grouping_labels(expression: str) -> set[str]:
    """Those that results are grouped or matched by."""
    return {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",") if label.strip()}


def panels() -> Iterator[tuple[str, list[str]]]:
    """Title and expressions of all panels of all dashboards."""
    for path in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield f"{path.stem}: {panel['title']}", [target["expr"] for target in panel["targets"]]


def without_variables(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def known_labels(dispatcher: Dispatcher) -> dict[str, frozenset[str]]:
    """Labels of all series of a router's page, by their names; those that Prometheus adds too."""
    page = Metrics()
    page.watch(dispatcher)
    page.watch_replanning(lambda: None)
    described = {
        what.name: what.labels
        for module in (metrics, fleet_metrics, slo_metrics)
        for what in vars(module).values()
        if isinstance(what, Description)
    }
    kinds = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in text_string_to_metric_families(page.render().decode())
    }
    known = {}
    for name, labels in described.items():
        kind = kinds.get(name, "gauge")  # those of a watched plan come with its first report
        for suffix, more in _SUFFIXES[kind].items():
            series = name if kind == "counter" else f"{name}{suffix}"
            known[series] = frozenset(labels) | more | _FROM_PROMETHEUS
    return known


KNOWN_VALUES = {
    "owner": {*BLOCK_OWNERS},
    "transport": {*fleet_metrics.TRANSPORTS},
    "outcome": {*metrics.OUTCOMES},
    "part": {name for _, name in metrics.PARTS},
    "role": {"prefill", "decode", "colocated"},
    "state": {state.value for state in metrics.DriftState},
    "quantile": {f"{share:g}" for share in fleet_metrics.ERROR_QUANTILES},
}
"""Values of labels that are fixed lists."""
