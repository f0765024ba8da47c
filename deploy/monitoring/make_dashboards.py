"""`python -m tandem.deploy.monitoring.make_dashboards` writes the Grafana dashboards, dashboards/*.json."""

from pathlib import Path

from tandem.deploy.monitoring.grafana import render
from tandem.deploy.monitoring.instances_dashboard import INSTANCES
from tandem.deploy.monitoring.service_dashboard import SERVICE

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (SERVICE, INSTANCES)


def main() -> None:
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(render(dashboard))


if __name__ == "__main__":
    main()
