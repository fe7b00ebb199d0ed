"""Where replicas run: a cluster of this machine while a command runs, or one that is there."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from dmax import extras
from dmax.errors import InputError, first_line, shorten, show
from dmax.params import check_number

AUTO = "auto"
"""The address of the cluster that this machine belongs to."""
ADDRESS = re.compile(r"[^/:]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")
REACH_SECONDS = 10.0
WATCH_SECONDS = 1.0
MOST_REPLICAS = 10_000
MOST_GPUS = 64
OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory for prompts and responses on their way; what is more goes to the disk."""
PREFIX = "dmax-ray-"
LONGEST_ROOT = 24
"""Characters of the folder above Ray's; the path of a socket has at most 107."""
STALE_SECONDS = 60.0
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
TOKEN = Path("~/.ray/auth_token")
QUIET = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Environment variables of Ray, for those that are not set; `QUIET` ones without `--debug`."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Which cluster, and how many replicas of a model on it.

    Attributes:
        address: of a cluster that is there, "auto" for the one of this machine; None: one of its
            own, for as long as the command runs.
        replicas: how many; None: as many as there are GPUs for, or one on a cluster without GPUs.
        gpus_per_replica: None: one, or none on a cluster without GPUs.

    Raises:
        InputError: a number out of range, or an address of another kind.
    """

    address: str | None = None
    replicas: int | None = None
    gpus_per_replica: int | None = None

    def __post_init__(self) -> None:
        bounds: dict[str, Any] = dict(whole=True, optional=True)
        check_number("replicas", self.replicas, low=1, high=MOST_REPLICAS, **bounds)
        check_number("gpus_per_replica", self.gpus_per_replica, low=0, high=MOST_GPUS, **bounds)
        if self.address not in (None, AUTO) and not ADDRESS.fullmatch(self.address):
            raise InputError(
                f"`--ray-address` must be HOST:PORT or auto, got {show(self.address)}",
                hint="run the command on a machine of the cluster",
            )


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster: how many cores and GPUs it has."""

    cpus: int
    gpus: int = 0

    def room(self, cpus: int, gpus: int) -> int:
        """How many replicas fit that take so much each."""
        return min(self.cpus // cpus, self.gpus // gpus if gpus else MOST_REPLICAS)


@dataclass(frozen=True, slots=True)
class Placement:
    """How many replicas there are, and what each of them takes.

    Attributes:
        replicas: how many.
        cpus: cores of each, and threads of its model.
        gpus: GPUs of each.
    """

    replicas: int
    cpus: int
    gpus: int


def place(options: RayOptions, nodes: Sequence[Node], *, with_gpus: bool = True) -> Placement:
    """Divide a cluster among replicas.

    Args:
        options: what is asked for.
        nodes: the machines.
        with_gpus: whether the model may run on a GPU.

    Raises:
        InputError: more is asked for than there is.
    """
    num_gpus = sum(node.gpus for node in nodes)
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = 1 if num_gpus and with_gpus else 0
    most = sum(node.gpus // gpus for node in nodes) if gpus else 1
    replicas = options.replicas or max(1, most)
    if gpus and replicas > most:
        each = ", ".join(str(node.gpus) for node in nodes)
        raise InputError(
            f"--replicas {replicas} with --gpus-per-replica {gpus} need {replicas * gpus} GPUs, "
            f"and the machines of the cluster have {each}",
            hint="lower one of the two",
        )
    shares = range(max(node.cpus for node in nodes), 0, -1)
    cpus = next((c for c in shares if sum(node.room(c, gpus) for node in nodes) >= replicas), None)
    if cpus is None:
        each = ", ".join(str(node.cpus) for node in nodes)
        raise InputError(
            f"--replicas {replicas} need a core each, and the machines of the cluster have {each}",
            hint="lower --replicas",
        )
    return Placement(replicas, cpus, gpus)


@contextmanager
def connected(options: RayOptions) -> Iterator[list[Node]]:
    """The machines of the cluster, while this process belongs to it.

    A cluster of its own ends with this process, however that ends: the kernel ends its servers, and
    what they have started ends with them. Under a cluster that is there, the replicas do.

    Raises:
        InputError: Ray is missing, or the cluster cannot be reached.
    """
    check_installed()
    with _folder() if options.address is None else nullcontext() as folder:
        ray = _start(options.address, folder)
        try:
            alive = [node for node in ray.nodes() if node["Alive"]]
            here = ray.get_runtime_context().get_node_id()
            (ours,) = (node for node in alive if node["NodeID"] == here)
            resources = [node["Resources"] for node in alive]
            with _watching((ours["NodeManagerAddress"], ours["NodeManagerPort"])):
                yield [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]
        finally:
            ray.shutdown()


def check_installed() -> None:
    """Raise `InputError` if Ray, or what its Data needs, is not installed."""
    for package in ("ray", "pyarrow"):
        extras.require(package, "scale", "`--ray`")


def _start(address: str | None, folder: Path | None) -> Any:
    """The module `ray`, of a process that belongs to a cluster.

    Args:
        address: of the cluster; None: a new one.
        folder: for the files of a new one.

    Raises:
        InputError: the cluster cannot be reached.
    """
    if address not in (None, AUTO):
        _check_answers(address)
    is_debug = logging.getLogger("dmax").isEnabledFor(logging.DEBUG)
    variables = SETTINGS | _authentication(address) | ({} if is_debug else QUIET)
    os.environ |= {name: value for name, value in variables.items() if name not in os.environ}
    own: dict[str, Any] = dict(
        include_dashboard=False, object_store_memory=OBJECT_STORE, _temp_dir=str(folder)
    )
    with _handling_sigterm(), nullcontext() if is_debug else _without_stderr():
        import ray

        if not is_debug:
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            # It writes what happens to workers to stdout, where results go, and no setting asks.
            ray._private.worker.print_to_stdstream = _say_nothing
        try:
            ray.init(
                address="local" if address is None else address,
                logging_level=logging.INFO if is_debug else logging.CRITICAL,
                log_to_driver=is_debug,
                **(own if address is None else {}),
            )
        except (OSError, RuntimeError, ValueError) as error:
            if address is None:
                raise InputError(f"cannot start Ray: {shorten(first_line(error))}") from error
            raise _unreachable(address, error) from error
    return ray


def _authentication(address: str | None) -> dict[str, str]:
    """Variables that let this process in.

    Ray gives a new cluster the token of the home directory, and writes one there if there is none;
    ours has a token of its own. Clusters that were started with the one there ask for it, but only
    at the address auto does Ray look for it.
    """
    if address is None:
        return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {"RAY_AUTH_MODE": "token"} if TOKEN.expanduser().exists() else {}


def _check_answers(address: str) -> None:
    """Raise `InputError` if nothing answers at HOST:PORT, where Ray itself would wait long."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        f"cannot reach a Ray cluster at {shorten(address)}: {shorten(first_line(error))}",
        hint="`ray start --head` starts a cluster; auto is the one of this machine",
    )


@contextmanager
def _watching(server: tuple[str, int]) -> Iterator[None]:
    """Raise `InputError` once Ray's server on this machine has died.

    Ray would end the process some seconds later, without a word.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(WATCH_SECONDS):
            try:
                socket.create_connection(server, REACH_SECONDS).close()
            except ConnectionRefusedError:
                assert main.ident is not None, "it runs"
                signal.pthread_kill(main.ident, signal.SIGUSR1)
                return
            except OSError:  # such as a timeout, on a machine with much to do
                continue

    before = signal.signal(signal.SIGUSR1, _has_died)
    thread = threading.Thread(target=watch, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def _has_died(number: int, frame: object) -> NoReturn:
    raise InputError(
        "Ray's server on this machine has died",
        hint="what is finished is kept with --output, and the same command goes on",
    )


def _say_nothing(data: Any, **options: Any) -> None:
    """In the place of what prints messages about workers."""


@contextmanager
def _handling_sigterm() -> Iterator[None]:
    """Give SIGTERM back to whoever handles it; Ray takes it, and would end the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep from the terminal what Ray's C++ half writes past `sys.stderr` as it starts."""
    sys.stderr.flush()
    shown = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the sockets and logs of a cluster of our own, with a name that is short enough.

    A command that was killed leaves its folder, which nobody has locked then; a later one removes
    it.
    """
    root = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(str(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    for left in root.glob(f"{PREFIX}*"):
        _remove_unless_used(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    with FileLock(folder / "lock"):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_used(folder: Path) -> None:
    """Remove a folder that no command has locked; a new one may not have come to it yet."""
    with suppress(OSError, Timeout):  # of another user, or in use
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            with FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
