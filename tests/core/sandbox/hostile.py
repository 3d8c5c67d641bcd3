"""Programs that attack the sandbox or its verdicts; a table for `test_hostile`.

The task is `f(x) == x * x`, or to print the square of the number on standard input. A program that attacks the machine
gives the right answer if, and only if, its attack succeeds, so that a verdict `passed` betrays it. `CANARY`, `PORT`,
`PID` and `SOCKET` stand for a file of the user's, a listening port, another process and an abstract socket.
"""

# ruff: noqa: E501

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

MARK = "align-hostile"
"""In the name of every file that a program tries to make outside its scratch folder, or inside it."""

LITERAL: dict[str, Any] = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}
GENERAL: dict[str, Any] = {"tests": ["y = f(2)\nassert y == 4 and f(3) == 9", "assert abs(f(4) - 16.0) < 1e-6"]}
CHECK: dict[str, Any] = {
    "check": "def check(candidate):\n    for x in range(2, 5):\n        assert candidate(x) == x * x\n",
    "entry_point": "f",
}
IO: dict[str, Any] = {"io": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "4\n", "stdout": "16\n"}]}
WAYS = {"literal": LITERAL, "general": GENERAL, "check": CHECK, "io": IO}
HONEST = "def f(x): return x * x"
HONEST_PROGRAM = "print(int(input()) ** 2)"


@dataclass(frozen=True)
class Hostile:
    """One program.

    Attributes:
        category, name: for a person.
        code: its source.
        ways: how it is tested, keys of `WAYS`.
        reference: its own tests instead.
    """

    category: str
    name: str
    code: str
    ways: tuple[str, ...] = ("literal",)
    reference: dict[str, Any] | None = None


ALL = ("literal", "general", "check")
RAW = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def if_done(body: str) -> str:
    """A program that is right if this body, of a function, gives something true."""
    return (
        "import os, sys\ndef attack():\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\ntry:\n    won = attack()\nexcept BaseException:\n    won = False\ndef f(x): return x * x if won else 0\n"
    )


def if_all_done(body: str) -> str:
    """The same as a program that reads and prints."""
    return if_done(body) + "print(f(int(input())))\n"


def system_call(number: int, *arguments: str) -> str:
    """Succeeds if this system call (of x86_64) does."""
    return if_done(f"{RAW}return libc.syscall({', '.join([str(number), *arguments])}) >= 0")


_TIME = {
    "loop of 10**10": "def f(x):\n    for _ in range(10**10): pass\n    return 0",
    "loop that catches everything": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "loop in C with no interruption": "import collections, itertools\ndef f(x): collections.deque(itertools.repeat(0), maxlen=0)",
    "catastrophic pattern": "import re\ndef f(x): return len(re.findall(r'(a+)+$', 'a' * 60 + 'b'))",
    "power tower": "def f(x): return 9 ** 9 ** 9",
    "digits of a huge integer": "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return len(str(3 ** 10**7))",
    "sum of a long range": "def f(x): return sum(range(10**12))",
    "exponential recursion": "def f(x): return g(60)\ndef g(n): return n if n < 2 else g(n - 1) + g(n - 2)",
    "sleep": "import time\ntime.sleep(10**6)",
    "deadlock": "import threading\nlock = threading.Lock()\nlock.acquire()\ndef f(x): lock.acquire()",
    "waits for a thread that waits": "import threading\ndef f(x):\n    t = threading.Thread(target=threading.Event().wait)\n    t.start()\n    t.join()",
    "ignores the signal of the CPU limit": "import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "loop in a finaliser": "class A:\n    def __del__(self):\n        while True: pass\ndef f(x):\n    A()\n    return 0",
    "hash function without end": "import hashlib\ndef f(x): return hashlib.pbkdf2_hmac('sha512', b'', b'', 10**9)[0]",
    "spins in threads": "import threading\ndef spin():\n    while True: pass\nfor _ in range(8): threading.Thread(target=spin).start()\ndef f(x): return 0",
    "timer storm": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\nwhile True: pass",
    "reads a pipe that nobody writes": "import os\ndef f(x): return os.read(os.pipe()[0], 1)",
}  # fmt: skip
_TIME_GENERAL = {
    "answers a range without end": "def f(x): return range(10**18)",
    "an iterator without end": "class A:\n    def __iter__(self):\n        while True: yield 4\ndef f(x): return A()",
    "loop in a comparison": "class A:\n    def __eq__(self, o):\n        while True: pass\n    __rsub__ = __sub__ = __eq__\ndef f(x): return A()",
}  # fmt: skip

_MEMORY = {
    "a string of 100 GB": "def f(x): return len('x' * 10**11)",
    "a list that grows": "def f(x):\n    a = [0]\n    while True: a += a",
    "many small objects": "def f(x): return [object() for _ in range(10**8)]",
    "shifts by 10**12": "def f(x): return 1 << 10**12",
    "maps memory": "import mmap\ndef f(x): return [mmap.mmap(-1, 1 << 30).write(b'x') for _ in range(64)]",
    "memory of C": "import ctypes\ndef f(x):\n    libc = ctypes.CDLL(None)\n    libc.malloc.restype = ctypes.c_void_p\n    n = 0\n    while True:\n        p = libc.malloc(1 << 24)\n        if not p: return n\n        ctypes.memset(p, 1, 1 << 24); n += 1",
    "a bomb of zeros": "import zlib\ndef f(x):\n    d = zlib.decompressobj()\n    return sum(len(d.decompress(zlib.compress(bytes(1 << 27)) * 99)) for _ in range(9))",
    "stacks of threads": "import threading, time\nthreading.stack_size(1 << 28)\ndef f(x): return [threading.Thread(target=time.sleep, args=(99,)).start() for _ in range(999)]",
    "recursion without end": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "recursion through C": "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr([self])\ndef f(x): return repr(A())",
    "an answer of 60 MB": "def f(x): return 'x' * 60_000_000",
    "an answer nested without end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "an exception of 100 MB": "def f(x): raise ValueError('x' * 10**8)",
    "colliding keys": "def f(x): return {i * ((1 << 61) - 1) for i in range(30_000)}",
}  # fmt: skip

_FILES = {
    "reads a file of the user": if_done("return open('CANARY').read()"),
    "reads it without Python": if_done(RAW + "return libc.open(b'CANARY', 0) >= 0"),
    "reads it by openat2": if_done(RAW + "return libc.syscall(437, -100, b'CANARY', (ctypes.c_uint64 * 3)(), 24) >= 0"),
    "reads it by way of the root": if_done("os.chdir('/'); return open('../../../../CANARY').read()"),
    "reads it through a link": if_done("os.symlink('CANARY', 'align-hostile-link'); return open('align-hostile-link').read()"),
    "links it": if_done("os.link('CANARY', 'align-hostile-link'); return True"),
    "writes to it": if_done("open('CANARY', 'a').write('x'); return True"),
    "empties it": if_done("os.truncate('CANARY', 0); return True"),
    "removes it": if_done("os.remove('CANARY'); return True"),
    "renames it": if_done("os.rename('CANARY', 'CANARY-align-hostile'); return True"),
    "changes its mode": if_done("os.chmod('CANARY', 0); return True"),
    "touches it": if_done("os.utime('CANARY'); return True"),
    "lists the folder of the user": if_done("return os.listdir(os.path.dirname('CANARY'))"),
    "looks for the tests": if_done(
        "import glob\nreturn [p for p in glob.glob('/**/*.jsonl', recursive=True) + glob.glob('/home/*/*') + glob.glob('/root/*/*.py')]"
    ),
    "reads accounts": if_done("return open('/etc/passwd').read() or open('/etc/shadow').read()"),
    "reads the environment of a process": if_done("return open('/proc/self/environ').read() + open('/proc/1/environ').read()"),
    "reads the memory of its parent": if_done("return open(f'/proc/{os.getppid()}/mem', 'rb').read(1) or open('/proc/self/maps').read()"),
    "reaches a root by a descriptor": if_done("return os.open('/proc/self/root', os.O_RDONLY) >= 0 or os.open('/proc/1/cwd', os.O_RDONLY) >= 0"),
    "reaches an old root": if_done("return [os.listdir(p) for p in ('../etc', '../../etc', '/../etc', '/old_root/etc', '/.pivot_root/etc', '/mnt') if os.path.exists(p)]"),
    "writes to the library": if_done("import json\nopen(json.__file__, 'a').write('#'); return True"),
    "leaves a module that is loaded at start": if_done(
        "import sysconfig\nfor name in ('sitecustomize.py', 'usercustomize.py', 'align-hostile.pth'):\n"
        "    for folder in [*sys.path, sysconfig.get_path('purelib'), '/tmp', '/']:\n"
        "        try: open(os.path.join(folder, name), 'w').write('import os; os._exit(0)')\n"
        "        except OSError: pass\n"
        "        else: won = folder != '/tmp' and os.path.exists(os.path.join(folder, name))\nreturn won"
    ),
    "writes beside the program": if_done("open('/align-hostile', 'w').write('x'); return True"),
    "writes to shared memory": if_done("open('/dev/shm/align-hostile', 'w').write('x'); return True"),
    "makes a shared memory segment": if_done("from multiprocessing import shared_memory\nshared_memory.SharedMemory('align-hostile', True, 100); return True"),
    "makes old shared memory": system_call(29, "0x5678", "100", "0o1666"),
    "makes a queue for messages": system_call(240, "b'align-hostile'", "0o102", "0o666", "None"),
    "makes a file in memory": if_done("return os.memfd_create('align-hostile') >= 0"),
    "removes the temporary files": if_done(
        "import shutil\nfor folder in ('/tmp', '/var/tmp', '/dev/shm', '/run'): shutil.rmtree(folder, ignore_errors=True)\nreturn os.path.exists('/run') and not os.listdir('/run')"
    ),
    "removes everything": if_done(
        "n = 0\nfor folder, _, names in os.walk('/', topdown=False):\n"
        "    for name in names:\n        try: os.remove(os.path.join(folder, name)); n += 1\n        except OSError: pass\nreturn n"
    ),
    "replaces a device": if_done("os.rename('/dev/null', '/dev/align-hostile'); open('/dev/null', 'w').close(); return True"),
    "removes a device": if_done("os.remove('/dev/null'); return True"),
    "closes a device to others": if_done("os.chmod('/dev/null', 0); return True"),
    "closes its inherited files to others": if_done(
        "done = 0\nfor fd in range(3):\n    try: os.fchmod(fd, 0); done += 1\n    except OSError: pass\n    try: os.utime(fd); done += 1\n    except OSError: pass\nreturn done"
    ),
    "makes a device": if_done("os.mknod('align-hostile-device', 0o60666, os.makedev(254, 0)); return True"),
    "makes a pipe with a name": if_done("os.mkfifo('align-hostile-pipe'); return True"),
    "opens devices": if_done("return [os.open(p, os.O_RDWR) for p in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/kvm', '/dev/fuse', '/dev/tty') if os.path.exists(p)]"),
    "mounts": if_done(RAW + "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or libc.mount(b'/', b'/tmp', None, 4096, None) == 0"),
    "makes its root writable": if_done(RAW + "return libc.mount(None, b'/', None, 32 | 4096, None) == 0"),
    "unmounts": if_done(RAW + "return any(libc.umount2(p, 2) == 0 for p in (b'/', b'/tmp', b'/dev/null', b'/lib64'))"),
    "changes its root": if_done("os.mkdir('align-hostile-root'); os.chroot('align-hostile-root'); return True"),
    "opens by handle": system_call(304, "3", "(ctypes.c_char * 256)()", "0"),
    "more than the scratch folder holds": if_done(
        "n = 0\ntry:\n    for i in range(64):\n        with open(f'align-hostile-{i}', 'wb') as file: n += file.write(bytes(1 << 20))\nexcept OSError: pass\nreturn n > 17 << 20"
    ),
    "a file without end": if_done("with open('align-hostile', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"),
    "a sparse file": if_done("with open('align-hostile', 'wb') as file: file.truncate(1 << 50)\nreturn True"),
    "more files than there may be": if_done(
        "n = 0\ntry:\n    for i in range(6000): open(f'align-hostile-{i}', 'w').close(); n += 1\nexcept OSError: pass\nreturn n > 4100"
    ),
    "folders nested without end": if_done("while True: os.mkdir('align-hostile'); os.chdir('align-hostile')"),
    "more descriptors than there may be": if_done("kept = []\ntry:\n    while len(kept) < 999: kept.append(os.dup(1))\nexcept OSError: pass\nreturn len(kept) > 64"),
    "imports our own code": if_done("import align, reward.code_tests\nreturn True"),
    "imports installed packages": if_done("import torch, numpy, yaml\nreturn True"),
}  # fmt: skip

_PROCESSES = {
    "forks": if_done("return os.fork() >= 0"),
    "forks by a system call": if_done(RAW + "return libc.syscall(57) >= 0 or libc.syscall(58) >= 0"),
    "clones without threads": system_call(56, "17", "0", "0", "0", "0"),
    "clones into new namespaces": system_call(56, "0x10000000 | 0x20000 | 17", "0", "0", "0", "0"),
    "clones the new way": system_call(435, "(ctypes.c_uint64 * 11)(0x100, 0, 0, 0, 17)", "88"),
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "leaves a daemon": if_done("if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(60)\n    os._exit(0)\nreturn True"),
    "executes": if_done("os.execv(sys.executable, ['python', '-c', 'print(9)'])"),
    "executes from memory": system_call(322, "0", "b''", "None", "None", "0x1000"),
    "starts a shell": if_done("return os.system('true') == 0"),
    "spawns": if_done("return os.posix_spawn('/bin/true', ['true'], {})"),
    "starts a pool": if_done("import multiprocessing\nwith multiprocessing.Pool(2) as pool: return pool.map(abs, [1])"),
    "kills another process": if_done("os.kill(PID, 9); return True"),
    "kills its parent": if_done("os.kill(os.getppid(), 9); return True"),
    "kills its group": if_done("os.killpg(0, 9); return True"),
    "kills all": if_done("os.kill(-1, 9); return True"),
    "kills by a descriptor": if_done("import signal\nsignal.pidfd_send_signal(os.pidfd_open(PID), 9); return True"),
    "kills a thread of another process": system_call(234, "PID", "PID", "9"),
    "queues a signal": system_call(129, "PID", "9", "(ctypes.c_char * 128)()"),
    "has a descriptor send signals": if_done("import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, PID); return True"),
    "kills itself": if_done("os.kill(os.getpid(), 9)"),
    "stops itself": if_done("os.kill(os.getpid(), 19)"),
    "traces another process": system_call(101, "16", "PID", "0", "0"),
    "is traced": system_call(101, "0", "0", "0", "0"),
    "reads another process's memory": system_call(310, "PID", "None", "0", "None", "0", "0"),
    "new user namespace": system_call(272, "0x10000000"),
    "another's namespace": system_call(308, "3", "0"),
    "becomes root": if_done("os.setresuid(0, 0, 0); os.setgroups([0]); return os.getuid() == 0"),
    "takes capabilities": if_done(RAW + "return libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)) == 0"),
    "raises its limits": if_done(
        "import resource\ndone = 0\nfor what in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):\n"
        "    try: resource.setrlimit(what, (-1, -1)); done += 1\n    except (OSError, ValueError): pass\nreturn done"
    ),
    "changes the limits of others": if_done("import resource\nresource.prlimit(PID, resource.RLIMIT_CPU, (1, 1)); return True"),
    "first in the queue": if_done("os.setpriority(os.PRIO_PROCESS, 0, -20); os.sched_setaffinity(0, {0}); return True"),
    "keys of the kernel": system_call(248, "b'user'", "b'align-hostile'", "b'x'", "1", "-3"),
    "a program for the kernel": system_call(321, "5", "(ctypes.c_char * 128)()", "128"),
    "rings for the kernel": system_call(425, "8", "(ctypes.c_char * 128)()"),
    "faults handled by the user": system_call(323, "1"),
    "counters of the processor": system_call(298, "(ctypes.c_char * 128)()", "0", "-1", "-1", "0"),
    "its own filter": if_done(RAW + "return libc.prctl(22, 1, 0, 0, 0) == 0 or libc.syscall(317, 0, 0, 0) == 0"),
    "can be dumped and inspected": if_done(RAW + "return libc.prctl(0x59616d61, PID, 0, 0, 0) == 0"),
    "more threads than there may be": if_done(
        "import threading, time\nthreading.stack_size(1 << 16)\nn = 0\ntry:\n    while n < 2000: threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\nexcept RuntimeError: pass\nreturn n > 64"
    ),
    "a thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()\ndef f(x): return 0",
    "another name for the machine": if_done("import socket\nsocket.sethostname('align-hostile'); return True"),
    "another time for the machine": if_done("import time\ntime.clock_settime(time.CLOCK_REALTIME, 0); return True"),
    "calls of another architecture": if_done(
        RAW
        + "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n"
        "return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0"
    ),
    "calls with a high number": system_call(0x40000000 + 39),
}  # fmt: skip

_NETWORK = {
    "connects to this machine": if_done("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1); return True"),
    "sends a datagram": if_done("import socket\nreturn socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))"),
    "asks for a name": if_done("import socket\nreturn socket.getaddrinfo('localhost', 80)"),
    "listens": if_done("import socket\ns = socket.socket(); s.bind(('', 0)); s.listen(); return True"),
    "over IPv6": if_done("import socket\nreturn socket.socket(socket.AF_INET6).connect_ex(('::1', PORT)) == 0"),
    "an abstract socket": if_done("import socket\ns = socket.socket(socket.AF_UNIX); s.connect('\\0SOCKET'); return True"),
    "a socket with a name": if_done("import socket\ns = socket.socket(socket.AF_UNIX); s.bind('align-hostile-socket'); return True"),
    "a pair of sockets": if_done("import socket\nreturn socket.socketpair()"),
    "a raw socket": if_done("import socket\nreturn socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    "a socket of the kernel": if_done("import socket\nreturn socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    "a socket of packets": if_done("import socket\nreturn socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)"),
    "a socket to the host": if_done("import socket\nreturn socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
    "a socket by a system call": if_done(RAW + "return libc.syscall(41, 2, 1, 0) >= 0 or libc.syscall(41, 1, 1, 0) >= 0"),
    "fetches a page": if_done("import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:PORT/', timeout=1).read()"),
    "connects with what it inherited": if_done(
        "import socket\nfor fd in range(16):\n    try:\n        s = socket.socket(fileno=os.dup(fd)); s.connect(('127.0.0.1', PORT)); return True\n    except (OSError, ValueError): pass\nreturn False"
    ),
}  # fmt: skip

_OUTPUT_PROGRAMS = {
    "flood of lines": "while True: print('9')",
    "flood without lines": "import os\nwhile True: os.write(1, b'9' * (1 << 20))",
    "flood of errors": "import sys\nwhile True: print('x' * 10**6, file=sys.stderr)",
    "right, then a flood": "print(int(input()) ** 2)\nwhile True: print()",
    "right, then more": "print(int(input()) ** 2)\nprint('x' * 10**6)",
    "right, then too much white space": "print(int(input()) ** 2)\nprint('\\n' * (100 << 20))",
    "to all descriptors": "import os\nfor fd in range(64):\n    try: os.write(fd, b'9\\n')\n    except OSError: pass",
    "closed, then right": "import sys\nsys.stdout.close()\nprint(int(input()) ** 2)",
    "bytes that are no text": "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe9\\n')",
    "escapes for a terminal": "print('\\x1b[2J\\x1b]0;passed\\x07\\x1b[1A9')",
    "to the input": "import os\nos.write(0, b'9\\n')\nos.truncate(0, 0)\nprint(9)",
    "to the terminal": "open('/dev/tty', 'w').write('9\\n')",
    "written over": "print('0\\r9')",
}  # fmt: skip
_OUTPUT = {
    "flood on standard output": "def f(x):\n    while True: print('x' * 10**6)",
    "flood to the broker": "import os\nwhile True: os.write(3, b'\\x02\\0\\0\\0{}' * 10000)",
    "a frame that never ends": "import os\nos.write(3, b'\\xff\\xff\\xff\\x7f')\nwhile True: os.write(3, b'x' * 65536)",
    "flood of warnings": "import warnings\nwarnings.simplefilter('always')\ndef f(x):\n    while True: warnings.warn('x' * 10**5)",
    "words of success": "def f(x):\n    for w in ('PASSED', 'ok', '1 passed in 0.01s', 'exit status 0', '{\"end\": 2}'): print(w, flush=True)\n    return 0",
    "escapes in an exception": "def f(x): raise ValueError('\\x1b[2J\\x1b]0;passed\\x07\\r\\n\\0')",
}  # fmt: skip

_ENCODINGS = {
    "cookie that hides code": "# -*- coding: utf-7 -*-\ndef f(x): return 0\n# +AAo-def f(x): return x * x",
    "cookie of letters turned": "# coding: rot13\nqrs s(k): erghea k * k",
    "cookie that does not exist": "# -*- coding: no-such-codec -*-\ndef f(x): return 0",
    "null bytes": "def f(x): return x * x\0",
    "half a character": "def f(x): return '\ud800'",
    "half a character in its name": "def f\udcff(x): return x * x",
    "half a character in an exception": "def f(x): raise ValueError('\\ud800\\udcff')",
    "two byte order marks": "\ufeff\ufeffdef f(x): return x * x",
    "another letter that looks alike": "def \u0192(x): return x * x",
    "a wide letter that means the same": "def \uff46(x): return 0",
    "text that runs the other way": "def f(x):\n    '''\u202e'''; return 0 #\u2066 return x * x",
    "an answer that looks like a number": "def f(x): return {2: '\u0664', 3: '\u0669'}.get(x)",
    "a digit of another script": "def f(x): return '\uff14'",
    "a very long line": "def f(x): return " + "0+" * 4000 + "0",
    "a very long name": "def f(x): return " + "a" * 100_000,
    "nested too deep to compile": "def f(x): return " + "(" * 3000 + "x * x" + ")" * 3000,
    "indented too deep": "".join(" " * i + "if 1:\n" for i in range(120)) + " " * 120 + "def f(x): return x * x",
    "a constant of a million digits": "def f(x): return " + "9" * 100_000,
    "ends in the middle": "def f(x): return x * x if x else '''",
    "fence without an end": "~~~" + "a" * 50_000 + "`",
    "tabs and spaces": "def f(x):\n\tif x:\n        return x * x",
    "old ends of lines": "def f(x): return 0\r# \rdef g(x): return x * x",
}  # fmt: skip
_ENCODING_PROGRAMS = {
    "half a character printed": "print('\\ud800')",
    "another encoding": "import sys\nsys.stdout.reconfigure(encoding='utf-16')\nprint(int(input()) ** 2)",
    "a number of another script": "print('\u0669' if input() == '3' else '\u0661\u0666')",
    "nothing but a mark": "print('\\ufeff9' if input() == '3' else '\\ufeff16')",
}  # fmt: skip

LOOT = """
import sys, gc
def loot():
    seen, frame = [], sys._getframe()
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for each in sys._current_frames().values(): seen += each.f_locals.values()
    return seen + gc.get_objects()
def tell(*messages):
    import json, os, struct
    for message in messages:
        data = json.dumps(message).encode()
        os.write(3, struct.pack('<I', len(data)) + data)
"""

_FORGERY = {
    "exits": "import sys\nsys.exit()",
    "exits in the call": "def f(x): raise SystemExit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits at once in the call": "import os\ndef f(x): os._exit(0)",
    "exits in a finaliser": "import os\nclass A:\n    def __del__(self): os._exit(0)\na = A()\ndef f(x):\n    global a\n    del a",
    "exits in a callback of a weak reference": "import os, weakref\nclass A: pass\na = A()\nw = weakref.ref(a, lambda _: os._exit(0))\ndef f(x):\n    global a\n    del a",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "exits in a signal": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\ndef f(x):\n    while True: pass",
    "exits in a thread": "import threading, os\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n    while True: pass",
    "aborts": "import os\ndef f(x): os.abort()",
    "crashes": "import ctypes\ndef f(x): return ctypes.string_at(1)",
    "crashes by code": "def f(x): return 0\nf.__code__ = f.__code__.replace(co_code=b'\\xff' * 64)",
    "crashes with a report": "import faulthandler\nfaulthandler.enable(all_threads=True)\ndef f(x): faulthandler._sigsegv()",
    "always equal": "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\ndef f(x): return A()",
    "equal to all and everything else": (
        "class A:\n    def __getattr__(self, name): return self\n    def __call__(self, *a, **k): return self\n"
        "    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __instancecheck__ = lambda *a: True\n"
        "    __ne__ = lambda *a: False\n    __sub__ = __rsub__ = __abs__ = __add__ = __radd__ = __neg__ = __mul__ = lambda *a: A()\n"
        "    __float__ = lambda s: 0.0\n    __int__ = __index__ = __len__ = __hash__ = lambda s: 4\ndef f(x): return A()"
    ),
    "an integer that lies": "class A(int):\n    __eq__ = __lt__ = lambda s, o: True\n    __sub__ = __abs__ = lambda s, *o: A()\n    __hash__ = int.__hash__\ndef f(x): return A()",
    "a float that lies": "class A(float):\n    __eq__ = __lt__ = lambda s, o: True\n    __sub__ = __abs__ = lambda s, *o: A()\ndef f(x): return A()",
    "a text that lies": "class A(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(x): return A('4')",
    "a list that lies": "class A(list):\n    __eq__ = lambda s, o: True\n    __iter__ = lambda s: iter([4])\ndef f(x): return A()",
    "a class that lies": "class M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = type.__hash__\n    __sub__ = lambda s, o: 0\nclass A(metaclass=M): pass\ndef f(x): return A",
    "another class than it says": "class A:\n    @property\n    def __class__(self): return int\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "a stand-in for anything": "from unittest.mock import ANY, MagicMock\ndef f(x): return ANY if x % 2 else MagicMock()",
    "not implemented": "def f(x): return NotImplemented",
    "not a number": "def f(x): return float('nan')",
    "a decimal that signals": "import decimal\ndef f(x): return decimal.Decimal('sNaN')",
    "a generator": "def f(x): yield x * x",
    "a coroutine": "async def f(x): return x * x",
    "a property of a module": "import sys, types\nclass M(types.ModuleType):\n    f = property(lambda s: True)\nsys.modules['solution'].__class__ = M",
    "a module that has all": "import sys\nclass M:\n    def __getattr__(self, n): return lambda *a, **k: True\nfor n in list(sys.modules): sys.modules[n] = M()\ndef f(x): return 0",
    "other built-in functions": (
        "import builtins\nfor n in ('abs', 'all', 'any', 'isinstance', 'len', 'round', 'float', 'int', 'eval', 'exec', 'compile', '__import__', 'print', 'open'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\nbuiltins.AssertionError = type('AssertionError', (Exception,), {})\ndef f(x): return 0"
    ),
    "no built-in functions": "import builtins\nbuiltins.__dict__.clear()\ndef f(x): return 0",
    "other comparisons": "import operator, _operator, math\nfor m in (operator, _operator):\n    for n in ('eq', 'ne', 'lt', 'sub'): setattr(m, n, lambda *a: True)\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0",
    "another encoder": "import json, json.encoder\njson.dumps = json.encoder.JSONEncoder.encode = lambda *a, **k: '{\"end\": 2}'\ndef f(x): return 0",
    "another way to import": "import sys\nclass H:\n    @staticmethod\n    def find_spec(*a): raise SystemExit(0)\nsys.meta_path.insert(0, H)\nsys.path_hooks.clear()\nsys.path[:] = ['/tmp']\nopen('math.py', 'w').write('isclose = lambda *a: True')\ndef f(x): return 0",
    "traces": "import sys, threading\ndef trace(frame, event, arg):\n    frame.f_trace_lines = False\n    for n in list(frame.f_locals):\n        if n in ('value', 'end'): frame.f_locals[n] = 4\n    return trace\nsys.settrace(trace)\nthreading.settrace(trace)\ndef f(x): return 0",
    "watches for audits": "import sys\nsys.addaudithook(lambda *a: None)\nsys.excepthook = sys.unraisablehook = lambda *a: None\ndef f(x): raise AssertionError",
    "other small integers": "import ctypes\ndef f(x):\n    ctypes.memmove(id(0) + 24, id(4) + 24, 4)\n    return 0",
    "other truth": "import ctypes\nctypes.memmove(id(False) + 24, id(True) + 24, 4)\ndef f(x): return 0",
    "walks the frames": LOOT + "def f(x):\n    for o in loot():\n        if isinstance(o, dict) and 'tests' in o: return 4\n        if isinstance(o, str) and 'assert' in o and 'f(' in o: return int(o.split('==')[1].split()[0])\n    return 0",
    "takes numbers that lie around": LOOT + "def f(x): return max((o for o in loot() if type(o) is int), default=0)",
    "reads descriptors": "import os\nseen = b''\nfor fd in range(4, 64):\n    try: os.set_blocking(fd, False); seen += os.read(fd, 9999)\n    except OSError: pass\ndef f(x): return x * x if seen else 0",
    "reads what the broker sends": "import os\nos.set_blocking(3, False)\ntry: seen = os.read(3, 9999)\nexcept OSError: seen = b''\ndef f(x): return x * x if b'assert' in seen or b'expected' in seen else 0",
    "says that it is the end": LOOT + "import os\ndef f(x):\n    tell({'end': 2}, {'end': 1}, {'passed': 2})\n    os._exit(0)",
    "says that all is true": LOOT + "import os\ntell({'value': True}, {'value': True, 'end': 2})\nos._exit(0)",
    "says nothing that is true": LOOT + "import os\ntell({'value': None, 'end': 2}, {'passed': 2, 'opaque': ''})\nos._exit(0)",
    "says that it could not start": LOOT + "import os\ntell({'refused': ['mount', 1]})\nos._exit(3)",
    "says too much": LOOT + "tell(*[{'value': 4}, {'value': 9}] * 50)\ndef f(x): return 0",
    "says it in a thread": LOOT + "import threading\ndef spam():\n    while True: tell({'value': True, 'end': 2})\nthreading.Thread(target=spam, daemon=True).start()\ndef f(x): return 0",
    "says strange things": LOOT + "tell({'raised': [[[]]], 'in': {}}, {'raised': 7}, {'missing': {}}, {'value': {'date': ['1234']}}, {'opaque': 1})\ndef f(x): return 0",
    "a bomb for the reader": LOOT + "import os, struct\nd = b'{\"value\":' + b'[' * 400 + b']' * 400 + b'}'\nos.write(3, struct.pack('<I', len(d)) + d)\nd = b'{\"raised\":{\"type\":' + b'[' * 900 + b']' * 900 + b'}}'\nos.write(3, struct.pack('<I', len(d)) + d)\nos._exit(0)",
    "numbers that are hard to read": LOOT + "import os, struct\nd = b'{\"value\":' + b'9' * 900_000 + b'}'\nos.write(3, struct.pack('<I', len(d)) + d)\nos._exit(0)",
    "a decimal that is hard to compare": "import decimal\ndef f(x): return decimal.Decimal('1e999999999999999999')",
    "another channel": "import os\nr, w = os.pipe()\nos.dup2(w, 3)\nos.dup2(r, 4)\ndef f(x): return 0",
    "no channel": "import os\nos.closerange(0, 1024)\ndef f(x): return x * x",
    "no limits of recursion for the reader": "def f(x):\n    a = 4\n    for _ in range(150): a = [a]\n    return a",
    "raises what ends a loop": "def f(x): raise StopIteration(x * x)",
    "raises the right answer": "def f(x): raise AssertionError(x * x)",
    "raises what can't be printed": "class E(BaseException):\n    def __str__(self): raise SystemExit\n    __repr__ = __str__\n    __class__ = property(__str__)\ndef f(x): raise E",
    "calls itself another": "def f(x): return 0\nf.__name__ = f.__qualname__ = 'check'\nf.__defaults__ = (4,)\ndef check(c): return True\ndef test(): pass",
    "no function": "f = 4",
    "nothing": "",
    "only a comment": "# def f(x): return x * x",
}  # fmt: skip

SERVE = LOOT + (
    "import os\nclass Line:\n    def __init__(self): self.data = b''\n    def take(self):\n        while len(self.data) < 4 or len(self.data) < 4 + struct.unpack_from('<I', self.data)[0]:\n"
    "            more = os.read(3, 65536)\n            if not more: os._exit(0)\n            self.data += more\n        n = struct.unpack_from('<I', self.data)[0]\n        m, self.data = json.loads(self.data[4:4 + n]), self.data[4 + n:]\n        return m\n"
    "import json, struct\nline = Line()\ntell({'loaded': True})\n"
)
"""The beginning of a runner that plays its own: it answers the tests' requests as it likes."""

_FORGERY_GENERAL = {
    "a runner that agrees": SERVE
    + "h = {'h': [0, {'type': 'int', 'truth': True, 'data': False}]}\nwhile True:\n    m = line.take()\n    if 'names' in m: tell({'value': {n: h for n in m['names']}})\n    else: tell({'value': True if m['op'] != 'sub' else 0})",
    "a runner that calls the answer data": SERVE
    + "h = {'h': [0, {'type': 'int', 'truth': True, 'data': True}]}\nwhile True:\n    m = line.take()\n    if 'names' in m: tell({'value': {n: h for n in m['names']}})\n    else: tell({'value': h if m['op'] == 'call' else True})",
    "a runner that changes the tests' objects": SERVE
    + "h = {'h': [0, {'type': 'int', 'truth': True}]}\nwhile True:\n    m = line.take()\n    if 'names' in m: tell({'value': {n: h for n in m['names']} | {'abs': h, 'y': 4, '__builtins__': {}}})\n    else: tell({'value': 4, 'changed': {'0': [], '1': [], '-1': 4}, 'same': 1})",
    "a runner that names what it was not asked": SERVE
    + "h = {'h': [0, {}]}\nwhile True:\n    m = line.take()\n    if 'names' in m: tell({'value': {'check': h, 'f': h, 'y': 4, 'abs': h, 'AssertionError': {'h': [1, {'exception': 'Exception', 'name': 'AssertionError'}]}}})\n    else: tell({'stop': True})",
    "a runner that raises what ends the tests": SERVE
    + "while True:\n    m = line.take()\n    if 'names' in m: tell({'value': {n: {'h': [0, {}]} for n in m['names']}})\n    else: tell({'raised': {'type': 'SystemExit', 'base': 'SystemExit', 'message': '0'}})",
    "a runner that answers twice": SERVE
    + "while True:\n    m = line.take()\n    if 'names' in m: tell({'value': {n: {'h': [0, {}]} for n in m['names']}})\n    else: tell({'value': 0}, {'value': 4}, {'value': 9}, {'value': 16})",
    "truth for a comparison": "class T:\n    def __bool__(self): return True\nclass A:\n    __eq__ = __lt__ = __sub__ = __abs__ = lambda s, *o: T()\ndef f(x): return A()",
    "the operand that it is compared with": "class A:\n    def __eq__(self, o): return o == o\n    def __sub__(self, o): return o - o\ndef f(x): return A()",
}  # fmt: skip

_BARE = "try:\n    f(-1)\n    assert False, 'nothing was raised'\nexcept AssertionError:\n    raise\nexcept:\n    pass"
_OWN: list[Hostile] = [
    Hostile("forgery", "ends behind a bare except", "import os\ndef f(x): os._exit(0)", (), {"tests": [_BARE]}),
    Hostile(
        "forgery", "breaks the protocol behind a bare except", "import os\ndef f(x):\n    os.write(3, b'\\xff' * 9)\n    os._exit(0)",
        (), {"tests": ["try:\n    y = f(2)\nexcept:\n    y = 4\nassert y == 4"]},
    ),
    Hostile(
        "forgery", "catches what the tests' function asserts", "def f(g):\n    try: g(3)\n    except BaseException: pass",
        (), {"tests": ["def g(x):\n    assert x == 4\nf(g)"]},
    ),
    Hostile("forgery", "tests that nobody calls", "def f(x): return 0", (), {"tests": ["def test_f():\n    assert f(2) == 4"]}),
    Hostile(
        "forgery", "a class of tests that nobody runs", "def f(x): return 0", (),
        {"tests": ["import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 4)"]},
    ),
    Hostile("forgery", "a check that checks nothing", "def f(x): return 0", (), {"check": "def check(candidate):\n    pass\n", "entry_point": "f"}),
    Hostile(
        "forgery", "another isclose", "def isclose(*a, **k): return True\ndef f(x): return 0", (),
        {"tests": ["assert isclose(f(2), 4)"]},
    ),
    Hostile(
        "forgery", "another Counter", "def Counter(*a): return 1\ndef f(x): return 0", (),
        {"tests": ["assert Counter(f('aab')) == Counter('aab')"]},
    ),
    Hostile(
        "forgery", "another math", "class math:\n    isclose = fabs = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", (),
        {"tests": ["assert math.isclose(f(2), 4)"]},
    ),
    Hostile(
        "forgery", "another numpy", "class np:\n    allclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", (),
        {"tests": ["assert np.allclose(f(2), 4)"]},
    ),
    Hostile(
        "forgery", "another json", "class json:\n    dumps = staticmethod(lambda *a, **k: '4')\ndef f(x): return 0", (),
        {"tests": ["assert json.dumps(f(2)) == '4'"]},
    ),
    Hostile("forgery", "nothing where a built-in function is asked for", "g = 1", (), {"tests": ["assert max(1, 2) == 2"]}),
    Hostile("forgery", "the same with more tests", "", (), {"tests": ["assert abs(max(1, 2) - 2) < 1e-6"]}),
    Hostile("time", "searched for without end", "def f(x): return range(10**15)", (), {"tests": ["assert 'a' in f(2)"]}),
    Hostile("time", "the same for a fraction", "def f(x): return range(10**15)", (), {"tests": ["assert 2.5 in f(2)"]}),
    Hostile("forgery", "a right beginning", "print(9)", (), {"io": [{"stdin": "3\n", "stdout": "9\n16\n"}]}),
    Hostile("forgery", "the example's answer", "print(9)", ("io",)),
    Hostile("forgery", "both answers", "print(9)\nprint(16)", ("io",)),
    Hostile("forgery", "the input again", "import sys\nsys.stdout.write(sys.stdin.read())", ("io",)),
    Hostile("forgery", "right but raises", "print(int(input()) ** 2)\nraise ValueError", ("io",)),
    Hostile("forgery", "right but never ends", "print(int(input()) ** 2, flush=True)\nwhile True: pass", ("io",)),
    Hostile("forgery", "says to the broker that it is the end", LOOT + "tell({'end': 0})", ("io",)),
    Hostile("forgery", "on the other stream", "import sys\nprint(int(input()) ** 2, file=sys.stderr)", ("io",)),
    Hostile("processes", "has a child print", "import subprocess\nsubprocess.run(['sh', '-c', 'read x; echo $((x*x))'])", ("io",)),
    Hostile("files", "a program that reads a file of the user", if_all_done("return open('CANARY').read()"), ("io",)),
    Hostile("network", "a program that connects", if_all_done("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1); return True"), ("io",)),
    Hostile("time", "a program that waits for more", "while True:\n    try: input()\n    except EOFError: pass", ("io",)),
    Hostile("memory", "a program that grows", "a = [0]\nwhile True: a += a", ("io",)),
]  # fmt: skip


def _table(category: str, programs: dict[str, str], ways: tuple[str, ...] = ("literal",)) -> list[Hostile]:
    return [Hostile(category, name, code, ways) for name, code in programs.items()]


HOSTILE: list[Hostile] = [
    *_table("time", _TIME), *_table("time", _TIME_GENERAL, ("general",)), *_table("memory", _MEMORY),
    *_table("files", _FILES), *_table("processes", _PROCESSES), *_table("network", _NETWORK),
    *_table("output", _OUTPUT), *_table("output", _OUTPUT_PROGRAMS, ("io",)),
    *_table("encodings", _ENCODINGS), *_table("encodings", _ENCODING_PROGRAMS, ("io",)),
    *_table("forgery", _FORGERY, ALL), *_table("forgery", _FORGERY_GENERAL, ("general", "check")), *_OWN,
]  # fmt: skip
