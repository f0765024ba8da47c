"""Labels of instances stay over restarts, and there are never more than instances that live at one time."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.instance_id import instance_name, make_instance_id
from tandem.router.instance_labels import InstanceLabels

_NAMES = st.sampled_from(("decode", "decode-1", "decode#2"))
_IDS = st.builds(make_instance_id, _NAMES, st.integers(0, 5))


@given(st.text(min_size=1), st.integers(0, 2**32 - 1))
def test_an_id_has_its_name(name: str, suffix: int) -> None:
    assert instance_name(make_instance_id(name, suffix)) == name


def test_ids_of_another_form_are_their_own_name() -> None:
    assert [instance_name(text) for text in ("decode-0", "decode", "-01234567", "d-0123456G")] == [
        "decode-0",
        "decode",
        "-01234567",
        "d-0123456G",
    ]


def test_a_successor_inherits_the_label() -> None:
    labels = InstanceLabels()
    assert labels.assign(["decode-00000001"]) == {"decode-00000001": "decode"}
    both = {"decode-00000001": "decode", "decode-00000002": "decode#2"}
    assert labels.assign(["decode-00000002", "decode-00000001"]) == both
    assert labels.assign(["decode-00000002"]) == {"decode-00000002": "decode#2"}, "a label stays while it is used"
    assert labels.assign(["decode-00000003", "decode-00000002"])["decode-00000003"] == "decode"


@given(st.lists(st.lists(_IDS, unique=True, max_size=6)))
def test_labels_are_unique_stable_and_bounded(rounds: list[list[str]]) -> None:
    labels, before, ever, most_alive = InstanceLabels(), dict[str, str](), set[str](), 0
    for live in rounds:
        now = labels.assign(live)
        assert set(now) == set(live)
        assert len(set(now.values())) == len(live)
        assert all(now[instance_id] == before[instance_id] for instance_id in live if instance_id in before)
        before = now
        ever |= set(now.values())
        most_alive = max(most_alive, *Counter(map(instance_name, live)).values(), 0)
    assert len(ever) <= 3 * (most_alive + 1), "one name may look like another's second label"
