"""Escapes from the sandbox that work in a plain process: each is tried there first, then inside."""

from __future__ import annotations

import platform
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
from isolated import HELD, LONG, NO_KERNEL, assert_only_outside, every_isolation, run_outside

from dmax.sandbox import Limits, process, run_python
from dmax.sandbox.jail import SYSTEM_CALLS

pytestmark = pytest.mark.skipif(not HELD, reason=NO_KERNEL)
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="code of an x86-64 machine")

OLDER_LANDLOCK = ["landlock 3", "landlock 5"]  # without a say on signals and sockets
MIB = 1 << 20
SMALL = Limits(seconds=LONG, memory=128 * MIB)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its folders during a test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=HELD + OLDER_LANDLOCK)
def kind_of_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of isolation; also Landlock as the older kernels have it."""
    if request.param not in OLDER_LANDLOCK:
        return str(request.param)
    if "landlock" not in HELD:
        pytest.skip("this kernel has no Landlock")
    newest = "MAX_LANDLOCK = 6"
    source = process.SOURCES["jail_source"]
    assert newest in source
    older = source.replace(newest, f"MAX_LANDLOCK = {request.param[-1]}")
    monkeypatch.setitem(process.SOURCES, "jail_source", older)
    return "landlock"


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this user, which a signal would end."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


# System calls.


def test_have_the_kernel_signal_another_process(
    kind_of_kernel: str, victim: subprocess.Popen[bytes]
) -> None:
    program = """
import fcntl, os, socket, struct, termios
ours, theirs = socket.socketpair()
for request, value in (0x8901, victim), (0x8902, victim), (termios.FIOASYNC, 1):
    try:
        fcntl.ioctl(ours, request, struct.pack("i", value))  # FIOSETOWN, SIOCSPGRP, FIOASYNC
    except OSError as error:
        print(error.errno)
os.write(theirs.fileno(), b"x")
"""
    outcome = run_python(f"victim = {victim.pid}{program}", isolation=kind_of_kernel)
    assert outcome.stdout == "1\n1\n1\n", outcome
    assert victim.poll() is None
    run_outside(f"victim = {victim.pid}{program}")
    assert victim.wait() == -signal.SIGIO


def test_ask_a_socket_about_the_machine(kind_of_kernel: str) -> None:
    actions = """
fcntl.ioctl(socket.socketpair()[0], 0x8912, bytes(16))
fcntl.ioctl(socket.socketpair()[0], 0x8913, struct.pack('16s16x', b'lo'))
fcntl.ioctl(socket.socketpair()[0], 0x8927, struct.pack('16s16x', b'lo'))
fcntl.ioctl(socket.socketpair()[0], 0x8910, struct.pack('16si12x', b'', 1))
fcntl.ioctl(socket.socketpair()[0], 0x8903, bytes(4))
fcntl.ioctl(os.pipe()[0], termios.FIOASYNC, struct.pack('i', 1))
socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
socket.socketpair()[0].getsockname()
[pair[0].sendmsg([b'x']) for pair in [socket.socketpair()]]
"""  # SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFHWADDR, SIOCGIFNAME, FIOGETOWN
    assert_only_outside(kind_of_kernel, actions)


REFUSED = """
    accept acct add_key adjtimex bind bpf capget capset chmod chown clock_settime connect
    delete_module fanotify_init finit_module fsconfig fsopen get_mempolicy getpeername
    getsockname getsockopt getxattr init_module inotify_init1 io_setup io_uring_setup ioprio_get
    kcmp kexec_load keyctl landlock_create_ruleset listen listxattr mbind memfd_create
    memfd_secret migrate_pages mknodat mlock modify_ldt mount mount_setattr move_mount move_pages
    mq_open mq_unlink msgget name_to_handle_at open_by_handle_at open_tree perf_event_open
    personality pidfd_getfd pidfd_open pidfd_send_signal pivot_root prctl process_madvise
    process_mrelease process_vm_readv process_vm_writev ptrace quotactl removexattr request_key
    rt_sigqueueinfo rt_tgsigqueueinfo sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler seccomp semget sendmmsg sendmsg setdomainname setgid setgroups setns
    setpgid setpriority setresuid setsid setsockopt settimeofday setuid setxattr shmat shmget
    signalfd4 socket splice statmount swapoff swapon syslog tee timer_create timerfd_create tkill
    truncate umount2 unshare userfaultfd ustat utimensat vmsplice
""".split()


def number_of(name: str) -> int:
    """The number of a system call here; negative if there is none."""
    return int(CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(name.encode()))


def reach(numbers: list[int]) -> str:
    """A program that prints the numbers of those system calls that it is allowed to make."""
    return f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    arguments = [ctypes.c_long(-1)] * 6
    if libc.syscall(ctypes.c_long(number), *arguments) != -1 or ctypes.get_errno() != 1:
        print(number)
"""


@every_isolation
def test_calls_that_reach_past_the_process(kind: str) -> None:
    """A refused call fails for that alone: the kernel never sees its arguments."""
    numbers = sorted(number for name in REFUSED if (number := number_of(name)) >= 0)
    assert len(numbers) > 90 and not set(REFUSED) & set(SYSTEM_CALLS)
    assert run_python(reach(numbers), isolation=kind).stdout == ""


def test_most_of_those_calls_are_open_to_a_plain_process() -> None:
    harmless = """
        memfd_create socket inotify_init1 prctl getxattr ptrace process_vm_readv pidfd_open kcmp
        keyctl add_key shmget semget msgget mq_open timer_create timerfd_create signalfd4 setns
        splice tee vmsplice sendmsg setsockopt getsockname personality userfaultfd bpf
        perf_event_open io_uring_setup unshare name_to_handle_at rt_sigqueueinfo tkill setpriority
    """.split()
    assert set(harmless) <= set(REFUSED)
    reached = run_outside(reach([number_of(name) for name in harmless])).split()
    assert len(reached) > len(harmless) / 2  # some are for root, some a container refuses


@every_isolation
def test_call_clone_with_other_flags(kind: str) -> None:
    """The kernel refuses these flags too, but with EINVAL: the filter lets them through to it."""
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flags in 0x10400, 0x10000, 0x30400, 0x10010400, 0x40010400:
    libc.syscall(ctypes.c_long({number_of("clone")}), ctypes.c_long(flags), 0, 0, 0, 0)
    print(ctypes.get_errno())
"""
    assert run_outside(program).split() == ["22"] * 5
    assert run_python(program, isolation=kind).stdout.split() == ["22"] + ["1"] * 4


@on_x86
@every_isolation
def test_call_as_a_32_bit_program(kind: str) -> None:
    """The numbers of system calls mean others there: 20 is getpid, 2 is fork."""
    program = """
import ctypes, mmap, os
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
print("calls", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid(), flush=True)
"""
    try:
        assert run_outside(program) == "calls\nTrue\n"
    except subprocess.CalledProcessError:
        pytest.skip("this kernel runs no 32-bit programs")
    outcome = run_python(program, isolation=kind)
    assert (outcome.status, outcome.stdout) == ("failed", "calls\n")


@on_x86
@every_isolation
def test_call_with_the_numbers_of_x32(kind: str) -> None:
    program = "import ctypes\nprint(1, flush=True)\nctypes.CDLL(None).syscall(0x40000027)\nprint(2)"
    assert run_outside(program) == "1\n2\n"
    outcome = run_python(program, isolation=kind)
    assert (outcome.status, outcome.stdout) == ("failed", "1\n")


@every_isolation
def test_look_at_other_processes(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    actions = """
open(f'/proc/{parent}/maps')
open(f'/proc/{parent}/cmdline')
open(f'/proc/{parent}/environ')
open(f'/proc/{parent}/stat')
open(f'/proc/self/maps')
open(f'/proc/self/mem', 'r+b')
os.listdir('/proc')
os.listdir(f'/proc/{parent}/fd')
os.readlink(f'/proc/{parent}/cwd')
os.readlink(f'/proc/{parent}/exe')
open(f'/proc/{parent}/root{secret}')
open(f'/proc/self/root{secret}')
open(f'/proc/self/fd/{os.open(secret, os.O_PATH)}')
os.open('secret', 0, dir_fd=os.open(os.path.dirname(secret), os.O_PATH))
os.symlink('/', 'root') or open(f'root{secret}')
os.chdir(os.path.dirname(secret)) or open('secret')
open('/sys/kernel/mm/transparent_hugepage/enabled')
os.listdir('/dev/shm')
os.listdir('/run')
os.mkfifo('fifo')
os.utime('fifo')
os.chmod('fifo', 0o777)
"""
    with subprocess.Popen(["sleep", "600"]) as other:
        assert_only_outside(kind, actions, parent=other.pid, secret=str(secret))
        other.kill()


# Memory and disk that limits of a process do not count.

LEAKS = {
    "what is left of shared memory": """
hoard = []
for _ in range(16):
    hoard.append(mmap.mmap(-1, 1 << 24))
    hoard[-1][:] = bytes(1 << 24)
    hoard[-1].resize(4096)
    print(16, flush=True)
""",
    "what is left of /dev/zero": """
hoard = []
with open("/dev/zero", "r+b") as zero:
    for _ in range(16):
        start = call("mmap", 0, 1 << 24, 3, 1, zero.fileno(), 0)
        ctypes.memset(start, 1, 1 << 24)
        call("munmap", start + 4096, (1 << 24) - 4096)
        print(16, flush=True)
""",
    "page tables": """
for number in range(1, 22_001):
    start = call("mmap", 0x100000000000 + (number << 30), 4096, 3, 0x100022, -1, 0)
    ctypes.memset(start, 1, 1)
    if number % 88 == 0:
        print(1, flush=True)
        time.sleep(min(limit, 0.004))  # a busy machine looks late
time.sleep(limit)
""",
}
PRELUDE = """
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    function = getattr(libc, name)
    function.restype = ctypes.c_long
    result = function(*map(ctypes.c_long, arguments))
    if result in (-1, 0xFFFFFFFF): raise OSError(ctypes.get_errno(), name)  # a long, or an int
    return result
"""


@every_isolation
@pytest.mark.parametrize("leak", LEAKS)
def test_memory_beyond_the_address_space(kind: str, leak: str) -> None:
    """A limit of 128 MiB on the address space alone lets a program take 250 of them."""
    program = PRELUDE + LEAKS[leak]
    outside = run_outside(f"limit = 0{program}", SMALL.memory)
    assert sum(map(int, outside.split())) >= 250
    outcome = run_python(f"limit = {LONG}{program}", isolation=kind, limits=SMALL)
    assert outcome.status == "memory" or outcome.detail.split(":")[0] in (
        "PermissionError",
        "FileNotFoundError",
    )
    assert sum(map(int, outcome.stdout.split())) < 250


@every_isolation
def test_one_small_page_keeps_no_huge_one(kind: str) -> None:
    program = f"""{PRELUDE}
size = 1 << 21
start = call("mmap", 0x200000000000, size, 3, 0x100022, -1, 0)
call("madvise", start, size, 14)  # MADV_HUGEPAGE
ctypes.memset(start, 1, 1)
resident = ctypes.create_string_buffer(512)
call("mincore", start, size, ctypes.addressof(resident))
print(sum(byte & 1 for byte in resident.raw))
"""
    if run_outside(program) != "512\n":
        pytest.skip("this kernel has no huge pages")
    assert run_python(program, isolation=kind).stdout == "1\n"


@every_isolation
def test_more_disk_than_a_look_can_see_in_time(kind: str) -> None:
    program = f"""{PRELUDE}
import os
with open("file", "wb") as file:
    try:
        call("fallocate", file.fileno(), 1, 0, {64 * MIB})  # FALLOC_FL_KEEP_SIZE: no size to limit
    except OSError as error:
        assert error.errno == 95
    print(os.fstat(file.fileno()).st_blocks * 512 >> 20)
"""
    assert int(run_outside(program)) >= 64
    assert run_python(program, isolation=kind).stdout == "0\n"


@every_isolation
def test_signals_that_wait(kind: str) -> None:
    """All processes of a user share the number of signals that may wait."""
    program = """
import os, signal
number = signal.SIGRTMIN
signal.pthread_sigmask(signal.SIG_BLOCK, [number])
for _ in range(1000): os.kill(os.getpid(), number)
count = 0
while signal.sigtimedwait([number], 0): count += 1
print(count)
"""
    assert int(run_outside(program)) == 1000
    assert int(run_python(program, isolation=kind).stdout) <= 65


@every_isolation
def test_a_crash_is_not_collected(kind: str) -> None:
    """A program that collects cores gets them at a limit of 0 too, but not at 1."""
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))"
    allowed = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1
    assert run_python(program, isolation=kind).stdout == f"({allowed}, {allowed})\n"
    assert run_python("import os\nos.abort()", isolation=kind).status == "failed"


@every_isolation
def test_everyday_calls_still_work(kind: str) -> None:
    program = """
import asyncio, contextlib, ctypes, fcntl, mmap, os, select, shutil, socket, sqlite3, sys, tempfile
import threading
assert asyncio.run(asyncio.to_thread(lambda: 3)) == 3
assert not os.isatty(1) and shutil.get_terminal_size()
with open("file", "w+b") as file:
    os.posix_fallocate(file.fileno(), 0, 10_000)
    assert os.fstat(file.fileno()).st_size == 10_000
    with mmap.mmap(file.fileno(), 0) as shared:
        shared[:4] = b"text"
    with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        private[:4] = b"text"
    assert file.read(4) == b"text"
    fcntl.lockf(file, fcntl.LOCK_EX)
    os.set_inheritable(file.fileno(), True)
ours, theirs = socket.socketpair()
ours.sendall(b"x")
theirs.setblocking(False)
assert select.select([theirs], [], [], 5)[0] and theirs.recv(2) == b"x"
with contextlib.closing(sqlite3.connect("base")) as base:
    base.execute("create table t (x)")
    base.execute("insert into t values (1)")
    base.commit()
    assert base.execute("select x from t").fetchall() == [(1,)]
results = []
threads = [threading.Thread(target=results.append, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(results) == list(range(8))
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda a, b: 0)
ctypes.CDLL(None).qsort((ctypes.c_int * 3)(1, 2, 3), 3, 4, compare)
print("whole")
"""
    outcome = run_python(program, isolation=kind, limits=Limits(seconds=LONG))
    assert outcome.stdout == "whole\n", outcome
