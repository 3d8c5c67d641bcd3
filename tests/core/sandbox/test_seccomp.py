"""The filter of system calls does what its tables say, for both processors: it is run here by a small interpreter."""

# ruff: noqa: E501

from __future__ import annotations

import os
import struct

import pytest

from align.core.sandbox.inside import seccomp

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
MACHINES = {"x86_64": 0, "aarch64": 1}
PID = 77


def answer(program: bytes, number: int, *arguments: int, arch: int) -> int:
    """What a classic BPF program returns for a system call; `struct seccomp_data` is number, arch, address, arguments."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x06:
            return int(k)
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[operation]
            at += yes if holds else no


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("writes", [True, False])
def test_all_and_only_the_calls_of_the_tables_are_allowed(machine: str, writes: bool) -> None:
    side, arch = MACHINES[machine], seccomp.AUDIT_ARCH[machine]
    program = seccomp.program(machine, PID, writes=writes)
    plain = seccomp.PLAIN | (seccomp.WRITING | seccomp.OPEN if writes else {})
    allowed = {numbers[side] for numbers in plain.values()} - {None}
    looked_at = {n[side] for n in (seccomp.CLONE, seccomp.CLONE3, seccomp.IOCTL, seccomp.PRLIMIT, seccomp.TGKILL, seccomp.KILL,
                                   seccomp.PRCTL, seccomp.FCNTL, *(() if writes else seccomp.OPEN.values()))}  # fmt: skip
    for number in [*range(700), 1023, 1024, 5000, 0x3FFFFFFF, 0x40000000, 0x40000001, 0xFFFFFFFF]:
        if number not in looked_at:
            expected = ALLOW if number in allowed else EPERM
            assert answer(program, number, arch=arch) == expected, number


def test_a_call_of_another_processor_kills(machine: str) -> None:
    program = seccomp.program(machine, PID, writes=True)
    for arch in (0x40000003, 0x40000028, *(set(seccomp.AUDIT_ARCH.values()) - {seccomp.AUDIT_ARCH[machine]})):
        assert answer(program, 0, arch=arch) == KILL


def test_arguments_are_looked_at(machine: str) -> None:
    side, arch = MACHINES[machine], seccomp.AUDIT_ARCH[machine]
    program = seccomp.program(machine, PID, writes=False)
    thread = 0x3D0F00  # what the C library asks for when it starts a thread
    minus_one = 2**64 - 1
    for call, arguments, expected in (
        (seccomp.CLONE, (thread,), ALLOW), (seccomp.CLONE, (17,), EPERM), (seccomp.CLONE, (thread | 0x10000000,), EPERM),
        (seccomp.CLONE, (thread | 0x20000000,), EPERM), (seccomp.CLONE3, (0,), ENOSYS),
        (seccomp.KILL, (PID, 10), ALLOW), (seccomp.KILL, (PID, 9), EPERM), (seccomp.KILL, (PID, 19), EPERM),
        (seccomp.KILL, (1, 10), EPERM), (seccomp.KILL, (0, 10), EPERM), (seccomp.KILL, (minus_one, 10), EPERM),
        (seccomp.KILL, (PID + 1, 0), EPERM), (seccomp.TGKILL, (PID, 80, 6), ALLOW), (seccomp.TGKILL, (PID, 80, 9), EPERM),
        (seccomp.TGKILL, (1, 1, 6), EPERM), (seccomp.PRLIMIT, (0,), ALLOW), (seccomp.PRLIMIT, (PID,), ALLOW),
        (seccomp.PRLIMIT, (1,), EPERM), (seccomp.PRCTL, (15,), ALLOW), (seccomp.PRCTL, (22,), EPERM),
        (seccomp.PRCTL, (4,), EPERM), (seccomp.FCNTL, (3, 1), ALLOW), (seccomp.FCNTL, (3, 8), EPERM),
        (seccomp.FCNTL, (3, 1031), EPERM), (seccomp.IOCTL, (0, 0x5401), ALLOW), (seccomp.IOCTL, (0, 0x5412), EPERM),
        (seccomp.OPEN["openat"], (0, 0, os.O_RDONLY), ALLOW), (seccomp.OPEN["openat"], (0, 0, os.O_RDWR), EPERM),
        (seccomp.OPEN["openat"], (0, 0, os.O_WRONLY | os.O_CREAT), EPERM),
        (seccomp.OPEN["openat"], (0, 0, os.O_RDONLY | os.O_TRUNC), EPERM),
    ):  # fmt: skip
        number = call[side]
        assert number is not None
        assert answer(program, number, *arguments, arch=arch) == expected, (number, arguments)
    if by_name := seccomp.OPEN["open"][side]:
        assert answer(program, by_name, 0, os.O_RDONLY, arch=arch) == ALLOW
        assert answer(program, by_name, 0, os.O_WRONLY, arch=arch) == EPERM


def test_no_call_that_starts_reaches_or_changes_something_is_in_a_table() -> None:
    """Numbers of x86_64, from the kernel's table: what must never be allowed whatever its arguments."""
    dangerous = {
        "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50, "socketpair": 53,
        "fork": 57, "vfork": 58, "execve": 59, "link": 86, "chown": 92, "ptrace": 101, "setuid": 105, "mknod": 133,
        "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166, "reboot": 169, "init_module": 175, "add_key": 248,
        "keyctl": 250, "linkat": 265, "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "seccomp": 317, "memfd_create": 319, "bpf": 321,
        "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "pidfd_open": 434, "openat2": 437, "pidfd_getfd": 438, "mount_setattr": 442,
        "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "setxattr": 188, "clock_settime": 227, "rt_sigqueueinfo": 129,
        "sched_setaffinity": 203, "setpriority": 141, "syslog": 103, "kexec_load": 246, "swapoff": 168, "sethostname": 170,
    }  # fmt: skip
    program = seccomp.program("x86_64", PID, writes=True)
    found = {
        n for n, number in dangerous.items() if answer(program, number, arch=seccomp.AUDIT_ARCH["x86_64"]) != EPERM
    }
    assert found == set()
