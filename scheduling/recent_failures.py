"""Which instances and pairs of instances failed lately, and which pairs cannot exchange KV at all.

Every failure counts 1, half as much after each half-life. A pair that was refused stays refused until one of the two is
gone.

The link of a pair is suspect when it has just failed, or when the decode instance reports that it cannot reach the
prefill instance. Where the two are on different hosts, the network between these is suspect, and so are all links that
need it, in both directions. On one host it is the prefill instance itself that does not answer, and all its links are.
"""

from collections.abc import Iterator, Mapping, Set

from tandem.core.session import Role
from tandem.scheduling.known_instance import KnownInstance

HALF_LIFE_S = 5.0
MOST = 4.0  # what an instance or a pair counts at most
LEAST = 1 / 16  # what counts less is forgotten
SUSPECT = 0.5  # a pair that counts at least that much has a suspect link

NOBODY: Set[str] = frozenset()

Name = str | tuple[str, str]  # an instance, or the prefill and the decode instance of a pair


class RecentFailures:
    """False while there are none. Time is passed in."""

    __slots__ = ("_pairs", "_refused", "_since", "_unreachable")

    def __init__(self) -> None:
        self._since: dict[Name, tuple[float, float]] = {}  # count, and when it was that
        self._pairs: dict[tuple[str, str], float] = {}  # as of the last look
        self._refused: dict[str, set[str]] = {}  # prefill instance -> decode instances
        self._unreachable: dict[str, tuple[str, ...]] = {}  # decode instance -> prefill instances, as it reports

    def __bool__(self) -> bool:
        return bool(self._since or self._unreachable)

    def refuse(self, prefill_id: str, decode_id: str) -> None:
        """The two have met, and the KV of one is of no use to the other, or cannot get there."""
        self._refused.setdefault(prefill_id, set()).add(decode_id)

    def refused_by(self, prefill_id: str) -> Set[str]:
        """Decode instances that cannot read its KV."""
        return self._refused.get(prefill_id, NOBODY)

    def without_reader(self, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Prefill instances whose KV no usable decode instance can read, because all were refused or report that they
        cannot reach it."""
        lost = ((prefill_id, decode_id) for decode_id, lost in self._unreachable.items() for prefill_id in lost)
        impossible: dict[str, set[str]] = {prefill_id: set(refused) for prefill_id, refused in self._refused.items()}
        for prefill_id, decode_id in lost:
            impossible.setdefault(prefill_id, set()).add(decode_id)
        return {
            prefill_id
            for prefill_id, decode_ids in impossible.items()
            if (prefill := instances.get(prefill_id)) is not None
            and prefill.role is Role.PREFILL
            and all(decode.instance_id in decode_ids for decode in readers(prefill, instances))
        }

    def cannot_reach(self, decode_id: str, prefill_ids: tuple[str, ...]) -> bool:
        """What a decode instance reports now. Whether it is something new."""
        before = self._unreachable.pop(decode_id, ())
        if prefill_ids:
            self._unreachable[decode_id] = prefill_ids
        return before != prefill_ids

    def suspect_readers(self, prefill: KnownInstance, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Usable decode instances whose link from it is suspect, as of the last look."""
        pairs, hosts = self._suspects(instances)
        if not pairs:
            return NOBODY
        return {
            decode.instance_id for decode in readers(prefill, instances) if _is_suspect(prefill, decode, pairs, hosts)
        }

    def cut_off(self, instances: Mapping[str, KnownInstance]) -> Set[str]:
        """Usable prefill instances all of whose links are suspect or refused, as of the last look."""
        pairs, hosts = self._suspects(instances)
        if not pairs:
            return NOBODY
        touched_ids = {prefill_id for prefill_id, _ in pairs}
        touched_hosts = {host for both in hosts for host in both}
        return {
            prefill.instance_id
            for prefill in instances.values()
            if prefill.role is Role.PREFILL
            and (prefill.instance_id in touched_ids or prefill.host in touched_hosts)
            and all(
                decode.instance_id in self.refused_by(prefill.instance_id) or _is_suspect(prefill, decode, pairs, hosts)
                for decode in readers(prefill, instances)
            )
        }

    def _suspects(self, instances: Mapping[str, KnownInstance]) -> tuple[set[tuple[str, str]], set[frozenset[str]]]:
        """Pairs, and the two hosts of each pair that has two. One whose instance is lost tells nothing of others."""
        pairs = {pair for pair, count in self._pairs.items() if count >= SUSPECT}
        for decode_id, lost in self._unreachable.items():
            for prefill in (instances[each] for each in lost if each in instances and decode_id in instances):
                is_silent = prefill.host == instances[decode_id].host
                found = readers(prefill, instances) if is_silent else (instances[decode_id],)
                pairs.update((prefill.instance_id, decode.instance_id) for decode in found)
        pairs = {pair for pair in pairs if all(each in instances and instances[each].is_usable for each in pair)}
        hosts = {frozenset(instances[each].host for each in pair) for pair in pairs}
        return pairs, {both for both in hosts if len(both) == 2}

    def add(self, name: Name, now_s: float) -> None:
        count = self._count(name, now_s) if name in self._since else 0.0
        self._since[name] = (min(MOST, count + 1), now_s)

    def forget(self, instance_id: str) -> None:
        """And all pairs with it."""
        self._since = {name: since for name, since in self._since.items() if instance_id not in (name, *_both(name))}
        self._pairs = {pair: count for pair, count in self._pairs.items() if instance_id not in pair}
        self._unreachable.pop(instance_id, None)
        self._refused.pop(instance_id, None)
        for prefill_id in [each for each, refused in self._refused.items() if instance_id in refused]:
            self._refused[prefill_id].discard(instance_id)
            if not self._refused[prefill_id]:
                del self._refused[prefill_id]

    def current(self, now_s: float) -> dict[str, float]:
        """Of single instances. Those of pairs are then as of now, too."""
        counts = {name: self._count(name, now_s) for name in self._since}
        self._since = {name: since for name, since in self._since.items() if counts[name] >= LEAST}
        self._pairs = {name: counts[name] for name in self._since if isinstance(name, tuple)}
        return {name: counts[name] for name in self._since if isinstance(name, str)}

    def of_prefills(self, failures: Mapping[str, float], instances: Mapping[str, KnownInstance]) -> dict[str, float]:
        """`failures` of single instances, and for a prefill instance whose every possible pair failed the least of
        those."""
        counts = dict(failures)
        for prefill_id in {prefill_id for prefill_id, _ in self._pairs}:
            counts_of_pairs = (
                self._pairs.get((prefill_id, decode.instance_id), 0.0)
                for decode in readers(instances[prefill_id], instances)
                if decode.instance_id not in self.refused_by(prefill_id)
            )
            least = min(counts_of_pairs, default=0.0)
            if least:
                counts[prefill_id] = min(MOST, counts.get(prefill_id, 0.0) + least)
        return counts

    def of_decodes(self, failures: Mapping[str, float], prefill_id: str) -> dict[str, float]:
        """`failures` of single instances, and those of pairs with this prefill instance."""
        counts = dict(failures)
        for (first_id, decode_id), count in self._pairs.items():
            if first_id == prefill_id:
                counts[decode_id] = min(MOST, counts.get(decode_id, 0.0) + count)
        return counts

    def _count(self, name: Name, now_s: float) -> float:
        count, since_s = self._since[name]
        return float(count * 0.5 ** ((now_s - since_s) / HALF_LIFE_S))


def readers(prefill: KnownInstance, instances: Mapping[str, KnownInstance]) -> Iterator[KnownInstance]:
    """Usable decode instances with KV of the same format."""
    for decode in instances.values():
        if decode.role is Role.DECODE and decode.is_usable and decode.status.fingerprint == prefill.status.fingerprint:
            yield decode


def _is_suspect(
    prefill: KnownInstance, decode: KnownInstance, pairs: Set[tuple[str, str]], hosts: Set[frozenset[str]]
) -> bool:
    return (prefill.instance_id, decode.instance_id) in pairs or frozenset((prefill.host, decode.host)) in hosts


def _both(name: Name) -> tuple[str, ...]:
    return name if isinstance(name, tuple) else ()
