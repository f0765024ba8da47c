"""A client says nothing about transfers: which instances, blocks or addresses its KV goes through is the router's."""

import dataclasses
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor

from tandem.core.completion import CompletionRequest
from tandem.v1 import inference_pb2
from tests.router.front import MODEL, Front

FIELDS = ("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "disaggregated_params")
HEADERS = {"x-prefiller-host-port": "10.0.0.1:8000", "x-data-parallel-host-port": "10.0.0.1:1", "x-kv-source": "p-1"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("field", FIELDS)
async def test_a_body_with_it_is_refused(field: str, front: Front) -> None:
    """These are the fields of other servers, whose routers send them to their workers."""
    value = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_block_ids": [1]}
    async with front.client() as client:
        for path, prompt in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            response = await client.post(path, json={"model": MODEL, field: value, **prompt})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert not front.generator.requests


@pytest.mark.asyncio(loop_scope="module")
async def test_headers_with_it_change_nothing(front: Front) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 2, "seed": 1}
    async with front.client() as client:
        for headers in ({}, HEADERS):
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
    plain, other = front.generator.requests
    assert dataclasses.replace(other, request_id=plain.request_id, deadline_s=plain.deadline_s) == plain


def _files(message: Descriptor, seen: set[str]) -> Iterator[str]:
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    yield message.file.name
    for field in message.fields:
        if field.message_type is not None:
            yield from _files(field.message_type, seen)


def test_the_messages_of_clients_have_no_place_for_it() -> None:
    for message in (inference_pb2.GenerateRequest, inference_pb2.ListModelsRequest):
        assert set(_files(message.DESCRIPTOR, set())) <= {"tandem/v1/inference.proto", "tandem/v1/common.proto"}
    names = {field.name for field in dataclasses.fields(CompletionRequest)}
    assert not {name for name in names if "kv" in name or "source" in name or "instance" in name}
