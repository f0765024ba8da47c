"""Values whose fields have the names of a message's come back as they were."""

from dataclasses import fields

import pytest

from tandem.core.kv_frontier import StageFrontier
from tandem.core.session import BlockCounts, LinkStats
from tandem.core.workload_profile import ProfileSnapshot
from tandem.v1 import transfer_pb2, worker_pb2
from tandem.wire.same_fields import from_message, to_message

VALUES = [
    (transfer_pb2.StageFrontier, StageFrontier(1, 2, 3, 4)),
    (worker_pb2.BlockCounts, BlockCounts(1, 2, 3, 4, 5, 6)),
    (worker_pb2.LinkStats, LinkStats("p", "gloo", 1, 2, 3.5, 4, 5, 6, "fp8")),
    (worker_pb2.WorkloadProfile, ProfileSnapshot(1, 2.5, 3, 4.5, 5, (6.5, 7.5), (8, 9), (10,), (), (11,))),
]


@pytest.mark.parametrize(("message_type", "value"), VALUES, ids=lambda each: getattr(each, "__name__", ""))
def test_round_trip(message_type: type, value: object) -> None:
    message = to_message(message_type, value)
    assert from_message(type(value), message_type.FromString(message.SerializeToString())) == value
    assert {field.name for field in message_type.DESCRIPTOR.fields} == {field.name for field in fields(value)}
