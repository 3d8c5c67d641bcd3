"""Landlock: take all rights to the file system from a process except reading some folders (level 2).

Asks for ABI 6 (Linux 6.12), the first that also keeps signals and abstract sockets inside. Numbers:
include/uapi/linux/landlock.h; the system calls have the same numbers on every architecture.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from align.core.sandbox.inside import Refused

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
_ALL_FS, _ALL_NET, _ALL_SCOPES = (1 << 16) - 1, 3, 3
ABI = 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi(libc: ctypes.PyDLL) -> int:
    """The kernel's version of Landlock; negative where it has none."""
    return int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG)))


def restrict(
    libc: ctypes.PyDLL, readable: Sequence[str], writable: Sequence[str] = (), *, execute: bool = False
) -> None:
    """Leave the calling process the right to read the given folders and files (and to execute what lies there), all
    rights to those that are `writable`, and no other right to any file."""

    def attempt(step: str, result: int) -> int:
        if result < 0:
            raise Refused(step, ctypes.get_errno())
        return result

    attributes = _Ruleset(_ALL_FS, _ALL_NET, _ALL_SCOPES)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = attempt("landlock_create_ruleset", libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0))
    for path in (*readable, *writable):
        folder = os.open(path, os.O_PATH)
        if path.startswith("/dev/"):
            rights = _READ_FILE | (_WRITE_FILE if path in writable else 0)
        elif path in writable:
            rights = _ALL_FS
        else:
            rights = _READ_FILE | _READ_DIR | (_EXECUTE if execute else 0)
        rule = _Beneath(rights, folder)
        attempt(
            f"landlock_add_rule({path})",
            libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0),
        )
        os.close(folder)
    attempt("landlock_restrict_self", libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
