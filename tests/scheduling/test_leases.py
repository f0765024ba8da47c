import pytest

from tandem.core.errors import DuplicateRequestError
from tandem.scheduling.leases import LeaseTable


def test_a_lease_is_acknowledged_once() -> None:
    leases = LeaseTable()
    lease = leases.hold("r", 0, [0, 1, 2], expires_s=10.0)
    assert (leases.num_blocks, leases.find("r", 0, 9.0)) == (3, lease)
    assert leases.acknowledge("r", 0, 9.0) is lease
    assert leases.acknowledge("r", 0, 9.0) is None
    assert (len(leases), leases.num_blocks) == (0, 0)


def test_an_acknowledgement_of_another_attempt_is_refused() -> None:
    leases = LeaseTable()
    leases.hold("r", 1, [0, 1], expires_s=10.0)
    assert not leases.acknowledge("r", 0, 1.0)
    assert not leases.acknowledge("other", 1, 1.0)
    assert leases.block_tables() == [(0, 1)]


def test_a_late_acknowledgement_is_refused_even_before_the_table_was_swept() -> None:
    leases = LeaseTable()
    leases.hold("r", 0, [0, 1], expires_s=10.0)
    assert not leases.acknowledge("r", 0, 10.0)
    assert leases.find("r", 0, 10.0) is None
    assert [lease.request_id for lease in leases.expire(10.0)] == ["r"]
    assert leases.expire(99.0) == []


def test_only_due_leases_expire() -> None:
    leases = LeaseTable()
    for request_id, expires_s in (("late", 30.0), ("early", 10.0), ("latest", 40.0)):
        leases.hold(request_id, 0, [3], expires_s)
    assert [lease.request_id for lease in leases.expire(29.0)] == ["early"]
    assert [lease.request_id for lease in leases.expire(50.0)] == ["late", "latest"]
    assert len(leases) == 0


def test_drop_ends_a_lease_at_once() -> None:
    leases = LeaseTable()
    leases.hold("r", 0, [0, 1], expires_s=10.0)
    assert leases.drop("r", 0) is not None
    assert leases.drop("r", 0) is None
    assert leases.acknowledge("r", 0, 1.0) is None


def test_a_second_lease_for_the_same_attempt_is_refused() -> None:
    leases = LeaseTable()
    leases.hold("r", 0, [3], expires_s=10.0)
    with pytest.raises(DuplicateRequestError):
        leases.hold("r", 0, [2], expires_s=10.0)
    assert leases.num_blocks == 1
