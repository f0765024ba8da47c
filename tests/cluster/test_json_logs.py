"""With `log_format: json` all that processes write is JSON, and a request can be found in the logs by its id."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.harness import Cluster, running_cluster


class JsonCluster(Cluster):
    def start(self, name: str, module: str, config: Mapping[str, Any]) -> None:
        super().start(name, module, {**config, "log_format": "json"})


@pytest.mark.slow
def test_all_lines_of_all_processes_are_json(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(built_in_model, tmp_path, num_colocated=0, make=JsonCluster) as cluster:
        body = {"model": "tiny-python", "prompt": "import os", "max_tokens": 4, "ignore_eos": True}
        done = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        refused = httpx.post(f"{cluster.url}/v1/completions", json=body | {"prompt": [0] * 1_000_000}, timeout=60)
        assert (done.status_code, refused.status_code // 100) == (200, 4)
        names = list(cluster.processes)
    lines = {name: list(map(json.loads, (tmp_path / f"{name}.log").read_text().splitlines())) for name in names}
    assert all({"time", "level", "logger", "message", "process"} <= set(line) for name in names for line in lines[name])
    assert {name: {line["process"] for line in lines[name]} for name in names} == {name: {name} for name in names}
    (request,) = [line for line in lines["router"] if line["message"] == "request"]
    assert request["request_id"] == done.headers["x-request-id"]
    assert request["outcome"] == "length"
    for name in names:
        if name != "router":
            assert any(" is ready on " in line["message"] for line in lines[name])
