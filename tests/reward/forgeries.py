"""Programs that try to pass without solving the task `f(x) == x * x`; a table of name and source.

Each is tried against every kind of test. None reaches outside the sandbox it runs in but by what the sandbox allows.
"""

# ruff: noqa: E501

FRAMES = """
import sys, gc, json
def loot():
    found = []
    frame = sys._getframe()
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    return found + gc.get_objects()
def channel():
    return next(o for o in loot() if type(o).__name__ == "Channel")
def tell(*messages):
    for message in messages:
        channel().send(message)
"""

FORGERIES: dict[str, str] = {
    # ending early, and saying so
    "sys_exit_0": "import sys\nsys.exit(0)",
    "sys_exit_in_call": "import sys\ndef f(x): sys.exit(0)",
    "raise_system_exit": "raise SystemExit(0)",
    "os_exit_0": "import os\nos._exit(0)",
    "os_exit_in_call": "import os\ndef f(x): os._exit(0)",
    "exit_group": "import ctypes\ndef f(x): ctypes.CDLL(None)._exit(0)",
    "segfault": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "markers": "print('PASSED', 'OK', 'all tests passed', '1 passed', flush=True)\ndef f(x): print('passed'); return 0",
    "empty": "",
    "syntax_error": "def f(x) return x * x",
    "raises": "def f(x): raise ValueError(x)",
    "raises_assertion": "def f(x): raise AssertionError",
    "raises_stop_iteration": "def f(x): raise StopIteration",
    "raises_generator_exit": "def f(x): raise GeneratorExit",
    "raises_keyboard_interrupt": "def f(x): raise KeyboardInterrupt",
    "raises_at_import": "raise KeyboardInterrupt",
    "liar_exception": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\n    def __eq__(self, o): return True\n"
        "def f(x): raise E"
    ),
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "no_function": "g = 1",
    "not_callable": "f = 1",
    "none": "def f(x): pass",
    # values that lie about equality
    "always_equal": "class A:\n    def __eq__(self, o): return True\n    __hash__ = object.__hash__\ndef f(x): return A()",
    "always_equal_and_true": (
        "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __bool__(self): return True\n    def __hash__(self): return 4\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n"
        "    def __sub__(self, o): return 0.0\n    __rsub__ = __add__ = __radd__ = __mul__ = __sub__\n"
        "    def __abs__(self): return 0.0\n    def __float__(self): return 0.0\n"
        "    def __getattr__(self, name): return self\n    def __call__(self, *a): return self\n"
        "    def __contains__(self, x): return True\n    def __len__(self): return 4\n"
        "    def __iter__(self): return iter([])\n    def __instancecheck__(self, o): return True\ndef f(x): return A()"
    ),
    "int_subclass": (
        "class A(int):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __sub__(self, o): return A(0)\n    def __abs__(self): return A(0)\n    __lt__ = __eq__\n"
        "    __hash__ = int.__hash__\ndef f(x): return A(0)"
    ),
    "float_subclass": "class A(float):\n    __eq__ = __lt__ = lambda s, o: True\n    __sub__ = lambda s, o: s\ndef f(x): return A(0)",
    "str_subclass": "class A(str):\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef f(x): return A('x')",
    "list_subclass": "class A(list):\n    __eq__ = lambda s, o: True\n    __len__ = lambda s: 1\ndef f(x): return A([0])",
    "dict_subclass": "class A(dict):\n    __eq__ = lambda s, o: True\n    __missing__ = lambda s, k: k\ndef f(x): return A()",
    "metaclass": (
        "class M(type):\n    __eq__ = lambda c, o: True\n    __bool__ = lambda c: True\n    __hash__ = type.__hash__\n"
        "class A(metaclass=M): pass\ndef f(x): return A"
    ),
    "class_attribute_lies": "class A:\n    __class__ = int\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "mock_any": "from unittest.mock import ANY\ndef f(x): return ANY",
    "nan": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "true": "def f(x): return True",
    "not_implemented": "def f(x): return NotImplemented",
    "generator": "def f(x):\n    yield x * x",
    "generator_class": "class A:\n    def __iter__(self): yield 4\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "lambda": "f = lambda x: (lambda: x * x)",
    "coroutine": "async def f(x): return x * x",
    "remembers_operand": (
        "class A:\n    def __eq__(self, o): self.seen = o; return o == o\n    def __bool__(self): return True\ndef f(x): return A()"
    ),
    "partial_class": "import functools\ndef f(x): return functools.partial(int, 4)",
    "module": "import math\ndef f(x): return math",
    # other meanings for the words of the tests
    "patch_builtins": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = builtins.any = builtins.isinstance = lambda *a: True\n"
        "builtins.len = lambda x: 1\nbuiltins.AssertionError = Exception\nbuiltins.compile = lambda *a, **k: None\n"
        "builtins.exec = lambda *a: None\ndef f(x): return 0"
    ),
    "own_abs": "def abs(x): return 0\ndef float(x): return 0\ndef round(*a): return 16\ndef all(x): return True\ndef f(x): return 0",
    "own_math": "class math:\n    fabs = staticmethod(lambda x: 0)\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0",
    "own_check": "def check(candidate): return True\ndef f(x): return 0",
    "patch_operator": "import operator, _operator\noperator.eq = _operator.eq = lambda a, b: True\ndef f(x): return 0",
    "patch_unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0",
    "patch_sys_modules": (
        "import sys\nclass M:\n    def __getattr__(self, n): return lambda *a, **k: True\n"
        "for n in ('json', 'operator', 'math', 'align', 'builtins', '__main__', 'tests', 'checker'): sys.modules[n] = M()\n"
        "def f(x): return 0"
    ),
    "import_hook": (
        "import sys\nclass H:\n    def find_spec(self, *a): raise ImportError('no tests today')\n"
        "sys.meta_path.insert(0, H())\ndef f(x): return 0"
    ),
    "patch_type_by_ctypes": (
        "import ctypes\nint_type = ctypes.py_object(int)\n"
        "ctypes.memmove(id(int) + 200, id(str) + 200, 8)\ndef f(x): return 0"
    ),
    "rewrite_small_ints": "import ctypes, sys\ndef f(x):\n    ctypes.memmove(id(0) + 24, id(4) + 24, 4)\n    return 0",
    "trace_function": "import sys, threading\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "clear_arguments": "def f(x, *a): return 0\nf.__code__ = (lambda *a: 0).__code__",
    # looking for the expected values
    "loot_expected": FRAMES
    + (
        "def f(x):\n    for o in loot():\n        if isinstance(o, str) and 'assert' in o and '==' in o and 'f(' in o:\n"
        "            return int(o.split('==')[1].split()[0])\n"
        "        if isinstance(o, dict) and ('expected' in o or 'tests' in o): return list(o.values())[0]\n    return -1"
    ),
    "loot_numbers": FRAMES + "def f(x):\n    return next((o for o in loot() if type(o) is list and 4 in o), [0])[0]",
    "read_descriptors": (
        "import os\nseen = b''\nfor fd in range(5, 64):\n    try: seen += os.pread(fd, 1000, 0)\n    except OSError: pass\n"
        "    try: seen += os.read(fd, 1000)\n    except OSError: pass\ndef f(x): return len(seen) and 4"
    ),
    "read_proc": (
        "import os, glob\nseen = ''\nfor p in ['/proc/self/maps', '/proc/1/environ', '/proc/1/mem', f'/proc/{os.getppid()}/mem']:\n"
        "    try: seen += open(p, 'rb').read(99).decode('latin-1')\n    except OSError: pass\ndef f(x): return 4 if seen else 0"
    ),
    "read_own_frame_source": "import sys, linecache\ndef f(x):\n    return linecache.getlines('<test 1>') or linecache.getlines('<string>')",
    # speaking for the harness
    "send_end": FRAMES + "tell({'end': 2}, {'end': 1}, {'end': 0}, {'passed': 2}, {'passed': 1})\ndef f(x): return 0",
    "send_end_and_exit": FRAMES + "import os\ndef f(x):\n    tell({'end': 2}, {'passed': 2})\n    os._exit(0)",
    "send_values": FRAMES + "tell(*[{'value': True}] * 2, {'end': 2})\nimport os; os._exit(0)",
    "send_nothing_right": FRAMES + "tell({'value': None}, {'value': None}, {'end': 2})\nimport os; os._exit(0)",
    "send_words": FRAMES + "import os\ntell({'loaded': True}, {'value': {}}, {'passed': 2, 'opaque': ''})\nos._exit(0)",
    "send_broken": "import os\nos.write(3, b'\\xff\\xff\\xff\\xff' + b'[' * 100000)\ndef f(x): return 0",
    "send_deep": FRAMES + "import os, struct\nd = b'[' * 100000\nos.write(3, struct.pack('<I', len(d)) + d)\nos._exit(0)",
    "send_bad_tags": FRAMES
    + "tell({'value': {'s': [[1]]}}, {'value': {'h': [0, {}]}}, {'value': {'fn': 0}}, {'value': {'D': 'x'}})\ndef f(x): return 0",
    "send_forever": FRAMES + "while True: tell({'value': 0})",
    "patch_channel": FRAMES + (
        "C = type(channel())\nold = C.send\n"
        "def send(self, m): old(self, {'end': 2} if 'raised' in m else {k: (True if k == 'value' else v) for k, v in m.items()})\n"
        "C.send = send\ndef f(x): return 0"
    ),
    "thread_answers_first": FRAMES + (
        "import threading, time\ndef g():\n    while True:\n        tell({'value': {'h': [0, {'truth': True}]}})\n        time.sleep(0.001)\n"
        "threading.Thread(target=g, daemon=True).start()\ndef f(x): return 0"
    ),
    "runner_that_agrees": FRAMES + (
        "import os\nc = channel()\nc.send({'loaded': True})\nobject_ = {'h': [0, {'type': 'int', 'truth': True, 'data': False}]}\n"
        "while True:\n    m = c.receive()\n    if m is None: os._exit(0)\n"
        "    if 'names' in m: c.send({'value': {n: object_ for n in m['names']}})\n"
        "    elif m['op'] in ('eq', 'ne', 'lt', 'le', 'gt', 'ge', 'contains', 'bool', 'isinstance'): c.send({'value': True})\n"
        "    elif m['op'] in ('sub', 'add', 'abs', 'float', 'int', 'len', 'hash'): c.send({'value': 0})\n"
        "    else: c.send({'value': object_})"
    ),
    "runner_with_data_that_changes": FRAMES + (
        "import os\nc = channel()\nc.send({'loaded': True})\nobject_ = {'h': [0, {'type': 'int', 'truth': True, 'data': True}]}\n"
        "while True:\n    m = c.receive()\n    if m is None: os._exit(0)\n"
        "    if 'names' in m: c.send({'value': {n: object_ for n in m['names']}})\n"
        "    else: c.send({'value': True, 'same': len(m['args']) - 1, 'changed': {'1': []}})"
    ),
    "runner_that_calls_back": FRAMES + (
        "import os\nc = channel()\nc.send({'loaded': True})\nwhile True:\n    m = c.receive()\n    if m is None: os._exit(0)\n"
        "    if 'names' in m: c.send({'value': {n: {'h': [0, {}]} for n in m['names']}})\n"
        "    else: c.send({'callback': 0, 'args': []})"
    ),
    "runner_with_strange_exceptions": FRAMES + (
        "import os\nc = channel()\nc.send({'loaded': True})\nwhile True:\n    m = c.receive()\n    if m is None: os._exit(0)\n"
        "    if 'names' in m: c.send({'value': {n: {'h': [0, {'exception': 'SystemExit', 'name': 'E'}]} for n in m['names']}})\n"
        "    else: c.send({'raised': {'type': 'SystemExit', 'base': 'SystemExit', 'message': '0'}})"
    ),
    "names_that_end_the_checker": "import os, sys\nf = os._exit\ng = sys.exit",
    "type_instead_of_function": "f = int",
    "standard_function_instead": "from math import sqrt as f",
    # using up the machine
    "infinite_loop": "while True: pass",
    "infinite_loop_in_call": "def f(x):\n    while True: pass",
    "infinite_loop_in_eq": "class A:\n    def __eq__(self, o):\n        while True: pass\ndef f(x): return A()",
    "infinite_loop_in_str": "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(x): raise E",
    "ignores_signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "stops_itself": "import os, signal, time\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(1000)",
    "reads_input": "def f(x): return input()",
    "memory_bomb": "def f(x): return len('x' * 10**11)",
    "memory_bomb_slow": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 20))",
    "mmap_bomb": "import mmap\ndef f(x): return [mmap.mmap(-1, 1 << 30) for _ in range(100)]",
    "big_integer": "def f(x): return 1 << (8 << 23)",
    "big_string": "def f(x): return 'x' * (9 << 20)",
    "many_objects": "def f(x): return [[] for _ in range(2_000_000)]",
    "colliding_set": "def f(x): return {i * ((1 << 61) - 1) for i in range(20_000)}",
    "colliding_dict": "def f(x): return {i * ((1 << 61) - 1): i for i in range(9_000)}",
    "deep_value": "def f(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "self_containing": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "deep_c_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    a = []\n    for _ in range(10**6): a = [a]\n    return repr(a)",
    "deep_source": "f = " + "(" * 5000 + "1" + ")" * 5000,
    "fork_bomb": "import os\nwhile True: os.fork()",
    "fork_bomb_quiet": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: return 0",
    "thread_bomb": (
        "import threading, time\ndef f(x):\n    while True:\n        try: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
        "        except (RuntimeError, MemoryError): return 0"
    ),
    "threads_stay": "import threading\ndef g():\n    while True: pass\nthreading.Thread(target=g).start()\ndef f(x): return 0",
    "subprocess": "import subprocess\ndef f(x): return subprocess.run(['/bin/true']).returncode or 4",
    "output_flood": "import os\ndef f(x):\n    while True: os.write(1, b'x' * (1 << 20))",
    "descriptor_flood": "import os\nkeep = []\ndef f(x):\n    while True: keep.append(os.dup(1))",
    "file_flood": "def f(x):\n    with open('/tmp/a', 'wb') as file:\n        while True: file.write(b'x' * (1 << 20))",
    "many_files": "def f(x):\n    for i in range(10**9): open(f'/tmp/{i}', 'w').close()",
    # breaking the machinery
    "close_descriptors": "import os\nos.closerange(0, 1024)\ndef f(x): return x * x + 1",
    "close_channel_in_call": "import os\ndef f(x):\n    os.close(3)\n    return 0",
    "close_channel_and_spin": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "replace_channel": "import os\nr, w = os.pipe()\nos.dup2(w, 3)\ndef f(x): return 0",
    "kill_parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return 0",
    "kill_group": "import os, signal\nos.kill(0, signal.SIGKILL)\ndef f(x): return 0",
    "kill_everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(x): return 0",
    "kill_process_1": "import os, signal\nfor pid in range(1, 50):\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\ndef f(x): return 0",
    "kill_itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\ndef f(x): return 0",
    "killpg": "import os, signal\nos.killpg(os.getpgid(0), signal.SIGKILL)\ndef f(x): return 0",
    "trace_parent": "import ctypes, os\nr = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\ndef f(x): return 4 if r == 0 else 0",
    "raise_limits": (
        "import resource\nfor what in range(16):\n    try: resource.setrlimit(what, (-1, -1))\n    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "alarm": "import signal\nsignal.alarm(1)\nwhile True: signal.pause()",
    "unshare": "import ctypes\nr = ctypes.CDLL(None).unshare(0x10000000)\ndef f(x): return 4 if r == 0 else 0",
    "mount_over": "import ctypes\nr = ctypes.CDLL(None).mount(b'none', b'/', None, 0, None)\ndef f(x): return 4 if r == 0 else 0",
    "garbage_collector": "import gc\ngc.disable()\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'holds' in o: o.clear()\ndef f(x): return 0",
    "delete_everything": (
        "import sys\nfor name in list(sys.modules):\n    if name != 'sys': sys.modules[name].__dict__.clear()\ndef f(x): return 0"
    ),
    "null_bytes": "def f(x): return 0\x00",
    "surrogates": "def f(x): return '\udcff'",
    "coding_cookie": "# -*- coding: utf-7 -*-\ndef f(x): return 0",
}  # fmt: skip
