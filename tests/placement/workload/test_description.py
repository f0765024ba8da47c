from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.core.slo_file import WorkloadSection
from tandem.placement.workload.description import describe, summary_of
from tandem.placement.workload.requests import RequestStream

FIXED = {"prompt_tokens": {"mean": 100, "cv": 0}, "output_tokens": {"mean": 10, "cv": 0}}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"dataset": "sharegpt"}, "data set sharegpt, Poisson arrivals"),
        (FIXED | {"arrivals": {"process": "gamma", "cv": 2.5}}, "log-normal lengths, arrivals of cv 2.5"),
        ({"trace": Path("folder/monday.csv")}, "trace monday.csv"),
        ({"lengths": Path("folder/kinds.csv")}, "lengths of kinds.csv, Poisson arrivals"),
        (
            FIXED | {"output_tokens": {"mean": 9, "distribution": "pareto"}},
            "log-normal and pareto lengths, Poisson arrivals",
        ),
        (
            {
                "populations": [
                    FIXED | {"name": "chat", "share": 3},
                    {"name": "code", "share": 1, "dataset": "humaneval"},
                ]
            },
            "populations chat 75%, code 25%",
        ),
    ],
)
def test_the_description_of_a_workload(section: dict[str, Any], text: str) -> None:
    assert describe(WorkloadSection.model_validate(section)) == text


def test_a_summary_has_a_sample_of_the_lengths_and_counts_a_prefix_from_its_second_request_on() -> None:
    n = 9001
    requests = RequestStream.make(
        np.arange(n), np.full(n, 100), np.arange(n) + 1, prefix_group=np.zeros(n, dtype=np.int64),
        prefix_tokens=np.full(n, 25),
    )  # fmt: skip
    summary = summary_of(requests, "a test")
    assert (summary.source, summary.num_requests, summary.arrival_cv) == ("a test", n, 0.0)
    assert summary.shared_prefix_share == pytest.approx(0.25 * (n - 1) / n)
    assert 2000 < len(summary.output_tokens) <= 4000
    assert np.mean(summary.output_tokens) == pytest.approx(n / 2, rel=0.01)


def test_the_summary_of_no_requests() -> None:
    nobody = RequestStream.make(np.empty(0), np.empty(0), np.empty(0))
    assert summary_of(nobody, "nobody").prompt_tokens == ()
