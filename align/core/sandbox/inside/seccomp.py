"""The system calls that a solution may make: an allow-list as a classic BPF program, for x86_64 and aarch64.

All else gives EPERM, except `clone3`, which gives ENOSYS so that the C library falls back to `clone`, whose flags can
be looked at. There is no way to start a process (threads only), to execute a file, to open a socket, to look into or
signal another process, or to change any privilege.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux; a pair is
(x86_64, aarch64), None where the architecture has no such call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from functools import lru_cache

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000

# Calls that are harmless whatever their arguments.
PLAIN: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "getcwd": (79, 17), "chdir": (80, 49),
    "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None),
    "getgroups": (115, 158),
    "getpgid": (121, 155), "getsid": (124, 156), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "epoll_create": (213, None), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70),
    "getcpu": (309, 168), "getrandom": (318, 278), "copy_file_range": (326, 285),
    "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "statfs": (137, 43), "fstatfs": (138, 44),
    "sendfile": (40, 71), "fadvise64": (221, 223), "mincore": (27, 232), "msync": (26, 227),
}  # fmt: skip

# Calls that change files: allowed only where all that can be changed is a private scratch file system.
WRITING: dict[str, tuple[int | None, int | None]] = {
    "truncate": (76, 45), "ftruncate": (77, 46), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "unlink": (87, None), "symlink": (88, None), "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38),
    "symlinkat": (266, 36), "utimensat": (280, 88), "fallocate": (285, 47), "renameat2": (316, 276),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
}  # fmt: skip

OPEN = {"open": (2, None), "openat": (257, 56)}
CLONE, CLONE3, IOCTL, PRLIMIT, TGKILL, KILL = (56, 220), (435, 435), (16, 29), (302, 261), (234, 131), (62, 129)
PRCTL, FCNTL = (157, 167), (72, 25)

CLONE_THREAD = 0x00010000
CLONE_NEW_ANY = 0x7E020080  # every namespace flag
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
# F_DUPFD to F_SETLKW, F_OFD_GETLK to F_OFD_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ; not F_SETOWN, which sends signals.
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
# Not even to itself: SIGKILL would look as if this machine had killed it, the others stop it until time is up.
UNCATCHABLE = (9, 19, 20, 21, 22)  # SIGKILL SIGSTOP SIGTSTP SIGTTIN SIGTTOU
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_LD, _JEQ, _JSET, _JGE, _RET = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH = 0, 4


def _arg(index: int) -> int:
    return 16 + 8 * index  # the low half; both architectures are little-endian


def _instruction(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jt, jf, k)


@lru_cache(maxsize=1)
def program(machine: str, pid: int, *, writes: bool) -> bytes:
    """The filter for one process.

    Args:
        machine: x86_64 or aarch64.
        pid: the process's id as it sees it itself: the only one that it may signal.
        writes: allow opening for writing and the calls that change files.

    Raises:
        KeyError: another machine.
    """
    arch = AUDIT_ARCH[machine]
    side = 0 if machine == "x86_64" else 1
    allow, deny = _instruction(_RET, _ALLOW), _instruction(_RET, _ERRNO | errno.EPERM)
    out = [
        _instruction(_LD, _ARCH),
        _instruction(_JEQ, arch, 1, 0),
        _instruction(_RET, _KILL),
        _instruction(_LD, _NR),
        _instruction(_JGE, X32_BIT, 0, 1),
        deny,
    ]

    def rule(number: int | None, *body: bytes) -> None:
        """If the call is `number`, run the body, which ends in a return; else go on."""
        if number is not None:
            out.extend([_instruction(_JEQ, number, 0, len(body)), *body])

    def one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
        steps = [_instruction(_LD, _arg(argument))]
        for value in values:
            steps += [_instruction(_JEQ, value, 0, 1), allow]
        return [*steps, deny]

    if not writes:
        for numbers, flags in ((OPEN["open"], 1), (OPEN["openat"], 2)):
            rule(numbers[side], _instruction(_LD, _arg(flags)), _instruction(_JSET, WRITE_FLAGS, 1, 0), allow, deny)
    rule(
        CLONE[side],
        _instruction(_LD, _arg(0)),
        _instruction(_JSET, CLONE_NEW_ANY, 2, 0),
        _instruction(_JSET, CLONE_THREAD, 0, 1),
        allow,
        deny,
    )
    rule(CLONE3[side], _instruction(_RET, _ERRNO | errno.ENOSYS))
    rule(IOCTL[side], *one_of(1, IOCTLS))
    rule(FCNTL[side], *one_of(1, FCNTLS))
    rule(PRLIMIT[side], *one_of(0, (0, pid)))
    rule(PRCTL[side], *one_of(0, (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)))
    for numbers, signal_argument in ((KILL, 1), (TGKILL, 2)):
        refused = [s for n in UNCATCHABLE for s in (_instruction(_JEQ, n, 0, 1), deny)]
        itself = [_instruction(_LD, _arg(0)), _instruction(_JEQ, pid, 1, 0), deny]
        rule(numbers[side], *itself, _instruction(_LD, _arg(signal_argument)), *refused, allow)
    plain = PLAIN | (WRITING | OPEN if writes else {})
    allowed = {numbers[side] for numbers in plain.values()}
    edges = [n for n in range(1024) if n == 0 or (n in allowed) != (n - 1 in allowed)]
    return b"".join(out + _search([(n, allow if n in allowed else deny) for n in edges]))


def _search(ranges: list[tuple[int, bytes]]) -> list[bytes]:
    """A binary search among ranges of numbers: the first of each, and what to return for it. When a filter is installed
    the kernel runs it for every number, so that a plain list would cost each execution more."""
    if len(ranges) == 1:
        return [ranges[0][1]]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    return [_instruction(_JGE, ranges[middle][0], len(below), 0), *below, *above]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(libc: ctypes.PyDLL, filter_: bytes) -> None:
    """Put the calling process, which must have no_new_privs, under a filter for good.

    Raises:
        OSError: the kernel refuses.
    """
    buffer = ctypes.create_string_buffer(filter_, len(filter_))

    described = _Program(len(filter_) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    pr_set_seccomp, mode_filter = 22, 2
    if libc.prctl(pr_set_seccomp, mode_filter, ctypes.byref(described), 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, "prctl(PR_SET_SECCOMP): " + os.strerror(code))


def supported() -> bool:
    """Whether there is a table for this machine."""
    return platform.machine() in AUDIT_ARCH
