"""Level 3: the zygote is started by bubblewrap (`bwrap`), which makes the namespaces and the root folder for it.

This serves where this process may not make namespaces of its own and that program may: it is setuid root on some
systems, and has a profile of its own on others. The command needs no more of it than Debian 11's version 0.4 has.
"""

from __future__ import annotations

import errno
import os
import shutil
import sysconfig
from pathlib import Path

from align.core.sandbox.inside import Refused

UID = "65534"


def command(python: str, arguments: list[str]) -> list[str]:
    """The command line that starts the interpreter in a root folder which shows, read-only, the interpreter with its
    library, the system's shared libraries, the sandbox's own code for the inside, and three devices.

    Args:
        python: the interpreter.
        arguments: what it is given.

    Raises:
        Refused: there is no `bwrap`.
    """
    from align.core.sandbox.inside.isolation import library_folders, site_folders

    program = shutil.which("bwrap")
    if program is None:
        raise Refused("bubblewrap (no program `bwrap` on the PATH)", errno.ENOENT)
    python = os.path.realpath(python)
    folders = library_folders((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")))
    shown = [*folders, python, *_shared_interpreter(), str(Path(__file__).parent / "inside")]
    words = ["--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
    if os.geteuid() == 0:  # the interpreter may lie where only root can go; the zygote then changes the user id
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--uid", UID, "--gid", UID]
    for path in shown:
        for parent in reversed(Path(path).parents[:-1]):
            words += ["--dir", str(parent)]  # else bubblewrap makes it for its owner alone where the source is so
        words += ["--ro-bind", path, path]
    for folder in (d for path in folders for d in site_folders(path)):
        words += ["--tmpfs", folder, "--remount-ro", folder]
    words += ["--dir", "/dev"]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        words += ["--dev-bind", device, device]
    return [program, *words, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/", "--", python, *arguments]


def _shared_interpreter() -> list[str]:
    """The interpreter's shared library, where it has one that lies outside the system's folders."""
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), str(sysconfig.get_config_var("LIBDIR") or "")]
    found = (Path(folder) / name for folder in folders if folder and ".so" in name)
    return [str(path) for path in found if path.is_file()][:1]
