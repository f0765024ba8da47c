"""Takes away what a fleet does not need: devices that the bottleneck leaves idle are better given to something else."""

from collections.abc import Iterator
from dataclasses import replace

from tandem.placement.search.best_first import Looked
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.space import Space
from tandem.placement.search.trial import MOST_INSTANCES, run


def trimmed(space: Space, looked: Looked) -> Looked:
    """The same goodput from as few instances as prediction and, while fleets are small, a simulation allow."""
    goodput = looked.goodput or 0.0
    for fleet in _smaller(looked.fleet):
        predicted = space.predictor.goodput(fleet)
        if predicted < goodput:
            continue
        if fleet.num_instances > MOST_INSTANCES or run(space.problem, fleet, goodput)[1].meets:
            return trimmed(space, replace(looked, fleet=fleet, predicted=predicted))
    return looked


def _smaller(fleet: Fleet) -> Iterator[Fleet]:
    """One instance less in a pool (in each unit), the largest instances first."""
    step = max(1, fleet.units)
    for index, pool in sorted(enumerate(fleet.pools), key=lambda item: -item[1].kind.num_devices):
        if pool.instances > step:
            less = Pool(pool.kind, pool.instances - step)
            yield replace(fleet, pools=(*fleet.pools[:index], less, *fleet.pools[index + 1 :]))
