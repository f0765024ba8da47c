"""Transfers between instances of two shapes are measured with the sender and the receiver of instances."""

from dataclasses import replace

from tandem.core.kv_layout import KvLayout
from tandem.placement.costs.resharding import KvShape, resharding_of
from tandem.profiling.kv_transfer_profile import measure_transfers

LAYOUT = KvLayout(
    num_layers=4, num_blocks=8, num_kv_heads=2, block_size=16, head_dim=16, dtype="float32", weights_hash="w"
)


def test_every_pair_of_shapes_and_unequal_blocks_are_measured() -> None:
    told: list[float] = []
    layouts = [LAYOUT, replace(LAYOUT, tp=2), replace(LAYOUT, layers_per_stage=(3, 1))]
    transfers = measure_transfers(layouts, "torch", told.append)
    shapes = [KvShape(), KvShape(tp=2), KvShape(pp=2)]
    larger = KvShape(block_size=32)
    pairs = [(source, destination) for source in shapes for destination in shapes]
    assert [(one.source, one.destination) for one in transfers] == [*pairs, (KvShape(), larger), (larger, KvShape())]
    bytes_per_token = 4 * 2 * 2 * 16 * 4
    for one in transfers:
        assert [time.num_bytes for time in one.times] == [
            64 * bytes_per_token,
            256 * bytes_per_token,
            1024 * bytes_per_token,
        ]
        assert all(time.seconds > 0 for time in one.times)
    assert resharding_of(transfers, 16).keys() == {(source.shape, other.shape) for source, other in pairs}
    assert told[-1] == 1.0
