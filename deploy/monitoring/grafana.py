"""Panels and dashboards of Grafana, and their JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_WIDTH, _HEIGHT, _PER_ROW = 8, 8, 3  # of Grafana's 24 columns
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` is a template with labels, such as {{role}}."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over time. `unit` is one of Grafana's."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    is_stacked: bool = False
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`rows` has the panels of each titled row. `variables` are labels by which instances are filtered."""

    name: str
    title: str
    rows: dict[str, Sequence[Panel]]
    variables: Sequence[str] = field(default=())


def render(dashboard: Dashboard) -> str:
    """As Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for position, panel in enumerate(row):
            x, line = position % _PER_ROW * _WIDTH, position // _PER_ROW
            panels.append(_panel(panel, len(panels) + 1, x, y + line * _HEIGHT))
        y += -(-len(row) // _PER_ROW) * _HEIGHT
    content = {
        "uid": f"tandem-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["tandem"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(dashboard.variables)},
        "panels": panels,
    }
    return json.dumps(content, indent=2) + "\n"


def _variables(labels: Sequence[str]) -> list[dict[str, Any]]:
    datasource = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    queries = {"job": "label_values(tandem_running_requests, job)"}
    queries |= {label: f'label_values(tandem_instance_up{{job=~"$job"}}, {label})' for label in labels}
    return [
        datasource,
        *(
            {
                "name": name,
                "type": "query",
                "datasource": _DATASOURCE,
                "query": {"query": query, "refId": name},
                "definition": query,
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
            for name, query in queries.items()
        ),
    ]


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0 if panel.maximum is not None or panel.is_stacked else None,
        "max": panel.maximum,
        "custom": {
            "drawStyle": "line",
            "fillOpacity": 60 if panel.is_stacked else 5,
            "showPoints": "never",
            "stacking": stacking,
        },
    }
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {name: value for name, value in defaults.items() if value is not None},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "range": True,
            }
            for position, query in enumerate(panel.queries)
        ],
    }
