"""Foreign code tries to get out of the sandbox, and candidates try to pass tests that they fail."""

from __future__ import annotations

import ast
import fcntl
import json
import logging
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated import HELD, LONG, NO_KERNEL, every_isolation, run_outside, successes

from dmax.errors import InputError
from dmax.sandbox import Limits, Outcome, check, choice, remote, run_python
from dmax.sandbox.folder import LOCK, PREFIX, remove_leftovers
from dmax.sandbox.isolation import WEAK
from dmax.sandbox.process import Job, supervise
from dmax.sandbox.remote import decode, encode
from dmax.sandbox.usage import family, nameless

pytestmark = pytest.mark.skipif(not HELD, reason=NO_KERNEL)

SHORT = Limits(seconds=0.5)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its folders during a test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# Attacks on the machine.


@every_isolation
def test_read_a_file_outside(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    actions = """
open(secret)
open('../' * 20 + secret)
open(tests)
open('/etc/passwd')
open('/proc/self/environ')
open('/dev/mem', 'rb')
os.listdir(home)
os.listdir('/')
os.listdir('..')
os.listdir(os.path.dirname(secret))
os.link(secret, 'hard')
open(os.symlink(secret, 'soft') or 'soft')
os.rename(secret, 'mine')
os.chroot('/')
os.execv('/bin/cat', ['cat', secret])
"""
    assert successes(kind, actions, secret=str(secret), tests=__file__, home=str(Path.home())) == []


@every_isolation
def test_write_outside(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "file"
    file.write_text("precious")
    before = file.stat()
    actions = """
open(file, 'w')
open(file, 'a')
os.open(file, os.O_RDONLY | os.O_TRUNC)
os.truncate(file, 0)
os.unlink(file)
os.rename(file, 'mine')
os.chmod(file, 0)
os.chown(file, 1, 1)
os.utime(file, (0, 0))
os.setxattr(file, 'user.x', b'')
open(folder + '/new', 'w')
os.mkdir(folder + '/new')
os.symlink('/', folder + '/new')
open('../new', 'w')
open('/new', 'w')
open('/dev/shm/new', 'w')
open(os.__file__, 'a')
os.mkfifo('pipe')
os.mknod('node')
"""
    assert successes(kind, actions, file=str(file), folder=str(folder)) == []
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime,
    )
    assert file.read_text() == "precious" and os.listdir(folder) == ["file"]


@every_isolation
def test_the_temporary_folder_is_fresh_and_writable(kind: str, scratch: Path) -> None:
    program = """
import os, pathlib, tempfile
assert os.listdir() == []
os.mkdir("folder")
pathlib.Path("folder/file").write_text("text")
os.rename("folder/file", "file")
with tempfile.TemporaryDirectory() as folder, open(f"{folder}/file", "w") as stream:
    stream.write("text")
"""
    for _ in range(2):
        outcome = run_python(program, isolation=kind)
        assert outcome.passed, outcome
        assert os.listdir(scratch) == []


@every_isolation
def test_open_a_socket(kind: str, tmp_path: Path) -> None:
    actions = """
socket.create_connection(('127.0.0.1', port))
socket.socket(socket.AF_UNIX).connect(path)
socket.socket()
socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.create_server(('', 0))
socket.socketpair()[0].sendto(b'x', path)
system(425, 1, 0)
"""  # the last sets up io_uring, whose operations no filter sees
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        path = os.path.relpath(tmp_path / "s")  # relative, since the name has to be short
        local.bind(path)
        local.listen()
        assert successes(kind, actions, port=tcp.getsockname()[1], path=os.path.abspath(path)) == []


@every_isolation
def test_fork_bomb(kind: str) -> None:
    actions = """
os.fork()
os.forkpty()
subprocess.run(['/bin/true'])
os.posix_spawn('/bin/true', ['true'], {})
"""
    if platform.machine() == "x86_64":
        actions += "system(57)\nsystem(58)\nsystem(56, 17, 0, 0, 0, 0)"  # fork, vfork, clone
    assert successes(kind, actions) == []
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run_python(bomb, limits=SHORT, isolation=kind).status == "timeout"


@every_isolation
def test_thread_bomb(kind: str) -> None:
    bomb = """
import threading, time
threading.stack_size(65536)
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()
"""
    assert run_python(bomb, isolation=kind, limits=Limits(seconds=LONG)).status == "threads"


@every_isolation
@pytest.mark.parametrize(
    "step", ["hoard.append(bytearray(1 << 24))", "hoard.append(mmap.mmap(-1, 1 << 24))", "x += x"]
)
def test_fill_memory(kind: str, step: str) -> None:
    program = f"""
import mmap
hoard, x = [], "x"
while True:
    try:
        {step}
    except OSError:
        raise MemoryError
"""
    limits = Limits(seconds=LONG, memory=128 << 20)
    assert run_python(program, limits=limits, isolation=kind).status == "memory"


FILLERS = {
    "one file": "open('file', 'ab').write(block)",
    "many files": "open(str(count), 'wb').write(block)",
    "unlinked files": """
    hoard.append(open('x', 'wb', buffering=0))
    hoard[-1].write(block)
    os.unlink('x')
""",
    "mapped files": """
    file = open('x', 'w+b', 0)
    file.write(block)
    map_page(file.fileno())
    os.unlink('x')
    file.close()
""",
    "hidden folders": "os.mkdir(str(count), 0o300); open(f'{count}/file', 'wb').write(block)",
    "empty files": "open(str(count), 'w').close()",
    "deep folders": "os.mkdir('folder'); os.chdir('folder')",
    "symbolic links": "os.symlink('x' * 4000, str(count))",
    "hard links": "open('file', 'a').close(); os.link('file', str(count))",
}


@every_isolation
@pytest.mark.parametrize("filler", FILLERS)
def test_fill_disk(kind: str, filler: str, scratch: Path) -> None:
    program = f"""
import ctypes, os
def map_page(number):
    ctypes.CDLL(None).mmap(*map(ctypes.c_long, (0, 4096, 1, 1, number, 0)))
hoard, block, count = [], bytes(1 << 20), 0
while True:
    {FILLERS[filler]}
    count += 1
"""
    outcome = run_python(program, limits=Limits(seconds=LONG, disk=4 << 20), isolation=kind)
    is_refused = outcome.status == "failed" and "OSError" in outcome.detail
    assert outcome.status == "disk" or is_refused, outcome
    assert os.listdir(scratch) == []


@pytest.mark.parametrize(("wait", "expected"), [("hold.wait()", 8192), ("map_page()", sys.maxsize)])
def test_files_without_a_name_are_seen_behind_a_thread_that_has_ended(
    wait: str, expected: int, tmp_path: Path
) -> None:
    """The first thread's entry in /proc shows no descriptors any more; the others keep theirs."""
    program = f"""
import ctypes, os, threading
hold, libc = threading.Event(), ctypes.CDLL(None)
def map_page():
    libc.mmap(*map(ctypes.c_long, (0, 4096, 1, 1, file.fileno(), 0)))
    file.close()
    print(1, flush=True)
    hold.wait()
def work():
    while open(f"/proc/{{os.getpid()}}/stat").read().split()[2] != "Z":
        pass
    if {wait!r} == "hold.wait()":
        print(1, flush=True)
    {wait}
file = open("x", "w+b", 0)
file.write(bytes(8192))
os.unlink("x")
threading.Thread(target=work).start()
libc.syscall({60 if platform.machine() == "x86_64" else 93}, 0)  # ends only this thread
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        assert nameless(process.pid, tmp_path.resolve()) == expected
        process.kill()


@every_isolation
def test_sleep_for_ever(kind: str) -> None:
    program = "import time\ntime.sleep(1e6)"
    assert run_python(program, limits=SHORT, isolation=kind).status == "timeout"


@every_isolation
def test_spin_for_ever(kind: str) -> None:
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    limits = Limits(seconds=LONG, cpu_seconds=1)
    assert run_python(program, limits=limits, isolation=kind).status == "timeout"


@every_isolation
def test_ignore_sigterm(kind: str) -> None:
    program = """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    signal.pause()
"""
    assert run_python(program, limits=SHORT, isolation=kind).status == "timeout"


@every_isolation
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_print_1_gb(kind: str, stream: str) -> None:
    program = f"import sys\nfor _ in range(1024):\n    sys.{stream}.write('x' * (1 << 20))"
    outcome = run_python(program, limits=Limits(seconds=LONG, output=1000), isolation=kind)
    assert outcome.status == "output" and getattr(outcome, stream) == "x" * 1000


@every_isolation
def test_reach_other_processes(kind: str) -> None:
    actions = """
os.kill(parent, 0)
os.kill(os.getppid(), 0)
os.kill(-1, 0)
os.killpg(0, 0)
os.setsid()
os.setpriority(os.PRIO_PROCESS, parent, 19)
os.pidfd_open(parent)
open(f'/proc/{parent}/mem', 'rb')
fcntl.fcntl(1, fcntl.F_SETOWN, parent)
resource.prlimit(parent, resource.RLIMIT_NOFILE, (0, 0))
os.memfd_create('x')
os.setuid(1)
"""
    if platform.machine() == "x86_64":
        # F_SETOWN again: the kernel reads only the lower half of the argument.
        actions += f"system(72, 1, {(1 << 32) + fcntl.F_SETOWN}, parent)"
    assert successes(kind, actions, parent=os.getpid()) == []


@every_isolation
def test_inherits_neither_environment_nor_descriptors(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "secret")
    program = """
import os
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
descriptors = [number for number in range(256) if is_open(number)]
print(sorted(os.environ.keys() - {"LC_CTYPE", "PWD"}), descriptors)
"""  # Python itself sets LC_CTYPE
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        assert run_python(program, isolation=kind).stdout == "[] [0, 1, 2]\n"


@every_isolation
def test_no_process_is_left(kind: str) -> None:
    config = {"role": "run", "program": "print(1, flush=True)\nwhile True:\n    pass"}
    with Job(kind, SHORT, config) as job:
        select.select([job.streams[1]], [], [], LONG)  # it runs
        handles = [os.pidfd_open(pid) for pid in family(job.pid)]
        assert supervise([job], SHORT) == "timeout"
    for handle in handles:
        assert select.select([handle], [], [], LONG)[0], "a process outlived its job"
        os.close(handle)


def test_a_killed_harness_leaves_nothing_for_long(scratch: Path, tmp_path: Path) -> None:
    """Its sandboxes end with it, and the next start removes their folders, but no others."""
    harness = f"""
import contextlib, select
from dmax.sandbox.isolation import Limits
from dmax.sandbox.process import Job
from dmax.sandbox.usage import family
program = "import os\\nos.mkdir('hidden', 0)\\nprint(1, flush=True)\\nwhile True:\\n    pass"
config = {{"role": "run", "program": program}}
with contextlib.ExitStack() as stack:
    jobs = [stack.enter_context(Job(kind, Limits(), config)) for kind in {HELD}]
    for job in jobs:
        select.select([job.streams[1]], [], [], {LONG})
    print(*(pid for job in jobs for pid in family(job.pid)), flush=True)
    input()
"""
    foreign = scratch / f"{PREFIX}foreign"  # without a lock
    elsewhere = tmp_path / "elsewhere"
    for folder in foreign, elsewhere:
        folder.mkdir()
        (folder / "precious").touch()
    (elsewhere / LOCK).touch()
    (scratch / f"{PREFIX}link").symlink_to(elsewhere)
    if os.getuid() == 0:
        other_user = scratch / f"{PREFIX}other-user"
        other_user.mkdir()
        (other_user / LOCK).touch()
        os.chown(other_user, 1, 1)
    with Job(HELD[0], Limits(), {"role": "run", "program": ""}):  # its folder is in use
        kept = set(os.listdir(scratch))
        with subprocess.Popen(
            [sys.executable, "-c", harness],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(scratch)},
        ) as process:
            assert process.stdout
            handles = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
            process.kill()
        assert len(handles) >= len(HELD)
        for handle in handles:
            assert select.select([handle], [], [], LONG)[0], "the sandbox outlived the harness"
            os.close(handle)
        assert len(os.listdir(scratch)) == len(kept) + len(HELD)
        remove_leftovers.cache_clear()  # as at the next start
        assert run_python("").passed
        assert set(os.listdir(scratch)) == kept
    assert os.listdir(foreign) == ["precious"] and (elsewhere / "precious").exists()


# Attacks on the verdict: no candidate below adds.

# Those that a check in one process takes for right: its exit status is 0.

NAIVE_FORGERIES = {
    "sys.exit(0) before the asserts": "import sys\nsys.exit(0)",
    "os._exit(0) before the asserts": "import os\nos._exit(0)",
    "sys.exit(0) inside": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit(0) inside": "import os\ndef add(a, b): os._exit(0)",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): pass",
    "exit in the hook for exceptions": """
import os, sys
sys.excepthook = lambda *args: os._exit(0)
def add(a, b): pass
""",
    "exit in a finaliser": """
import os
class Last:
    def __del__(self, leave=os._exit): leave(0)
last = Last()
def add(a, b): pass
""",
    "exit in a thread that waits for the end": """
import os, threading
def leave():
    threading.main_thread().join()
    os._exit(0)
threading.Thread(target=leave).start()
def add(a, b): pass
""",
    "exit in a signal handler": """
import os, signal, time
signal.signal(signal.SIGALRM, lambda *args: os._exit(0))
def add(a, b):
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    time.sleep(60)
""",
    "exit in a trace function": """
import os, sys
sys.settrace(lambda *args: os._exit(0))
def add(a, b): pass
""",
    "fork and leave": "import os\nif os.fork(): os._exit(0)\ndef add(a, b): pass",
    "become another program": """
import os
os.execv("/proc/self/exe", ["python", "-c", ""])
""",
    "the expected value from the caller's code": """
import sys
def add(a, b):
    found = [c for c in sys._getframe(1).f_code.co_consts if type(c) is int and c not in (a, b)]
    return found[-1]
""",
    "a string equal to everything": """
class Equal(str):
    def __eq__(self, other): return True
def add(a, b): return Equal()
""",
    "a list equal to everything": """
class Equal(list):
    def __eq__(self, other): return True
def add(a, b): return Equal()
""",
    "one that pretends to be an int": """
class Equal:
    __class__ = int
    def __eq__(self, other): return True
def add(a, b): return Equal()
""",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 5
def add(a, b): return Equal()
""",
    "an int equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __hash__(self): return 5
    def __sub__(self, other): return 0
def add(a, b): return Equal(0)
""",
}
FORGERIES = NAIVE_FORGERIES | {
    "the checker's own exit status": "import os\nos._exit(86)",
    "at exit": """
import atexit, os
atexit.register(os._exit, 86)
def add(a, b): raise SystemExit(86)
""",
    "a line that says passed": "print('passed', flush=True)\ndef add(a, b): print('OK passed')",
    "overwrite builtins": """
import builtins
builtins.AssertionError = type("Quiet", (BaseException,), {})
builtins.isinstance = builtins.all = builtins.abs = lambda *args: True
builtins.int = builtins.type = builtins.bool = lambda *args: True
builtins.__build_class__ = builtins.__import__ = None
def isinstance(*args): return True
def all(*args): return True
def add(a, b): return True
""",
    "monkey-patch the checker": """
import gc, sys, types
class Equal:
    def __eq__(self, other): return True
names = "verify fail answer encode decode check serve Remote raise_named".split()
def patch(space):
    for name in list(space):
        if name in names:
            space[name] = lambda *args, **kwargs: Equal()
frame = sys._getframe()
while frame:
    patch(frame.f_globals)
    frame = frame.f_back
for item in gc.get_objects():
    if type(item) is dict and "verify" in item: patch(item)
for module in list(sys.modules.values()): patch(vars(module))
def add(a, b): return Equal()
""",
    "look for the expected value": """
import gc, re, sys
def add(a, b):
    frame, text = sys._getframe(), ""
    while frame:
        text += repr(frame.f_globals) + repr(frame.f_locals)
        frame = frame.f_back
    text += repr([item for item in gc.get_objects() if type(item) in (dict, list, str)])
    with open(0, "rb", closefd=False) as stream:
        stream.seek(0)
        text += stream.read().decode()
    if re.search(r"assert ad" + r"d\\(", text): return a + b
""",
    "end a loop of the tests": "def add(a, b): raise StopIteration",
    "end the tests' generator": "def add(a, b): raise GeneratorExit",
    "fill the pipe with answers": """
import os, stat
for number in range(3, 256):
    try:
        os.write(number, b'["value", true, []]\\n' * 100)
    except OSError: pass
""",
    "print without end": "while True:\n    print('x' * 65536)",
    "not an answer": """
import os
for number in range(3, 256):
    try: os.write(number, b'[' * 60000 + b'\\n')
    except OSError: pass
""",
    "an endless answer": """
import os
for number in range(3, 256):
    while True:
        try: os.write(number, b'0' * 65536)
        except OSError: break
""",
    "kill the checker": """
import os, signal
for pid in [os.getppid(), *range(os.getpid() - 50, os.getpid() + 50)]:
    try: pid != os.getpid() and os.kill(pid, signal.SIGKILL)
    except (OSError, OverflowError): pass
def add(a, b): return None
""",
    "change the arguments' type": "def add(a, b): return add",
    "not Python": "def add(a, b) return a + b",
    "not there": "def sub(a, b): return a - b",
    "raise what the asserts raise": "def add(a, b): raise AssertionError",
    "sleep": "import time\ntime.sleep(1e6)",
    "sleep inside": "import time\ndef add(a, b): time.sleep(1e6)",
    "recursion": "def add(a, b): return add(a, b)",
    "an endless iterator": "import itertools\ndef add(a, b): return itertools.count()",
    "a value without end": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "kill itself": "import os\ndef add(a, b): os.kill(os.getpid(), 9)",
    "sleep as a stopped process": "import os\ndef add(a, b): os.kill(os.getpid(), 19)",
    "close all descriptors": "import os\ndef add(a, b): os.closerange(0, 256)",
    "point all descriptors to one": """
import os
def add(a, b): [os.dup2(1, number) for number in range(3, 64)]
""",
    "an error that cannot be shown": """
class Bad(Exception):
    def __str__(self): raise self
def add(a, b): raise Bad
""",
    "an error without a name": """
class Meta(type): __name__ = property(lambda self: 1 / 0)
class Bad(Exception, metaclass=Meta): pass
def add(a, b): raise Bad
""",
    "an error of the interpreter": "def add(a, b): raise KeyboardInterrupt",
    "not a number": "def add(a, b): return float('nan')",
    "half a character": "def add(a, b): return '\\ud800'",
    "a very long number": "def add(a, b): return 1 << 10_000_000",
    "patch the answers": """
import sys
def add(a, b):
    space = sys._getframe(1).f_globals
    space["encode"] = space["decode"] = lambda *args: True
""",
}
ADDITIONS = """
add(2, 3) == 5
add(2, 3) in [5]
set([add(1, 1)]) == {2}
abs(add(0.5, 0.25) - 0.75) < 1e-9
not add(2, 2) != 4
isinstance(add(20, 1), int) and 20 < add(20, 1) < 22
all(map(lambda pair: add(*pair) == sum(pair), [(1, 2), (30, 40)]))
""".strip().split("\n")
ONE_IS_ENOUGH = """
correct = []
for test in tests:
    try:
        correct += [test] if test() else []
    except Exception:
        pass
assert correct
"""


def verdict(program: str, tests: str | list[str], **options: Any) -> Outcome:
    return check(program, tests, **{"limits": Limits(seconds=LONG), **options})


def test_a_right_solution_passes() -> None:
    program = "def add(a, b):\n    print('adding')\n    return a + b"
    tests = [f"assert {addition}" for addition in ADDITIONS]
    for kind in HELD:
        outcome = verdict(program, tests, isolation=kind)
        assert (outcome.status, outcome.detail, outcome.isolation) == ("passed", "", kind)
        assert outcome.stdout.startswith("adding\n") and outcome.stderr == ""


@pytest.mark.parametrize("name", FORGERIES)
def test_forge_the_verdict(name: str) -> None:
    limits = SHORT if name.startswith("sleep") else Limits(seconds=LONG)
    tests = ", ".join(f"lambda: {addition}" for addition in ADDITIONS)
    outcome = verdict(FORGERIES[name], f"tests = [{tests}]" + ONE_IS_ENOUGH, limits=limits)
    assert not outcome.passed and outcome.detail, outcome


@pytest.mark.parametrize("name", NAIVE_FORGERIES)
def test_those_forgeries_fool_a_check_in_one_process(name: str) -> None:
    run_outside(NAIVE_FORGERIES[name] + "\nassert add(2, 3) == 5")
    assert not verdict(NAIVE_FORGERIES[name], "assert add(2, 3) == 5").passed


CANDIDATES = [
    "def f(x): return x + 1",
    "def f(x): return [x + 1]",
    "def f(x): raise ValueError(x)",
    "def f(x): return f(x)",
    "def f(x): yield x",
    "def f(x): return object()",
    "def f(x):\n    import os\n    os._exit(0)",
    "from math import factorial as f",
    "class f(int): pass",
    "def f(x: return",
    "f = None",
    "1 / 0",
    "print('printed')",
    "import sys\nsys.exit(0)",
    "import socket\nsocket.socket()",
    "import os\nos.fork()",
    "open('file', 'w').write('text')",
    "assert open('file').read() == 'text'",
    "open(__import__('os').__file__, 'a')",
    "import threading as t\nx = t.Thread(target=print, args=[1])\nx.start()\nx.join()",
]
TESTS = """
assert f(1) == 2
assert f(3) != 4
assert f(0) == [1]
assert list(f(3)) == [3]
assert f(4) == 24
assert issubclass(type(f(1)), int)
""".strip().split("\n")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=3), st.sampled_from(TESTS))
def test_the_verdict_does_not_depend_on_the_isolation(parts: list[str], tests: str) -> None:
    program = "\n".join(parts)
    outcomes = [verdict(program, tests, isolation=kind) for kind in HELD]
    assert len({(outcome.status, outcome.stdout) for outcome in outcomes}) == 1, outcomes


def test_the_detail_says_why() -> None:
    def detail(program: str, test: str) -> str:
        return verdict(program, test).detail

    assert detail("def f(x): return 1", "assert f(1) == 2") == "AssertionError in: assert f(1) == 2"
    missing = detail("def f(x): return x.y", "f(1)")
    assert missing.startswith("AttributeError: 'int' object has no attribute 'y' in: ")
    unreadable = detail("def f(x): 1 +", "assert f(1)")
    assert unreadable.startswith("Exception: SyntaxError: invalid syntax")
    assert detail("import os\nos._exit(0)", "f(1)") == "the candidate ended before it answered"
    assert run_python("1 / 0").detail == "ZeroDivisionError: division by zero"
    assert run_python("exit('\x1b[2J' + 'x' * 1000)").detail == "?[2J" + "x" * 196
    assert verdict("def f(): return [0] * 10**10", "f()").status == "memory"


# What tests may do with a candidate.

USES = {
    "keywords": ("def f(*a, **k): return [a, k]", "assert f(1, b=2) == [(1,), {'b': 2}]"),
    "floats": (
        "import math\ndef f(x): return math.sqrt(x)",
        "import math\nassert math.isclose(f(4), 2)",
    ),
    "long integers": ("def f(x): return 2 ** x", "assert f(20_000) == 2 ** 20_000"),
    "change a list": (
        "def f(x):\n    x.sort()\n    x.append(9)",
        "x = [2, 1]\nassert f(x) is None and x == [1, 2, 9]",
    ),
    "change a dictionary": (
        "def f(x, y): x[y] = {}",
        "x = {}\nf(x, y=(1, 2))\nassert x == {(1, 2): {}}",
    ),
    "generator": (
        "def f(n):\n    yield from range(n)",
        "assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]",
    ),
    "endless iterator": ("def f(): return iter(int, 1)", "assert next(iter(f())) == 0"),
    "closure": ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
    "class": (
        "class Pair:\n    def __init__(self, a): self.a = a\n"
        "def f(pairs): return [pairs[0].a, *pairs]",
        "p = Pair(1)\np.a += 1\nassert f([p]) == [2, p] and f([p])[1] != Pair(2)",
    ),
    "exception": (
        "class Bad(ValueError): pass\ndef f(): raise Bad('x')",
        "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'x'\n"
        "else:\n    assert False",
    ),
    "subclass": (
        "from collections import Counter\ndef f(x): return Counter(x)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass D:\n    x: int\ndef f(): return D(3)",
        "assert f().x == 3 and f() != f()",
    ),
    "containers": (
        "def f(x): return {frozenset({x}): [b'1'], None: 1j, range(2): bytearray(b'2')}",
        "assert f(1) == {frozenset({1}): [b'1'], None: 1j, range(2): bytearray(b'2')}",
    ),
    "identity": (
        "def f(): return None, True, float('nan')",
        "a, b, c = f()\nassert a is None and b is True and c != c",
    ),
    "asyncio": (
        "import asyncio\nasync def g(): return 1\ndef f(): return asyncio.run(g())",
        "assert f() == 1",
    ),
    "main guard": (
        "if __name__ == '__main__':\n    raise SystemExit\ndef f(): return 1",
        "assert f() == 1",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_tests_use_a_candidate_as_if_it_were_here(name: str) -> None:
    outcome = verdict(*USES[name])
    assert outcome.passed, outcome


def test_humaneval_and_mbpp_run_unchanged() -> None:
    prompt = (
        "def twice(s):\n    return s + s\n\n\ndef half(s: str) -> str:\n    '''The first half.'''\n"
    )
    tests = """
def check(candidate):
    for s in 'ab', '':
        assert candidate(twice(s)) == s

check(half)
"""
    humaneval = {"setup": prompt, "names": ["half"]}
    assert verdict(prompt + "    return s[:len(s) // 2]", tests, **humaneval).passed
    assert not verdict(prompt, tests, **humaneval).passed
    # The tests use the helper of the prompt, not that of the candidate.
    cheat = prompt + "    return ''\ntwice = lambda s: s"
    assert not verdict(cheat, tests, **humaneval).passed
    mbpp = {"setup": "import math", "names": ["sum"]}
    asserts = ["assert sum(1, 2) == 3", "assert math.pi > 3"]
    assert verdict("def sum(a, b): return a + b", asserts, **mbpp).passed
    assert verdict("def f(x): return x", "assert f(1) == 1 and sys.maxsize > 1").passed


def test_callables_cannot_be_handed_over() -> None:
    outcome = verdict("def f(g): return g(1)", "assert f(lambda x: x) == 1")
    assert "cannot be handed" in outcome.detail


numbers = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
hashable = (
    st.none() | st.booleans() | numbers | st.text() | st.binary() | st.frozensets(st.integers())
)
plain = st.recursive(
    hashable
    | st.sets(hashable)
    | st.builds(range, st.integers(), st.integers())
    | st.builds(bytearray, st.binary()),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(hashable, inner),
    max_leaves=10,
)


@settings(max_examples=50)
@given(plain)
def test_values_survive_the_way(value: object) -> None:
    def refuse(_: object) -> Any:
        raise AssertionError("not plain")

    back = decode(encode(value, refuse), refuse)
    assert back == value and type(back) is type(value)


words = st.sampled_from([*remote.TYPES, "object", "int", "value", "error", "StopIteration", "0x1"])
answers = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(words, st.lists(inner, max_size=4))
        | st.dictionaries(st.text(), inner, max_size=2)
    ),
    max_leaves=12,
)
replies = (answers | st.tuples(words, answers, answers)).map(json.dumps).map(str.encode)


@settings(max_examples=300)
@given(replies | st.binary(), st.sampled_from(["call", "next", "len", "getattr"]))
def test_no_answer_brings_code_into_the_tests(reply: bytes, operation: str) -> None:
    def is_plain(value: Any) -> bool:
        parts_of = {**remote.PLAIN, dict: lambda pairs: [*pairs, *pairs.values()]}
        if type(value) in parts_of:
            return all(map(is_plain, parts_of[type(value)](value)))
        return value is None or type(value) in (bool, int, float, str, remote.Remote)

    class TestsEnd(Exception):
        pass

    def end(reason: str) -> None:
        raise TestsEnd(reason)

    argument = [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "fail", end)
        connection = remote.Connection(BytesIO(reply + b"\n"), BytesIO())
        try:
            value = connection.ask(operation, argument)
        except Exception:  # as if the candidate had raised it
            return
    assert is_plain(value) and is_plain(argument)


# Which isolation is used, and bad input.


def test_run_python_gives_input_and_output() -> None:
    outcome = run_python(
        "import sys\nprint(input() + '!')\nprint('err', file=sys.stderr)\nexit(0)", stdin="hä\n"
    )
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("passed", "hä!\n", "err\n")
    assert outcome.isolation == HELD[0]
    long = run_python("print(len(input()))", stdin="x" * (1 << 20), limits=Limits(disk=1 << 16))
    assert long.stdout == f"{1 << 20}\n"  # what it is given is not what it writes
    failed = run_python("def f():\n    raise ValueError('bad')\nf()")
    assert failed.status == "failed"
    assert failed.stderr.count("File") == 2 and 'File "<main>", line 3' in failed.stderr
    assert run_python("exit(3)").detail == "exit status 3"


def test_a_fallback_is_named_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "works", lambda kind: kind == "landlock")
    choice.announce.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [choice.choose(None, False) for _ in range(2)] == ["landlock"] * 2
    [record] = caplog.records
    assert "weaker fallback 'landlock'" in record.message


def test_without_isolation_it_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "works", lambda kind: False)
    choice.announce.cache_clear()
    with pytest.raises(InputError, match="nothing stronger"):
        run_python("print(1)")
    with pytest.raises(InputError, match="nothing stronger"):
        check("def f(): pass", "f()", isolation=WEAK)
    with caplog.at_level(logging.WARNING):
        outcome = run_python("print(1)", allow_weak=True)
    assert (outcome.status, outcome.isolation) == ("passed", WEAK)
    assert "NOT ISOLATED" in caplog.text
    assert not check("import os\nos._exit(86)", "f()", allow_weak=True).passed


def test_a_sandbox_that_cannot_be_set_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dmax.sandbox.process.SOURCES",
        {"jail_source": "def confine(_): 1 / 0", "remote_source": ""},
    )
    with pytest.raises(RuntimeError, match="could not be set up: ZeroDivisionError"):
        run_python("print(1)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tests": "assert 1 == 1"}, "nothing of the candidate"),
        ({"tests": "assert f("}, "not Python"),
        ({"tests": "f()", "isolation": "bublewrap"}, "unknown isolation"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check("def f(): pass", **arguments)


@pytest.mark.parametrize(
    "limit", ["seconds=0", "memory=-1", "disk=1.5", "output=True", "seconds=inf", "threads=None"]
)
def test_limits_are_checked(limit: str) -> None:
    name, _, value = limit.partition("=")
    with pytest.raises(InputError, match=f"`{name}` must be a positive"):
        Limits(**{name: float("inf") if value == "inf" else ast.literal_eval(value)})
