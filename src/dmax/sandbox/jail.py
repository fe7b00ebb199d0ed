"""What a sandboxed process does to itself before it runs untrusted code.

There are four layers, and none of them can be undone: new namespaces around a root folder of its
own (for the kind `namespaces`), resource limits, Landlock (which files can be opened), and seccomp
(which system calls can be made). The process gets this file as source, so it imports nothing
besides the standard library. Numbers are those of the kernel's headers for user space.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
import struct
import sys
import termios
from collections.abc import Callable
from ctypes import CDLL, c_char_p, c_long, c_uint32, c_void_p, get_errno
from typing import Any

# Every system call that untrusted code may make. libseccomp knows the number of each name on this
# machine, and leaves out those that the machine does not have.
SYSTEM_CALLS = """
    read write readv writev pread64 pwrite64 preadv pwritev sendfile copy_file_range
    open openat creat close close_range dup dup2 dup3 lseek flock
    fsync fdatasync ftruncate fadvise64
    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2
    getdents getdents64 getcwd chdir fchdir umask mkdir mkdirat rmdir
    rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat readlink readlinkat
    pipe pipe2 eventfd2 select pselect6 poll ppoll
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    munmap mremap mprotect madvise msync mincore brk membarrier
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend
    sigaltstack pause alarm getitimer setitimer
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
    getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid
    getpgrp getpgid getsid getpriority getrlimit setrlimit getrusage uname sysinfo getrandom
    sched_yield sched_getaffinity getcpu futex rseq
    set_tid_address set_robust_list restart_syscall arch_prctl wait4 waitid exit exit_group
""".split()
# What fcntl and ioctl may be asked for. Other requests have the kernel signal another process
# (F_SETOWN, FIOSETOWN), show the addresses of the machine (SIOCGIFCONF), or type into a terminal.
FILE_COMMANDS = """
    F_DUPFD F_DUPFD_CLOEXEC F_GETFD F_SETFD F_GETFL F_SETFL F_GETLK F_SETLK F_SETLKW
    F_GETPIPE_SZ F_SETPIPE_SZ
""".split()
DEVICE_COMMANDS = "TCGETS TIOCGWINSZ FIONREAD FIONBIO FIOCLEX FIONCLEX".split()
FLAGS_FIRST = ("x86_64", "aarch64")  # machines on which the first argument of clone is its flags
CLONE_FILES = 0x400
CLONE_THREAD = 0x10000
AF_UNIX = 1
SOCK_STREAM = 1
SOCKET_TYPE = 0xF  # the rest of the argument is flags

SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x50000  # and the error
SCMP_CMP_EQ = 4
SCMP_CMP_MASKED_EQ = 7

# Not every C library knows these system calls; their numbers are the same on every machine.
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

MIN_LANDLOCK = 3  # the first version that also holds truncation
MAX_LANDLOCK = 6  # the last version whose rights are known here
WRITE_FILE = 0x2
READ_FILE = 0x4
READ_DIR = 0x8
USE_SCRATCH = 0x71BE  # all but to run files and to make devices, sockets and named pipes

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
CAPABILITY_VERSION = 0x20080522
NEW_NAMESPACES = 0x7E020000  # mount, cgroup, UTS, IPC, user, PID and network
BIND_RECURSIVELY = 0x5000
PRIVATE_RECURSIVELY = 0x44000
NOSUID_NODEV = 0x6
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1
MNT_DETACH = 2


def confine(settings: dict[str, Any]) -> None:
    """Give up for good what `isolation.jail_settings` says.

    Raises:
        OSError: a layer that this kind of isolation needs cannot be set up.
    """
    kind = settings["kind"]
    is_strong = kind != "limits only"
    if kind == "namespaces":
        enter_namespaces(settings)
    if kind == "bubblewrap":  # it can bound the bytes of a file system, not the number of files
        mount_scratch(settings["scratch"], settings)
        os.chdir(settings["scratch"])
    limit_resources(settings)
    if sys.platform != "linux":
        return
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # Landlock and seccomp ask for it
    die_with_parent()
    layers = [
        (restrict_files, kind == "landlock"),
        (refuse_huge_pages, is_strong),
        (drop_capabilities, is_strong),
        (filter_system_calls, is_strong),
    ]
    for layer, is_needed in layers:
        try:
            layer(settings)
        except OSError:
            if is_needed:
                raise


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library; raises `OSError` if it fails."""
    function: Callable[..., int] = getattr(CDLL(None, use_errno=True), name)
    converted = [c_long(each) if isinstance(each, int) else c_char_p(each) for each in arguments]
    result = function(*converted)
    if result == -1:
        raise OSError(get_errno(), f"{name}: {os.strerror(get_errno())}")
    return result


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def refuse_huge_pages(_: dict[str, Any]) -> None:
    """Have small pages only: one that is left of a huge page would keep all its memory."""
    call("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)


def drop_capabilities(_: dict[str, Any]) -> None:
    """Make root a user like others."""
    call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))


def limit_resources(settings: dict[str, Any]) -> None:
    """Limit time, memory, files and waiting signals; dump no core."""
    limits = {
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_FSIZE: settings["disk"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = settings["memory"]  # macOS has the name, ignores the limit
        limits[resource.RLIMIT_CORE] = 1  # at 0 a program that collects cores still gets them
        limits[resource.RLIMIT_SIGPENDING] = 64  # all processes of a user share them
    if settings["kind"] == "limits only":  # elsewhere the filter denies processes, to root too
        limits[resource.RLIMIT_NPROC] = 0
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (lowered, lowered))


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Go on as the only process of new namespaces, in a new root folder.

    The root folder holds the readable paths, read-only, and a writable folder of bounded size.
    """
    user = os.getuid()
    group = os.getgid()
    call("unshare", NEW_NAMESPACES)
    die_with_parent()
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")
    if child := os.fork():  # only a child is inside the new PID namespace
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)

    root = settings["root"].encode()
    scratch = settings["scratch"].encode()
    call("mount", None, b"/", None, PRIVATE_RECURSIVELY, None)
    mount_memory(root, "size=1m,mode=755")
    for path in settings["readable"] + settings["devices"]:
        place = settings["root"] + path
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            write(place, "")
        source = os.path.realpath(path)
        call("mount", source.encode(), place.encode(), None, BIND_RECURSIVELY, None)
    os.mkdir(root + scratch)
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, root, AT_RECURSIVE, attributes, 32)
    mount_scratch(settings["root"] + settings["scratch"], settings)

    os.chdir(root)
    call("pivot_root", b".", b".")  # the old root folder now lies on the new one
    call("umount2", b".", MNT_DETACH)
    os.chdir(scratch)


def write(path: str, text: str) -> None:
    """Write a file."""
    with open(path, "w") as stream:
        stream.write(text)


def mount_scratch(place: str, settings: dict[str, Any]) -> None:
    """Mount the writable folder, with bounds on its bytes and on the number of files in it."""
    bounds = f"size={settings['disk']},nr_inodes={settings['entries']},mode=700"
    mount_memory(place.encode(), bounds)


def mount_memory(place: bytes, options: str) -> None:
    """Mount a file system in memory."""
    call("mount", b"tmpfs", place, b"tmpfs", NOSUID_NODEV, options.encode())


def restrict_files(settings: dict[str, Any]) -> None:
    """Landlock: read the readable paths, use the writable folder, open nothing else.

    Newer versions also refuse TCP, abstract sockets and signals to other processes.
    """
    version = min(call("syscall", LANDLOCK_CREATE_RULESET, None, 0, 1), MAX_LANDLOCK)
    if version < MIN_LANDLOCK:
        raise OSError(f"Landlock {version} is too old")
    num_file_rights = 15 if version < 5 else 16
    refused = [(1 << num_file_rights) - 1]
    if version >= 4:
        refused.append(3)  # to bind and to connect
    if version >= 6:
        refused.append(3)  # abstract sockets and signals
    ruleset = struct.pack(f"{len(refused)}Q", *refused)
    rules = call("syscall", LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    for path in settings["readable"]:
        allow_path(rules, path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE)
    for path in settings["devices"]:
        allow_path(rules, path, READ_FILE | WRITE_FILE)
    allow_path(rules, settings["scratch"], USE_SCRATCH)
    call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def allow_path(rules: int, path: str, rights: int) -> None:
    """Add a path and all below it to a Landlock ruleset."""
    place = os.open(path, os.O_PATH)
    call("syscall", LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def filter_system_calls(_: dict[str, Any]) -> None:
    """Seccomp: no calls but `SYSTEM_CALLS`, no new processes, signals to this process only.

    Raises:
        OSError: libseccomp is missing or too old, or not known to be right on this machine.
    """
    if platform.machine() not in FLAGS_FIRST:
        raise OSError(f"the filter is not known to be right on {platform.machine()}")
    seccomp = CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = c_void_p
    rules = c_void_p(seccomp.seccomp_init(c_uint32(SCMP_ACT_ERRNO | errno.EPERM)))

    def ensure(error: int, what: str) -> None:
        if error:
            raise OSError(-error, f"libseccomp: {what}: {os.strerror(-error)}")

    def add(name: str, *conditions: bytes, action: int = SCMP_ACT_ALLOW) -> None:
        """Add a rule for calls that meet all conditions."""
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        packed = b"".join(conditions) or None
        error = seccomp.seccomp_rule_add_array(
            rules, c_uint32(action), number, len(conditions), packed
        )
        ensure(error, name)

    for name in SYSTEM_CALLS:
        add(name)
    # A filter cannot see clone3's flags. Where there is no clone3, the C library uses clone.
    add("clone3", action=SCMP_ACT_ERRNO | errno.ENOSYS)
    # A thread with descriptors of its own would have as many again.
    add("clone", has(0, CLONE_THREAD | CLONE_FILES | NEW_NAMESPACES, CLONE_THREAD | CLONE_FILES))
    # A file can be given more than a look at the folder can see in time. Without this call, the C
    # library writes zeros.
    add("fallocate", action=SCMP_ACT_ERRNO | errno.EOPNOTSUPP)
    # Shared memory without a file stays whole when all but one page of it is unmapped.
    add("mmap", has(3, mmap.MAP_ANONYMOUS, 0))
    add("mmap", has(3, mmap.MAP_SHARED, 0))
    # asyncio wakes itself up through a pair of sockets. They have no address to send to.
    add("socketpair", equals(0, AF_UNIX), has(1, SOCKET_TYPE, SOCK_STREAM))
    for name in ("sendto", "recvfrom"):
        add(name, equals(3, 0), equals(4, 0))
    add("prlimit64", equals(0, 0))
    add("kill", equals(0, os.getpid()))
    add("tgkill", equals(0, os.getpid()))
    for name in FILE_COMMANDS:
        add("fcntl", equals(1, getattr(fcntl, name)))
    for name in DEVICE_COMMANDS:
        add("ioctl", equals(1, getattr(termios, name)))
    ensure(seccomp.seccomp_load(rules), "the filter")


def equals(place: int, value: int) -> bytes:
    """The condition that the argument at a place has a value, for libseccomp."""
    return struct.pack("IIQQ", place, SCMP_CMP_EQ, value, 0)


def has(place: int, mask: int, bits: int) -> bytes:
    """The condition that of the bits in a mask an argument has these and no others."""
    return struct.pack("IIQQ", place, SCMP_CMP_MASKED_EQ, mask, bits)
