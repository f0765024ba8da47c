"""A cluster whose KV is sent in fewer bits gives nearly the tokens of transformers."""

import asyncio
import inspect
import pickletools
import random
from itertools import takewhile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.cluster.harness import running_cluster
from tests.cluster.test_same_tokens import cluster_tokens, reference_tokens
from tests.cluster.test_shapes import engine

AGREEMENT = {"fp8": 0.99, "int8": 0.99, "int4": 0.97}
NUM_PROMPTS = 48


def text_prompts(model: Path) -> list[list[int]]:
    """Parts of a file that was held out of the built-in model's training, of 40 to 1,000 tokens."""
    ids = AutoTokenizer.from_pretrained(model).encode(inspect.getsource(pickletools))
    draw = random.Random(3)
    prompts = []
    for _ in range(NUM_PROMPTS):
        length = int(40 * 25 ** draw.random())
        begin = draw.randrange(len(ids) - length)
        prompts.append(ids[begin : begin + length])
    return prompts


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", AGREEMENT)
def test_most_tokens_are_those_of_transformers(codec: str, built_in_model: Path, tmp_path: Path) -> None:
    """Between instances of other shapes, streamed. Tokens are compared up to the first one that differs: those after it
    continue another text."""
    with running_cluster(
        built_in_model,
        tmp_path,
        decode_transports=("gloo",),
        prefill={"engine": engine(2, 1, 16), "max_batch_tokens": 256},
        decode={"engine": engine(1, 2, 32), "stream_kv_from": "32KiB", "kv_codec": codec},
    ) as cluster:
        prompts = text_prompts(cluster.model)
        answers = asyncio.run(cluster_tokens(cluster, prompts))
        same = compared = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            wanted = reference_tokens(cluster.model, tuple(prompt))
            assert answer[0] == wanted[0], "the first token is of the prefill"
            equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, wanted, strict=True)))
            same, compared = same + equal - 1, compared + min(equal, len(wanted) - 1)
        print(f"{codec}: {same} of {compared} tokens are the same")
        assert same >= AGREEMENT[codec] * compared
        assert cluster.metric("tandem_transfer_failures_total") == 0
        sent = cluster.metric("tandem_transfer_wire_bytes_total", transport="gloo")
        assert 0 < sent < 0.5 * cluster.metric("tandem_transfer_bytes_total", transport="gloo")
        cluster.wait_idle(timeout_s=5.0)
