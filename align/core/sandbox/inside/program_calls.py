"""The system calls that compilers, runtimes and their programs may make: an allow-list, wider than a solution's.

They may execute files (there are only the toolchain's, the system's libraries and what was compiled), signal what they
see (their own process namespace) and make threads; compilers may start processes, programs may not. Memory that is
shared without a file is refused, since no limit of a process counts it. As for a solution there is no socket (but for
pairs of connected ones, without which Java does not start), ptrace, mount, namespace, bpf, io_uring, keyring, memfd or
System V memory.

This is for level 4 only, where namespaces hold what the list does not.
"""

from __future__ import annotations

import errno
from functools import lru_cache

from align.core.sandbox.inside import seccomp
from align.core.sandbox.inside.seccomp import _JEQ, _JGE, _JSET, _LD, _RET, _arg, _instruction

MORE: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221), "arch_prctl": (158, None), "wait4": (61, 260), "waitid": (247, 95), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "membarrier": (324, 283), "link": (86, None), "linkat": (265, 37), "fchdir": (81, 50), "creat": (85, None),
    "setpgid": (109, 154),
    "setsid": (112, 157), "sched_setaffinity": (203, 122), "timer_create": (222, 107), "timer_settime": (223, 110),
    "timer_gettime": (224, 108), "timer_delete": (226, 111), "sync_file_range": (277, 84), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None),
}  # fmt: skip
FORKS: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
MMAP, SOCKETPAIR = (9, 222), (53, 199)

_AF_UNIX = 1
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20


@lru_cache(maxsize=2)
def program(machine: str, *, forks: bool) -> bytes:
    """The filter.

    Args:
        machine: x86_64 or aarch64.
        forks: processes may be started, not only threads.

    Raises:
        KeyError: another machine.
    """
    side = 0 if machine == "x86_64" else 1
    allow, deny = _instruction(_RET, seccomp._ALLOW), _instruction(_RET, seccomp._ERRNO | errno.EPERM)
    out = [
        _instruction(_LD, seccomp._ARCH),
        _instruction(_JEQ, seccomp.AUDIT_ARCH[machine], 1, 0),
        _instruction(_RET, seccomp._KILL),
        _instruction(_LD, seccomp._NR),
        _instruction(_JGE, seccomp.X32_BIT, 0, 1),
        deny,
    ]

    def rule(numbers: tuple[int, int], *body: bytes) -> None:
        out.extend([_instruction(_JEQ, numbers[side], 0, len(body)), *body])

    def one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
        steps = [_instruction(_LD, _arg(argument))]
        for value in values:
            steps += [_instruction(_JEQ, value, 0, 1), allow]
        return [*steps, deny]

    flags = [_instruction(_LD, _arg(0)), _instruction(_JSET, seccomp.CLONE_NEW_ANY, 0, 1), deny]
    rule(seccomp.CLONE, *flags, *([] if forks else [_instruction(_JSET, seccomp.CLONE_THREAD, 1, 0), deny]), allow)
    rule(seccomp.CLONE3, _instruction(_RET, seccomp._ERRNO | errno.ENOSYS))
    shared = [_instruction(_JSET, _MAP_ANONYMOUS, 0, 2), _instruction(_JSET, _MAP_SHARED, 0, 1), deny]
    rule(MMAP, _instruction(_LD, _arg(3)), *shared, allow)
    rule(SOCKETPAIR, *one_of(0, (_AF_UNIX,)))
    rule(seccomp.IOCTL, *one_of(1, seccomp.IOCTLS))
    rule(seccomp.FCNTL, *one_of(1, seccomp.FCNTLS))
    rule(seccomp.PRCTL, *one_of(0, (seccomp.PR_SET_NAME, seccomp.PR_GET_NAME, seccomp.PR_SET_VMA)))
    plain = seccomp.PLAIN | seccomp.WRITING | seccomp.OPEN | MORE | (FORKS if forks else {})
    allowed = {numbers[side] for numbers in plain.values()}
    edges = [n for n in range(1024) if n == 0 or (n in allowed) != (n - 1 in allowed)]
    return b"".join(out + seccomp._search([(n, allow if n in allowed else deny) for n in edges]))
