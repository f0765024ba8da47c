"""The cluster on a virtual clock: `scheduling/`'s code, a cost model instead of an engine, links instead of sockets."""

from tandem.placement.simulator.run import Progress, simulate

__all__ = ["Progress", "simulate"]
