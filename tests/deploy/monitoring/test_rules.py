"""Alert rules and dashboards: valid, about metrics that exist, and silent while all is well."""

import json
import subprocess
from itertools import combinations
from pathlib import Path

import yaml

from tandem.deploy.monitoring.grafana import render
from tandem.deploy.monitoring.make_dashboards import DASHBOARDS, FOLDER
from tests.deploy.monitoring.promql import (
    KNOWN_VALUES,
    RULES,
    grouping_labels,
    known_labels,
    panels,
    rules,
    uses,
    without_variables,
)
from tests.deploy.monitoring.tools import require
from tests.router.fakes import make_cluster

RULES_TEST = Path(__file__).parent / "rules_test.yaml"
GUIDE = Path(__file__).parents[3] / "docs" / "observability.md"


def check(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should() -> None:
    check(require("promtool"), "test", "rules", RULES_TEST.name, cwd=RULES_TEST.parent)


def test_rules_and_queries_of_dashboards_are_promql(tmp_path: Path) -> None:
    queries = [
        {"record": f"panel:query:{i}", "expr": e} for i, e in enumerate(map(without_variables, _panel_queries()))
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": queries}]}))
    check(require("promtool"), "check", "rules", str(RULES), str(path), cwd=tmp_path)


def test_every_metric_and_label_exists() -> None:
    known = known_labels(make_cluster().dispatcher)
    assert len(known) > 50
    series = [
        each["series"] for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for each in test["input_series"]
    ]
    expressions = [*_panel_queries(), *(rule["expr"] for rule in rules()), *series]
    recorded = {rule["record"].partition(":")[0] for rule in rules() if "record" in rule}
    for expression in expressions:
        used = uses(expression)
        labels = set(recorded)
        for use in used:
            assert use.metric in known, f"there is no metric {use.metric}: {expression}"
            labels |= known[use.metric]
            for label, operator, value in use.matchers:
                assert label in known[use.metric], f"{use.metric} has no label {label}: {expression}"
                if label in KNOWN_VALUES:
                    values = set(value.split("|") if operator in ("=~", "!~") else [value])
                    assert values <= KNOWN_VALUES[label], f"{label} is never {values}: {expression}"
        assert grouping_labels(expression) <= labels, expression


def test_every_alert_is_tested_and_explained() -> None:
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(alerts) == len(set(alerts))
    tests = yaml.safe_load(RULES_TEST.read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test.get("alert_rule_test", ()) if each["exp_alerts"]}
    assert fired == set(alerts)
    guide = GUIDE.read_text()
    assert [alert for alert in alerts if f"`{alert}`" not in guide] == []


def test_dashboards_are_those_of_their_description() -> None:
    assert {path.stem: path.read_text() for path in FOLDER.glob("*.json")} == {
        dashboard.name: render(dashboard) for dashboard in DASHBOARDS
    }, "run python -m tandem.deploy.monitoring.make_dashboards"
    for dashboard in DASHBOARDS:
        content = json.loads(render(dashboard))
        assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
        for one, other in combinations([panel["gridPos"] for panel in content["panels"]], 2):
            assert (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            ), "panels overlap"


def _panel_queries() -> list[str]:
    return [query for _, queries in panels() for query in queries]
