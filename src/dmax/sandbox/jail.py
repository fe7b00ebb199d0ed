"""What a sandboxed process does to itself before it runs foreign code: standard library alone, sent as source.

Four layers, each of which holds for good: resource limits, fresh namespaces around an own root (if
asked for), Landlock (which files can be opened) and seccomp (which system calls exist). Constants
are those of the kernel's user-space headers.
"""

from __future__ import annotations

import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from ctypes import CDLL, addressof, c_char_p, c_long, create_string_buffer, get_errno
from typing import Any

MACHINES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}  # column of a number below, name of the machine
# Every system call that is let through, on x86-64 and on AArch64; - where there is none. The rest
# does not exist.
CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, lseek 8 62, ioctl 16 29, flock 73 32, fsync 74 82,
fdatasync 75 83, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, sendfile 40 71, copy_file_range 326 285,
open 2 -, openat 257 56, creat 85 -, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43,
fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -, getdents64 217 61, getcwd 79 17,
chdir 80 49, fchdir 81 50, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
unlink 87 -, unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, readlink 89 -,
readlinkat 267 78, umask 95 166, pipe 22 -, pipe2 293 59, socketpair 53 199, eventfd2 290 19, select 23 -,
pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227,
mincore 27 232, brk 12 214, membarrier 324 283, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -, sched_yield 24 124, getcpu 309 168,
sched_getaffinity 204 123, getpriority 140 141, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
getpgrp 111 -, getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, getrandom 318 278, getrlimit 97 163,
setrlimit 160 164, getrusage 98 165, futex 202 98, set_tid_address 218 96, set_robust_list 273 99, rseq 334 293,
restart_syscall 219 128, arch_prctl 158 -, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94
"""
CLONE = (56, 220)
CLONE3 = (435, 435)
FCNTL = (72, 25)
PRLIMIT = (302, 261)
KILL = (62, 129)
TGKILL = (234, 131)
CAPSET = (126, 91)
PIVOT_ROOT = (155, 41)
MOUNT_SETATTR = 442
LANDLOCK_CREATE = 444
LANDLOCK_ADD = 445
LANDLOCK_RESTRICT = 446

Step = tuple[
    int, int, int, int
]  # one instruction of a filter: operation, jump if true, jump if false, value
LOAD = 0x20
EQUAL = 0x15
ANY_BIT = 0x45
ANSWER = 0x06
# the last two: EPERM and ENOSYS
KILL_PROCESS = 0x80000000
ALLOW = 0x7FFF0000
DENY = 0x50001
ABSENT = 0x50026
F_SIGNALS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: have the kernel signal another process
CLONE_THREAD = 0x10000
NEW_NAMESPACES = 0x7E020000  # mount, cgroup, UTS, IPC, user, PID and network
MS_BIND_REC = 0x5000
MS_PRIVATE_REC = 0x44000
MS_NOSUID_NODEV = 0x6
DETACH = 2
READ_FILE = 1 << 2
READ_DIR = 1 << 3
WRITE_FILE = 1 << 1
SCRATCH = (
    0x71BE  # all up to truncation, but to run files and to make devices, sockets and named pipes
)
NEEDED_LANDLOCK = 3  # the first version that also holds truncation


def confine(settings: dict[str, Any]) -> None:
    """Give up for good what `settings` (of `isolation.settings`) says; raises `OSError` where that is not possible."""
    if settings["namespaces"]:
        enter_namespaces(settings)
    limit_resources(settings)
    if sys.platform != "linux":
        return
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which both filters ask for
    die_with_parent()
    is_strong = not settings["is_weak"]
    for layer, is_needed in (
        (restrict_files, settings["landlock"]),
        (drop_capabilities, is_strong),
        (filter_calls, is_strong),
    ):
        try:
            layer(settings)
        except OSError:
            if is_needed:
                raise


def limit_resources(settings: dict[str, Any]) -> None:
    """CPU seconds, file size, open files, address space; no core dumps."""
    limit(resource.RLIMIT_CPU, settings["cpu_seconds"])
    limit(resource.RLIMIT_FSIZE, settings["disk"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # macOS knows it by name alone
        limit(resource.RLIMIT_AS, settings["memory"])
    if settings["is_weak"]:  # elsewhere the filter denies processes, to root as well
        limit(resource.RLIMIT_NPROC, 0)


def limit(kind: int, value: int) -> None:
    """Lower a resource limit for good."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library; raises `OSError` if it fails."""
    function: Callable[..., int] = getattr(CDLL(None, use_errno=True), name)
    result = function(
        *(c_long(value) if isinstance(value, int) else c_char_p(value) for value in arguments)
    )
    if result == -1:
        raise OSError(get_errno(), f"{name}: {os.strerror(get_errno())}")
    return result


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    call("prctl", 1, 9, 0, 0, 0)


def system(numbers: int | tuple[int, int], *arguments: int | bytes | None) -> int:
    """Make a system call by its number, or by its numbers on the machines of `MACHINES`."""
    return call(
        "syscall", numbers if isinstance(numbers, int) else numbers[machine()[0]], *arguments
    )


def drop_capabilities(_: dict[str, Any]) -> None:
    """Make uid 0 a user like others."""
    system(CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24))


def machine() -> tuple[int, int]:
    """This machine's entry in `MACHINES`; raises `OSError` if it has none."""
    if platform.machine() not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(f"no table of system calls for {platform.machine()}")
    return MACHINES[platform.machine()]


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Go on as the only process of new namespaces, whose root holds the readable paths and a bounded scratch."""
    user = os.getuid()
    group = os.getgid()
    call("unshare", NEW_NAMESPACES)
    die_with_parent()
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as stream:
            stream.write(text)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    root = settings["folder"].encode()
    scratch = settings["scratch"].encode()
    call("mount", None, b"/", None, MS_PRIVATE_REC, None)
    call("mount", b"tmpfs", root, b"tmpfs", MS_NOSUID_NODEV, b"size=1m,mode=755")
    for path in settings["readable"] + settings["devices"]:
        place = settings["folder"] + path
        os.makedirs(place if os.path.isdir(path) else os.path.dirname(place), exist_ok=True)
        if not os.path.isdir(path):
            open(place, "x").close()
        call("mount", os.path.realpath(path).encode(), place.encode(), None, MS_BIND_REC, None)
    os.mkdir(root + scratch)
    system(
        MOUNT_SETATTR, -100, root, 0x8000, struct.pack("4Q", 1, 0, 0, 0), 32
    )  # read-only, with all below
    bounds = f"size={settings['disk']},nr_inodes={settings['entries']},mode=700".encode()
    call("mount", b"tmpfs", root + scratch, b"tmpfs", MS_NOSUID_NODEV, bounds)
    os.chdir(root)
    system(PIVOT_ROOT, b".", b".")  # the old root now lies on the new one
    call("umount2", b".", DETACH)
    os.chdir(scratch)


def restrict_files(settings: dict[str, Any]) -> None:
    """Landlock: read the readable paths, write the scratch, open nothing else; no TCP, no signals to others."""
    version = system(LANDLOCK_CREATE, None, 0, 1)
    if version < NEEDED_LANDLOCK:
        raise OSError(f"Landlock {version} is too old")
    handled = (1 << (16 if version >= 5 else 15)) - 1
    ruleset = struct.pack("3Q", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = system(LANDLOCK_CREATE, ruleset, len(ruleset), 0)
    for path in settings["readable"]:
        allow(rules, path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE)
    for path in settings["devices"]:
        allow(rules, path, READ_FILE | WRITE_FILE)
    allow(rules, settings["scratch"], SCRATCH)
    system(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def allow(rules: int, path: str, access: int) -> None:
    """Add a path to a Landlock ruleset, with all below it."""
    place = os.open(path, os.O_PATH)
    system(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, place), 0)
    os.close(place)


def filter_calls(_: dict[str, Any]) -> None:
    """Seccomp: the calls of the table; threads but no processes; signals and limits for this process alone."""
    column, audit = machine()
    me = os.getpid()
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (ANSWER, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0)]
    code += branch(CLONE[column], 0, ANY_BIT, (CLONE_THREAD,), ALLOW, DENY)
    code += branch(
        CLONE3[column], 0, EQUAL, (), ALLOW, ABSENT
    )  # hides its flags; the C library falls back on clone
    code += branch(FCNTL[column], 1, EQUAL, F_SIGNALS, DENY, ALLOW)
    code += branch(PRLIMIT[column], 0, EQUAL, (0,), ALLOW, DENY)
    code += branch(KILL[column], 0, EQUAL, (me,), ALLOW, DENY) + branch(
        TGKILL[column], 0, EQUAL, (me,), ALLOW, DENY
    )
    for entry in CALLS.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            code += [(EQUAL, 0, 1, int(number)), (ANSWER, 0, 0, ALLOW)]
    code.append((ANSWER, 0, 0, DENY))
    table = create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    call(
        "prctl", 22, 2, struct.pack("HP", len(code), addressof(table))
    )  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def branch(
    number: int, argument: int, test: int, values: tuple[int, ...], then: int, other: int
) -> list[Step]:
    """Filter steps for one call: `then` if an argument (its low half) meets one of the values, else `other`."""
    body = [(LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        body += [(test, 0, 1, value), (ANSWER, 0, 0, then)]
    body.append((ANSWER, 0, 0, other))
    return [(EQUAL, 0, len(body), number), *body]
