"""The cluster on a virtual clock: `scheduling/`'s code, a cost model instead of an engine, links instead of sockets."""
