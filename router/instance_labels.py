"""Values of the label `tandem_instance`."""

from collections.abc import Iterable
from itertools import count

from tandem.core.instance_id import instance_name


class InstanceLabels:
    """Gives each live instance a label that its successor inherits.

    An instance's id is new at each start of its process. With the id as the label, every restart would add series to
    Prometheus for as long as it keeps data. The label is the instance's name instead. When several live instances have
    one name, the others are name#2, name#3, and so on. The label of an instance that is gone is free again, and the
    smallest free number is taken: a name never has more labels than it had live instances at one time.
    """

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}  # by instance id

    def assign(self, instance_ids: Iterable[str]) -> dict[str, str]:
        """Labels by id, of the instances that live now. An instance keeps its label until a call leaves it out."""
        live = list(instance_ids)
        self._labels = {instance_id: self._labels[instance_id] for instance_id in live if instance_id in self._labels}
        taken = set(self._labels.values())
        for instance_id in live:
            if instance_id not in self._labels:
                name = instance_name(instance_id)
                candidates = (name if number == 1 else f"{name}#{number}" for number in count(1))
                label = next(candidate for candidate in candidates if candidate not in taken)
                self._labels[instance_id] = label
                taken.add(label)
        return dict(self._labels)
