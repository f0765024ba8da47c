"""The shared pool: sealed, without a name, gone with its last user."""

import errno
import os
import secrets
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from tandem.core.errors import TransferError
from tandem.kv_transfer.descriptors import DescriptorServer, fetch_descriptor
from tandem.kv_transfer.pool import SharedPool, map_read_only


def test_a_mapping_sees_what_the_owner_writes() -> None:
    pool = SharedPool.create(1 << 16)
    assert pool.fd is not None
    mapped = map_read_only(pool.fd, 1 << 16)
    pool.tensor[100:200] = 7
    assert torch.equal(mapped, pool.tensor)
    pool.close()
    assert int(mapped[150]) == 7


def test_the_pool_cannot_shrink_or_be_written_by_others() -> None:
    pool = SharedPool.create(1 << 16)
    assert pool.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(pool.fd, b"x", 0)
    pool.close()


def test_a_file_that_is_no_pool_is_refused() -> None:
    pool = SharedPool.create(1 << 16)
    assert pool.fd is not None
    with pytest.raises(TransferError):
        map_read_only(pool.fd, 1 << 17)
    pool.close()
    unsealed = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 16)
    with pytest.raises(TransferError):
        map_read_only(unsealed, 1 << 16)
    os.close(unsealed)


def test_memory_and_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd")), _mapped_pools()
    pool = SharedPool.create(1 << 20)
    assert pool.fd is not None
    mapped = map_read_only(pool.fd, 1 << 20)
    assert _mapped_pools() == before[1] + 2
    pool.close()
    del mapped
    assert (len(os.listdir("/proc/self/fd")), _mapped_pools()) == before


def _mapped_pools() -> int:
    with open("/proc/self/maps") as maps:
        return sum("tandem-kv" in line for line in maps)


def test_a_descriptor_reaches_another_process_once() -> None:
    pool = SharedPool.create(1 << 16)
    assert pool.fd is not None
    pool.tensor[5] = 42
    server = DescriptorServer.start([pool.fd])
    nonce = server.issue_nonce(0)
    script = (
        "import sys; from kv_transfer.descriptors import fetch_descriptor; from kv_transfer.pool import map_read_only\n"
        "fd = fetch_descriptor(sys.argv[1], bytes.fromhex(sys.argv[2])); print(int(map_read_only(fd, 1 << 16)[5]))\n"
        "import os, mmap\n"
        "try: mmap.mmap(fd, 1 << 16)\n"
        "except PermissionError: print('read-only')\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, server.name, nonce.hex()], capture_output=True, text=True, timeout=60
    )
    assert output.stdout.split() == ["42", "read-only"], output.stderr
    for used_or_invented in (nonce, bytes(32), b"short"):
        with pytest.raises(TransferError):
            fetch_descriptor(server.name, used_or_invented)
    os.close(fetch_descriptor(server.name, server.issue_nonce(0)))
    server.close()
    with pytest.raises(TransferError):
        fetch_descriptor("tandem-kv-nobody", nonce)
    pool.close()


class _OutOfDescriptors(socket.socket):
    """Cannot accept at first, as in a process with too many open files."""

    failures = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_too_many_open_files_do_not_end_the_thread_that_hands_out_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    pool = SharedPool.create(1 << 16)
    assert pool.fd is not None
    listener = _OutOfDescriptors(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0tandem-kv-test-{secrets.token_hex(8)}")
    listener.listen(4)
    server = DescriptorServer(listener, [os.dup(pool.fd)])
    server._thread.start()
    os.close(fetch_descriptor(server.name, server.issue_nonce(0)))
    assert "Too many open files" in caplog.text
    server.close()
    pool.close()
