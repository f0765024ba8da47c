"""KV of every prompt of two blocks or more is streamed, whatever else is computed: tokens are those of transformers."""

from pathlib import Path

import pytest

from tests.cluster.harness import running_cluster
from tests.cluster.test_shapes import check, engine

SHAPES = [
    ((1, 1, 16), (1, 1, 16)),
    ((2, 1, 16), (1, 2, 32)),
    ((1, 2, 32), (2, 1, 8)),  # of two stages, the first one's layers
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_streamed_prompts(
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]], built_in_model: Path, tmp_path: Path
) -> None:
    """Long prompts in chunks, and layers of each chunk, over shared memory and over gloo."""
    with running_cluster(
        built_in_model,
        tmp_path,
        decode_transports=("shared_memory", "gloo"),
        prefill={"engine": engine(*shapes[0]), "max_batch_tokens": 256},
        decode={"engine": engine(*shapes[1]), "stream_kv_from": "32KiB"},
    ) as cluster:
        check(cluster, num_prompts=24, longest=1500)
        assert cluster.metric("tandem_transfer_failures_total") == 0
        for transport in ("shared_memory", "gloo"):
            streamed = cluster.metric("tandem_transfer_streamed_bytes_total", transport=transport)
            assert 0 < streamed <= cluster.metric("tandem_transfer_bytes_total", transport=transport)
