"""grpc.aio, kept for the life of a process."""

import functools

import grpc


@functools.cache
def keep_grpc_poller() -> None:
    """Keeps the thread that polls for grpc.aio, in every process that opens a channel or a server.

    gRPC ends that thread with the last object that needs it. That is often the garbage collector's work, which then
    waits until all calls have ended; the objects of these calls may be the next that it would free, and the process
    hangs (grpcio 1.85, `PollerCompletionQueue.shutdown`).
    """
    grpc.aio.init_grpc_aio()
