"""Failures that count against instances and pairs of instances, and pairs that cannot exchange KV.

A failure of an instance or a pair counts 1, and half as much after each half-life. A pair that is incompatible stays so
until one of its instances is gone.

The link of a pair is *suspect* after a recent failure of the pair, and while the decode instance reports that it cannot
reach the prefill instance. If the two are on different hosts, the network between these hosts is suspect, and with it
every link in either direction between them. If they are on one host, the prefill instance itself does not answer, and
all its links are suspect.
"""

from collections.abc import Iterator, Mapping, Set

from tandem.core.session import Role
from tandem.scheduling.instance_index import NO_INSTANCES
from tandem.scheduling.known_instance import KnownInstance

HALF_LIFE_S = 5.0
MAX_COUNT = 4.0  # of one instance or pair
MIN_COUNT = 1 / 16  # smaller counts are dropped
SUSPECT_COUNT = 0.5  # a pair with at least this count has a suspect link

Pair = tuple[str, str]  # ids of a prefill instance and a decode instance


class RecentFailures:
    """False while there is neither a recent failure nor a report of an unreachable instance. Time is passed in."""

    __slots__ = ("_counts", "_incompatible", "_pairs", "_unreachable")

    def __init__(self) -> None:
        self._counts: dict[str | Pair, tuple[float, float]] = {}  # count, and the time at which it had this value
        self._pairs: dict[Pair, float] = {}  # counts of pairs at the last call of `current`
        self._incompatible: dict[str, set[str]] = {}  # prefill instance -> decode instances
        self._unreachable: dict[str, tuple[str, ...]] = {}  # decode instance -> prefill instances, from its report

    def __bool__(self) -> bool:
        return bool(self._counts or self._unreachable)

    # --- what has happened -------------------------------------------------------------------------------------------

    def add(self, key: str | Pair, now_s: float) -> None:
        """An instance or a pair has failed."""
        count = self._count(key, now_s) if key in self._counts else 0.0
        self._counts[key] = (min(MAX_COUNT, count + 1), now_s)

    def add_incompatible(self, prefill_id: str, decode_id: str) -> None:
        """The two have tried to link: their KV formats differ, or they have no transport in common."""
        self._incompatible.setdefault(prefill_id, set()).add(decode_id)

    def set_unreachable(self, decode_id: str, prefill_ids: tuple[str, ...]) -> bool:
        """The prefill instances that a decode instance reports as unreachable, instead of those that it reported
        before. Returns whether they differ."""
        before = self._unreachable.pop(decode_id, ())
        if prefill_ids:
            self._unreachable[decode_id] = prefill_ids
        return before != prefill_ids

    def forget(self, instance_id: str) -> None:
        """The instance is gone: drop its own entries and those of its pairs."""
        self._counts = {key: entry for key, entry in self._counts.items() if instance_id not in _instances_of(key)}
        self._pairs = {pair: count for pair, count in self._pairs.items() if instance_id not in pair}
        self._unreachable.pop(instance_id, None)
        self._incompatible.pop(instance_id, None)
        for prefill_id in [each for each, decode_ids in self._incompatible.items() if instance_id in decode_ids]:
            self._incompatible[prefill_id].discard(instance_id)
            if not self._incompatible[prefill_id]:
                del self._incompatible[prefill_id]

    # --- counts ------------------------------------------------------------------------------------------------------

    def current(self, now_s: float) -> dict[str, float]:
        """Counts of single instances. The methods that use counts of pairs take these as of this call."""
        counts = {key: self._count(key, now_s) for key in self._counts}
        self._counts = {key: entry for key, entry in self._counts.items() if counts[key] >= MIN_COUNT}
        self._pairs = {key: counts[key] for key in self._counts if isinstance(key, tuple)}
        return {key: counts[key] for key in self._counts if isinstance(key, str)}

    def of_prefills(self, counts: Mapping[str, float], instances: Mapping[str, KnownInstance]) -> dict[str, float]:
        """`counts` of single instances. A prefill instance whose pairs have all failed gets the lowest count of these
        pairs in addition."""
        total = dict(counts)
        for prefill_id in {prefill_id for prefill_id, _ in self._pairs}:
            counts_of_pairs = (
                self._pairs.get((prefill_id, decode.instance_id), 0.0)
                for decode in readers(instances[prefill_id], instances)
                if decode.instance_id not in self.incompatible_readers(prefill_id)
            )
            lowest = min(counts_of_pairs, default=0.0)
            if lowest:
                total[prefill_id] = min(MAX_COUNT, total.get(prefill_id, 0.0) + lowest)
        return total

    def of_decodes(self, counts: Mapping[str, float], prefill_id: str) -> dict[str, float]:
        """`counts` of single instances, plus the counts of their pairs with this prefill instance."""
        total = dict(counts)
        for (first_id, decode_id), count in self._pairs.items():
            if first_id == prefill_id:
                total[decode_id] = min(MAX_COUNT, total.get(decode_id, 0.0) + count)
        return total

    # --- links -------------------------------------------------------------------------------------------------------

    def incompatible_readers(self, prefill_id: str) -> Set[str]:
        """Decode instances that cannot read the KV of the prefill instance."""
        return self._incompatible.get(prefill_id, NO_INSTANCES)

    def prefills_without_reader(self, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Prefill instances whose KV no usable decode instance can read: each is incompatible with them, or reports
        that it cannot reach them."""
        unreadable: dict[str, set[str]] = {
            prefill_id: set(decode_ids) for prefill_id, decode_ids in self._incompatible.items()
        }
        for decode_id, prefill_ids in self._unreachable.items():
            for prefill_id in prefill_ids:
                unreadable.setdefault(prefill_id, set()).add(decode_id)
        return {
            prefill_id
            for prefill_id, decode_ids in unreadable.items()
            if (prefill := instances.get(prefill_id)) is not None
            and prefill.role is Role.PREFILL
            and all(decode.instance_id in decode_ids for decode in readers(prefill, instances))
        }

    def suspect_readers(self, prefill: KnownInstance, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Usable decode instances whose link from `prefill` is suspect."""
        pairs, networks = self._suspects(instances)
        if not pairs:
            return NO_INSTANCES
        return {
            decode.instance_id
            for decode in readers(prefill, instances)
            if _is_suspect(prefill, decode, pairs, networks)
        }

    def prefills_with_suspect_links(self, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Usable prefill instances of which every link is suspect or incompatible."""
        pairs, networks = self._suspects(instances)
        if not pairs:
            return NO_INSTANCES
        affected_ids = {prefill_id for prefill_id, _ in pairs}
        affected_hosts = {host for network in networks for host in network}
        return {
            prefill.instance_id
            for prefill in instances.values()
            if prefill.role is Role.PREFILL
            and (prefill.instance_id in affected_ids or prefill.host in affected_hosts)
            and all(
                decode.instance_id in self.incompatible_readers(prefill.instance_id)
                or _is_suspect(prefill, decode, pairs, networks)
                for decode in readers(prefill, instances)
            )
        }

    def _suspects(self, instances: Mapping[str, KnownInstance]) -> tuple[set[Pair], set[frozenset[str]]]:
        """Pairs of usable instances with a suspect link, and the suspect networks, each as its two hosts. The link of
        a lost instance says nothing about a network: the instance itself may have been the reason."""
        pairs = {pair for pair, count in self._pairs.items() if count >= SUSPECT_COUNT}
        for decode_id, prefill_ids in self._unreachable.items():
            decode = instances.get(decode_id)
            for prefill_id in prefill_ids:
                prefill = instances.get(prefill_id)
                if decode is None or prefill is None:
                    continue
                affected = readers(prefill, instances) if prefill.host == decode.host else (decode,)
                pairs.update((prefill_id, reader.instance_id) for reader in affected)
        pairs = {pair for pair in pairs if all(each in instances and instances[each].is_usable for each in pair)}
        hosts = {frozenset(instances[each].host for each in pair) for pair in pairs}
        return pairs, {network for network in hosts if len(network) == 2}

    def _count(self, key: str | Pair, now_s: float) -> float:
        count, since_s = self._counts[key]
        return float(count * 0.5 ** ((now_s - since_s) / HALF_LIFE_S))


def readers(prefill: KnownInstance, instances: Mapping[str, KnownInstance]) -> Iterator[KnownInstance]:
    """Usable decode instances whose KV has the same format as that of `prefill`."""
    for decode in instances.values():
        if decode.role is Role.DECODE and decode.is_usable and decode.status.fingerprint == prefill.status.fingerprint:
            yield decode


def _is_suspect(prefill: KnownInstance, decode: KnownInstance, pairs: Set[Pair], networks: Set[frozenset[str]]) -> bool:
    return (prefill.instance_id, decode.instance_id) in pairs or frozenset((prefill.host, decode.host)) in networks


def _instances_of(key: str | Pair) -> Pair | tuple[str]:
    return key if isinstance(key, tuple) else (key,)
