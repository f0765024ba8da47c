"""Sampling settings of generation_config.json: `transformers` says what is in it, requests that name none get it."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import GenerationConfig

from tandem import AsyncClient
from tandem.core.clock import SystemClock
from tandem.core.completion import SamplingDefaults
from tandem.core.errors import CheckpointError
from tandem.core.request import SamplingParams
from tandem.router.sampling_defaults import load_sampling_defaults
from tandem.router.tokenizer import TextTokenizer
from tandem.v1 import inference_pb2_grpc
from tandem.wire.inference import InferenceServicer
from tandem.wire.server import bind, build_public_server
from tests.router.front import MODEL, Front, serve_front

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
LLAMA = {"bos_token_id": 0, "do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9}
QWEN = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
OTHERS = {"top_k": 50, "min_p": 0.05, "temperature": 1, "max_new_tokens": 100, "num_beams": 1, "top_p": None}
RECOMMENDED = SamplingDefaults(
    SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05), max_tokens=7
)


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("content", [LLAMA, QWEN, OTHERS, {}])
def test_what_is_read_is_what_transformers_reads(content: dict[str, Any], tmp_path: Path) -> None:
    judge = GenerationConfig.from_pretrained(write(tmp_path, content))
    defaults = load_sampling_defaults(tmp_path, "auto")
    usual = SamplingParams()
    for name in FIELDS:
        expected = getattr(judge, name) if content.get(name) is not None else getattr(usual, name)
        assert getattr(defaults.sampling, name) == expected, name
    assert defaults.max_tokens == judge.max_new_tokens
    assert load_sampling_defaults(tmp_path, "none") == SamplingDefaults()


def test_a_checkpoint_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults()
    assert load_sampling_defaults(write(tmp_path, {"top_k": -1}), "auto") == SamplingDefaults()


@pytest.mark.parametrize(
    "content",
    [
        *({"temperature": value} for value in ("1", True, [1], -0.1, 3, float("nan"), float("inf"))),
        {"top_p": 0},
        {"top_k": 2.5},
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        [],
    ],
)
def test_values_that_no_request_may_have_are_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json"):
        load_sampling_defaults(write(tmp_path, content), "auto")
    assert load_sampling_defaults(tmp_path, "none") == SamplingDefaults()


@pytest.fixture
async def front(tokenizer: TextTokenizer, raw_tokenizer: object) -> AsyncIterator[Front]:
    async with serve_front(tokenizer, raw_tokenizer, defaults=RECOMMENDED) as front:  # type: ignore[arg-type]
        yield front


def last(front: Front) -> SamplingParams:
    """What the last request was sampled with, seed and stop tokens left out."""
    return replace(front.generator.requests[-1].sampling, seed=0, stop_token_ids=())


async def test_requests_over_http(front: Front) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with front.client() as client:
        for body, expected in (
            ({}, replace(RECOMMENDED.sampling, max_tokens=7)),
            ({"temperature": None, "top_k": None}, replace(RECOMMENDED.sampling, max_tokens=7)),
            (
                {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
                SamplingParams(max_tokens=7),
            ),
            ({"top_k": -1, "max_tokens": 9}, replace(RECOMMENDED.sampling, top_k=0, max_tokens=9)),
            ({"top_p": 0}, replace(RECOMMENDED.sampling, top_p=1.0, top_k=1, max_tokens=7)),
        ):
            response = await client.post("/v1/chat/completions", json=chat | body)
            assert response.status_code == 200, response.text
            assert last(front) == expected, body
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
        assert last(front) == replace(RECOMMENDED.sampling, max_tokens=16), "OpenAI's limit of this path"


async def test_requests_over_grpc(front: Front) -> None:
    server, _ = build_public_server(1 << 20)
    servicer = InferenceServicer(front.service, SystemClock(), Random(1), 5.0)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(address) as client:
            await client.generate(prompt="hi")
            assert last(front) == replace(RECOMMENDED.sampling, max_tokens=7)
            await client.generate(
                prompt="hi", temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, max_tokens=3
            )
            assert last(front) == SamplingParams(max_tokens=3)
    finally:
        await server.stop(0.1)
