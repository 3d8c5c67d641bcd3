"""Namespaces, mounts, limits and privileges, by system calls through ctypes.

`enter` is called once by a zygote; `confine` by each of its children, before the child reads what it is to run. Levels
are those of `align.core.sandbox`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from align.core.sandbox.inside import Refused, landlock, seccomp

SCRATCH_BYTES, SCRATCH_FILES, DESCRIPTORS, THREADS = 16 << 20, 4096, 64, 64
NOBODY = 65534

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 32, 4096, 16384
_MS_PRIVATE = 1 << 18
_ST_TO_MS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


libc = ctypes.PyDLL(None, use_errno=True) if os.name == "posix" else None


def _try(step: str, result: int) -> int:
    if result == -1:
        raise Refused(step, ctypes.get_errno())
    return result


def _mount(step: str, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    assert libc is not None
    words = [w.encode() if w is not None else None for w in (source, target, kind, data)]
    _try(step, libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def enter(level: int, shown: Sequence[str] = ()) -> None:
    """Take the calling process, which has one thread, to where its children can be confined.

    At level 4 it ends as process 1 of its own namespaces, in a root that holds the interpreter's library, read-only,
    and as a user whom nobody else is. The calling process stays outside as its parent and ends with it.

    Args:
        level: of isolation.
        shown: at level 4, what the root holds in place of the interpreter's library; with an empty folder `/build`.

    Raises:
        Refused: the step and its errno.
    """
    if sys.platform != "linux":
        if level:
            raise Refused("the kernel is Linux", errno.ENOSYS)
        return
    assert libc is not None
    if level >= 1 and not seccomp.supported():
        raise Refused(f"a system call table for {platform.machine()}", errno.ENOSYS)
    if level == 2:
        found = landlock.abi(libc)
        if found < landlock.ABI:
            raise Refused(f"Landlock ABI {landlock.ABI} (this kernel has {max(found, 0)})", errno.ENOSYS)
    if level == 1 and os.geteuid() != 0:
        raise Refused("another user's id (this process is not root)", errno.EPERM)
    if level == 3 and os.geteuid() == 0:  # bubblewrap has made the namespaces
        _become_nobody(libc)
    if level == 4:
        _enter_namespaces(libc, shown)
        seccomp.program(platform.machine(), 1, writes=True)  # each child is process 1 of its own: made once, for all
    library_folders(tuple(sys.path))


def _enter_namespaces(libc: ctypes.PyDLL, shown: Sequence[str]) -> None:
    try:
        own = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Refused("open /proc/self", error.errno or 0) from None
    was_root = os.geteuid() == 0
    if was_root:  # the interpreter may lie where only root can go, so the mounts come before the change of user
        _try("unshare(mount) as root", libc.unshare(_NEWNS))
        _build_root(libc, shown)
        _become_nobody(libc)
    uid, gid = os.getuid(), os.getgid()
    others = _NEWNS | _NEWPID | _NEWIPC | _NEWNET | _NEWUTS | _NEWCGROUP
    _try("unshare(user, mount, pid, ipc, net, uts, cgroup)", libc.unshare(_NEWUSER | others))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        try:
            descriptor = os.open(name, os.O_WRONLY, dir_fd=own)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Refused(f"write /proc/self/{name}", error.errno or 0) from None
    os.close(own)
    if not was_root:
        _build_root(libc, shown)
    child = os.fork()
    if child:
        os.closerange(0, 1024)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _become_nobody(libc: ctypes.PyDLL) -> None:
    """From root to a user id that no account has, so that nothing on the machine is ours."""
    number = int.from_bytes(os.urandom(4))
    for uid in (1_900_000_000 + number % 1_000_000, 60_000 + number % 5_000, NOBODY):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            code = error.errno or 0
            continue
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map stays root's
        return
    raise Refused("change to an unused user id", code)


def _build_root(libc: ctypes.PyDLL, shown: Sequence[str]) -> None:
    """A new root in memory: the interpreter's library and the system's shared libraries read-only, three devices; or
    what is to be shown."""
    _mount("make / private", "none", "/", None, _MS_REC | _MS_PRIVATE)
    base = next((d for d in ("/tmp", "/run", "/mnt", "/var") if Path(d).is_dir()), None)
    if base is None:
        raise Refused("find a folder to mount on", errno.ENOENT)
    own = ["/tmp", "/build"] if shown else ["/tmp"]
    shown = shown or [*library_folders(tuple(sys.path)), "/dev/null", "/dev/zero", "/dev/urandom"]
    # the new root hides `base`: what lies below it must be held open to be bound
    held = {path: os.open(path, os.O_PATH) for path in shown if Path(path).exists()}
    covered = [d for path in held for d in site_folders(path)]
    _mount("mount a tmpfs", "tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.chdir(base)
    for path, descriptor in held.items():
        target = Path(base + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _mount(f"bind {path}", f"/proc/self/fd/{descriptor}", str(target), None, _MS_BIND | _MS_REC)
        flags = sum(ms for st, ms in _ST_TO_MS.items() if os.statvfs(target).f_flag & st)
        if not path.startswith("/dev/"):
            flags |= _MS_NODEV | _MS_NOSUID
        _mount(f"make {path} read-only", "none", str(target), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)
        os.close(descriptor)
    for folder in covered:
        _mount(f"cover {folder}", "tmpfs", base + folder, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k")
    for name in own:
        Path(base + name).mkdir(exist_ok=True)
    number = _SYS_PIVOT_ROOT[platform.machine()]
    _try("pivot_root", libc.syscall(number, b".", b"."))
    _try("detach the old root", libc.umount2(b".", 2))
    os.chdir("/")
    _mount(
        "make the new root read-only", "none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    )


@lru_cache(maxsize=1)
def library_folders(paths: tuple[str, ...]) -> list[str]:
    """Those of the paths, of an interpreter's own library, that are folders; and the system's shared libraries'."""
    own = [p for p in paths if Path(p).is_dir()]
    folders = [str(Path(p).resolve()) for p in own] + [p for p in own if Path(p).resolve() != Path(p)]
    return outermost([*folders, *system_folders()])


def system_folders() -> list[str]:
    """The folders of the system's shared libraries."""
    triple = getattr(sys.implementation, "_multiarch", "") or "none"
    return [p for p in (f"/lib/{triple}", f"/usr/lib/{triple}", "/lib64", "/usr/lib64") if Path(p).is_dir()]


def outermost(folders: Iterable[str]) -> list[str]:
    """The folders without those that lie in another of them."""
    kept: list[str] = []
    for folder in sorted(set(folders), key=len):
        if not any(folder == k or folder.startswith(k + "/") for k in kept):
            kept.append(folder)
    return kept


def site_folders(path: str) -> list[str]:
    """The folders of installed packages in a library folder."""
    return [str(d) for name in ("site-packages", "dist-packages") if (d := Path(path) / name).is_dir()]


def fork(level: int) -> int:
    """`os.fork`, at level 4 into a pid and a mount namespace of the child's own."""
    if level < 4:
        return os.fork()
    assert libc is not None
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    number = _SYS_CLONE[platform.machine()]
    pid: int = libc.syscall(number, ctypes.c_ulong(_NEWPID | _NEWNS | signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0
    code = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, "clone: " + os.strerror(code))
    return pid


def confine(level: int, cpu_s: float, address_space: int) -> None:
    """The last steps of a child: scratch folder, session, limits, privileges, system calls.

    Args:
        level: of isolation.
        cpu_s: CPU seconds after which the kernel kills it.
        address_space: bytes.

    Raises:
        Refused: the step and its errno.
    """
    os.setsid()
    if level == 4:
        options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700"
        _mount("mount the scratch folder", "tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
        os.chdir("/tmp")
    elif level >= 1:
        os.chdir("/")
    own_count = level >= 3 and tuple(int(x) for x in os.uname().release.split(".")[:2] if x.isdigit()) >= (5, 14)
    seconds = max(1, -int(-cpu_s // 1)) * (2 if sys.platform == "linux" else 1)  # the zygote looks first, on Linux
    for what, wanted in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_AS, address_space),
        *([(resource.RLIMIT_NPROC, THREADS)] if own_count else []),
    ):
        _limit(what, wanted)
    if sys.platform != "linux" or level == 0:
        return
    assert libc is not None
    # A core that goes to a program (systemd-coredump, apport) is not bound by RLIMIT_CORE: it would stay behind.
    _try("make undumpable", libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _try("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if level == 1:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise Refused("change to the user nobody", error.errno or 0) from None
    if level == 3 and landlock.abi(libc) >= landlock.ABI:
        landlock.restrict(libc, ["/"])
    elif level == 2:
        landlock.restrict(libc, [*library_folders(tuple(sys.path)), "/dev/null", "/dev/urandom"])
    elif level == 4 and landlock.abi(libc) >= landlock.ABI:
        landlock.restrict(libc, ["/"], ["/tmp"])
    _drop_capabilities(libc)
    try:
        seccomp.install(libc, seccomp.program(platform.machine(), os.getpid(), writes=level == 4))
    except OSError as error:
        raise Refused("seccomp filter", error.errno or 0) from None


def _limit(what: int, wanted: int) -> None:
    _, hard = resource.getrlimit(what)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    set_limit: Callable[[int, tuple[int, int]], None] = resource.setrlimit
    try:
        set_limit(what, (value, value))
    except (OSError, ValueError) as error:
        if sys.platform == "linux":  # macOS refuses some of them
            raise Refused(f"setrlimit({what})", getattr(error, "errno", None) or errno.EINVAL) from None


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_Capabilities = ctypes.c_uint32 * 6


def _drop_capabilities(libc: ctypes.PyDLL) -> None:
    header = _Header(0x20080522, 0)
    nothing = _Capabilities()
    _try("drop all capabilities", libc.capset(ctypes.byref(header), nothing))


def memory_in_use() -> int:
    """The calling process's address space in bytes, rounded up; a guess where it can't be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        if sys.platform != "linux":
            return 512 << 20
    # No /proc: the smallest limit under which one more page can be had.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 1 << 40
    while high - low > 1 << 20:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, resource.getpagesize()).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high
