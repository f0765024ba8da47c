"""A real Prometheus scrapes a real cluster: every panel has data, and an alert is raised when no instance decodes."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.conftest import BUILT_IN
from tests.cluster.harness import Cluster, free_port, running_cluster
from tests.deploy.monitoring.promql import RULES, panels, without_variables
from tests.deploy.monitoring.tools import require

CLASSES = [{"name": "chat", "ttft_s": 30.0, "tpot_s": 30.0, "attainment": 0.5}]
BODY = {"model": "tiny-python", "prompt": "import os\n" * 20, "max_tokens": 40, "ignore_eos": True}
# Without a plan, and without predictions, these have no series.
WITHOUT_DATA = {"service: Distance from the plan", "service: Error of predictions"}
# No time series before the first such event.
WITHOUT_EVENTS = {"service: Best effort and refused"}


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", (expression, answer)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def alerts(self) -> set[str]:
        """Pending and firing ones."""
        answer = httpx.get(f"{self._url}/api/v1/alerts", timeout=10).json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"]}


@contextlib.contextmanager
def scraping(cluster: Cluster, folder: Path) -> Iterator[Prometheus]:
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "tandem", "static_configs": [{"targets": [cluster.url.removeprefix("http://")]}]}
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        require("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: httpx.get(f"{url}/-/ready", timeout=1).status_code == 200)
            yield Prometheus(url)
        finally:
            process.terminate()


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_panel_has_data_and_a_lost_instance_raises_alerts(tmp_path: Path) -> None:
    require("prometheus")
    router = {"slo": CLASSES}
    with (
        running_cluster(BUILT_IN, tmp_path, decode_transports=("shared_memory",), router=router) as cluster,
        scraping(cluster, tmp_path) as prometheus,
    ):
        is_over = threading.Event()

        def load() -> None:
            while not is_over.is_set():
                headers = {"x-tandem-slo": "chat"}
                httpx.post(f"{cluster.url}/v1/completions", json=BODY, headers=headers, timeout=60)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            missing: set[str] = set()

            def all_have_data() -> bool:
                missing.clear()
                for title, queries in panels():
                    if any(not prometheus.query(without_variables(query)) for query in queries):
                        missing.add(title)
                return missing <= WITHOUT_DATA | WITHOUT_EVENTS

            until(all_have_data)
            assert missing >= WITHOUT_DATA
        finally:
            is_over.set()
            thread.join()
        assert prometheus.query("slo_class:tandem_goodput:rate5m")
        assert prometheus.alerts() <= {"TandemAttainmentLow"}  # of a machine that is far too slow
        cluster.kill("decode-0")
        until(lambda: "TandemCannotServe" in prometheus.alerts())
