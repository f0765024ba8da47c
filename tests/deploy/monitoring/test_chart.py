"""The Helm chart carries the rules and dashboards of deploy/monitoring."""

import yaml

from tandem.deploy.monitoring.grafana import render
from tandem.deploy.monitoring.make_dashboards import DASHBOARDS
from tests.deploy.kubernetes.manifests import KUBERNETES_VERSIONS, mistakes_of
from tests.deploy.kubernetes.manifests import render as render_chart
from tests.deploy.monitoring.promql import RULES


def test_the_chart_has_the_rules_and_dashboards() -> None:
    documents = render_chart(None, "monitoring.rules.enabled=true", "monitoring.dashboards.enabled=true")
    assert [mistake for each in documents for mistake in mistakes_of(each, KUBERNETES_VERSIONS[-1])] == []
    (rule,) = [document for document in documents if document["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    data = {}
    for document in documents:
        if document["kind"] == "ConfigMap":
            data |= document["data"]
    for dashboard in DASHBOARDS:
        assert data[f"{dashboard.name}.json"] == render(dashboard)
