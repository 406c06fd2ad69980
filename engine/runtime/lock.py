"""Lock of a folder for one process: a lock file with its owner, which is stale once the owner has ended.

The file holds host, process id and start time as JSON. It is created in one step with its whole content: a hard link to
a temporary file, which NFS makes atomically as well; without hard links in the file system, O_CREAT | O_EXCL.
A lock is stale if its owner has provably ended: same host, and no process with that id, or one that started at another
time, or another boot of the host. Stale locks are removed without a question. An owner on another host (or in another
container) may still be running, so that such a lock is an error; the message names the file to remove after a check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtime.files import full_disk, make_folder

FILE = "lock.json"

# A lock without hard links is empty for a moment.
_EMPTY_FOR_S = 1.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    Attributes:
        host, machine, boot, namespace: Name, machine id, boot id and PID namespace of its host, empty if not available.
        pid: Process id.
        started: Start time in the system's own units.
        since: UTC time at which the lock was taken.
        token: Random text that distinguishes locks of one process.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            machine=_read("/etc/machine-id"),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=os.getpid(),
            started=start_of(os.getpid()) or "",
            since=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            token=secrets.token_hex(8),
        )

    def is_alive(self) -> bool | None:
        """Return whether the process still runs; None if that is not known on this host."""
        here = Owner.this_process()
        if (self.host, self.machine) != (here.host, here.machine):
            return None
        if self.boot != here.boot:
            return False if self.machine else None  # without a machine id, hosts may share a name
        if self.namespace != here.namespace:
            return None
        started = start_of(self.pid)
        return started is not None and (not self.started or not started or started == self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


# (folder, owner of its lock) -> message of the error for a second process.
Refusal = Callable[[Path, Owner], str]


def start_of(pid: int) -> str | None:
    """Return the start time of a process of this host, in the system's own units.

    Empty if the time is not available, None if there is no such process.
    """
    try:
        # The name of the program, in brackets, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if sys.platform == "win32":  # os.kill would end the process
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    if sys.platform == "linux":
        return ""
    with contextlib.suppress(OSError):
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip()
    return ""


class InUse(UserError):
    """Another run holds the lock, or may hold it."""


class FolderLock:
    """A lock of this process."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self._content, self._pid = path, content, os.getpid()

    def release(self) -> None:
        """Remove the lock file; does nothing in a forked child, or if the file belongs to another process by now."""
        if self._pid == os.getpid() and _content(self.path) == self._content:
            self.path.unlink(missing_ok=True)


def take(folder: Path, refusal: Refusal | None = None) -> FolderLock:
    """Take the lock of an existing folder.

    Args:
        folder: The folder.
        refusal: Returns the error message for the folder and its owner; None: a general one.

    Raises:
        UserError: Another run holds the lock, or may hold it, or the folder cannot be written.
        RunStopped: The disk is full.
    """
    path = folder / FILE
    content = json.dumps(dataclasses.asdict(Owner.this_process())).encode() + b"\n"
    try:
        while not _create(path, content):
            check(folder, refusal)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written ({error.strerror}); name another folder") from None
    return FolderLock(path, content)


def check(folder: Path, refusal: Refusal | None = None) -> None:
    """Check that no other run holds a folder, and remove a stale lock.

    Raises:
        UserError: Another run holds it, or may hold it, or it is or lies below a file.
    """
    there = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; give a folder")
    path = folder / FILE
    content = _content_after_wait(path)
    if content is None:
        return
    owner = _owner(content)
    alive = owner.is_alive() if owner else None
    if alive is False:
        _remove_stale(path, content)
        return
    if owner is None or alive is None:
        who = str(owner) if owner else "a lock file that cannot be read"
        raise InUse(
            f"{folder} is locked by {who}; this host cannot tell whether that run is active: check there, and "
            f"only if it has ended remove {path}"
        )
    raise InUse((refusal or _refusal)(folder, owner))


@contextlib.contextmanager
def held(folder: Path, refusal: Refusal | None = None) -> Iterator[None]:
    """Hold the lock of a folder within the context; the folder is created if necessary.

    Raises:
        UserError, RunStopped: See `take`.
    """
    make_folder(folder)
    lock = take(folder, refusal)
    try:
        yield
    finally:
        lock.release()


def _refusal(folder: Path, owner: Owner) -> str:
    return f"{folder}: a run is active in it ({owner}); wait for its end, or name another folder"


def _create(path: Path, content: bytes) -> bool:
    """Create the file with its content in one step; return False if there is one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with full_disk(path, "nothing was changed"):
            temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileNotFoundError:  # the owner of the lock removed the temporary file as a leftover
            return False
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                return temporary.stat().st_nlink == 2  # NFS may report an error for a link that it made
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_exclusively(path, content)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as handle, full_disk(path, "nothing was changed"):
        handle.write(content)
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _content_after_wait(path: Path) -> bytes | None:
    """Return the content of a lock file, after a short wait if it is empty; None if there is none."""
    until = time.monotonic() + _EMPTY_FOR_S
    while (content := _content(path)) == b"" and time.monotonic() < until:
        time.sleep(0.02)
    return content


def _owner(content: bytes) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(content)
        return Owner(**{**values, "pid": int(values["pid"])})
    except (ValueError, TypeError, KeyError):
        return None


def _remove_stale(path: Path, content: bytes) -> None:
    """Remove a lock file if it is still the stale one; of several processes that found it, one removes it.

    Only processes of one host find the same lock stale, so a lock of that host's kernel is sufficient between them.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on Windows

            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)) and handle.read() == content:
            os.unlink(path)


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
