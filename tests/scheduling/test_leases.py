import pytest

from core.errors import DuplicateRequestError
from scheduling.block_pool import BlockPool
from scheduling.leases import LeaseTable


def test_an_acknowledged_lease_frees_its_blocks_once() -> None:
    pool = BlockPool(4)
    leases = LeaseTable(pool)
    lease = leases.hold("r", 0, pool.allocate(3), expires_s=10.0)
    assert (leases.num_blocks, leases.find("r", 0, 9.0)) == (3, lease)
    assert leases.acknowledge("r", 0, 9.0)
    assert pool.num_free == 4
    assert not leases.acknowledge("r", 0, 9.0)
    assert (len(leases), leases.num_blocks) == (0, 0)


def test_an_acknowledgement_of_another_attempt_is_refused() -> None:
    pool = BlockPool(4)
    leases = LeaseTable(pool)
    leases.hold("r", 1, pool.allocate(2), expires_s=10.0)
    assert not leases.acknowledge("r", 0, 1.0)
    assert not leases.acknowledge("other", 1, 1.0)
    assert pool.num_held == 2


def test_a_late_acknowledgement_is_refused_even_before_the_table_was_swept() -> None:
    pool = BlockPool(4)
    leases = LeaseTable(pool)
    leases.hold("r", 0, pool.allocate(2), expires_s=10.0)
    assert not leases.acknowledge("r", 0, 10.0)
    assert leases.find("r", 0, 10.0) is None
    assert not leases.renew("r", 0, 20.0, now_s=10.0)
    assert [lease.request_id for lease in leases.expire(10.0)] == ["r"]
    assert pool.num_free == 4
    assert leases.expire(99.0) == []


def test_expiry_ends_only_what_is_due() -> None:
    pool = BlockPool(4)
    leases = LeaseTable(pool)
    for request_id, expires_s in (("late", 30.0), ("early", 10.0), ("renewed", 10.0)):
        leases.hold(request_id, 0, pool.allocate(1), expires_s)
    assert leases.renew("renewed", 0, 40.0, now_s=5.0)
    assert leases.next_expiry_s == 10.0
    assert [lease.request_id for lease in leases.expire(29.0)] == ["early"]
    assert [lease.request_id for lease in leases.expire(50.0)] == ["late", "renewed"]
    assert leases.next_expiry_s is None
    assert pool.num_free == 4


def test_drop_frees_at_once() -> None:
    pool = BlockPool(2)
    leases = LeaseTable(pool)
    leases.hold("r", 0, pool.allocate(2), expires_s=10.0)
    assert leases.drop("r", 0) is not None
    assert leases.drop("r", 0) is None
    assert pool.num_free == 2


def test_a_second_lease_for_the_same_attempt_is_refused() -> None:
    pool = BlockPool(2)
    leases = LeaseTable(pool)
    leases.hold("r", 0, pool.allocate(1), expires_s=10.0)
    blocks = pool.allocate(1)
    with pytest.raises(DuplicateRequestError):
        leases.hold("r", 0, blocks, expires_s=10.0)
    pool.release(blocks)
    assert leases.num_blocks == 1
