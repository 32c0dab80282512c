"""Locks: a file that says which process writes another file or a folder."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from facecls.errors import UNSUPPORTED, UserError
from facecls.terminal import say


@contextmanager
def locked(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock, without which no other process writes the same.

    It is a file with this machine's name and this process's number. That works where file systems can't lock, and the
    lock of a process that was killed is taken over. Where no file can be created exclusively either, nothing is held,
    and a line on standard error says so.

    Args:
        lock: The file; its folder must exist.
        what: What is written, for messages.

    Raises:
        UserError: If another process holds it, or it can't be written.
    """
    own = {"machine": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
    while (is_held := _create(lock, own, what)) is False:
        before = _read(lock)
        if before is None:
            continue  # it has just been removed
        if not _is_stale(before, own):
            raise UserError(
                f"Expected to be the only one that writes {what}, but {_describe(before)} does, as {lock} says; wait "
                "for it, or delete that file if there is no such process."
            )
        _remove(lock, before)
    try:
        yield
    finally:
        if is_held:
            with suppress(OSError):  # where nothing can be removed; that the process has ended, the next one sees
                lock.unlink(missing_ok=True)


def _create(lock: Path, own: Mapping[str, Any], what: str) -> bool | None:
    """Creates the file, and returns whether it was not there yet; ``None`` where file systems have no such call."""
    try:
        with lock.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(own))
    except FileExistsError:
        return False
    except OSError as error:
        if lock.exists():  # the disk is full
            lock.unlink()
        if error.errno in UNSUPPORTED and os.access(lock.parent, os.W_OK):
            say(f"{lock.parent} can't keep two processes apart ({error.strerror}): start no other that writes {what}")
            return None
        raise UserError(f"Can't write {lock}: {error.strerror}; {what} must be in a place that is writable.") from None
    return True


def _read(lock: Path) -> Any:
    """What the file says; nothing readable if it is damaged or being written, ``None`` if it is gone."""
    try:
        return json.loads(lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _is_stale(holder: Any, own: Mapping[str, Any]) -> bool:
    """Whether the process that holds a lock has ended."""
    if not isinstance(holder, dict) or holder.get("machine") != own["machine"]:
        return False
    number = holder.get("process")
    if not isinstance(number, int) or number <= 0:
        return False
    before, now = holder.get("started"), _started(number)
    is_another = None not in (before, now) and before != now  # numbers are given again, in containers soon
    return is_another or not _is_alive(number)


def _describe(holder: Any) -> str:
    if isinstance(holder, dict) and {"machine", "process"} <= holder.keys():
        return f"process {holder['process']} on {holder['machine']}"
    return "another process"


def _remove(lock: Path, stale: Any) -> None:
    """Removes a stale lock, unless another process has just replaced it by its own."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != stale:
        aside.rename(lock)
    else:
        aside.unlink()


def _is_alive(number: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end it; a person decides
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def _started(number: int) -> int | None:
    """When a process started, in ticks since the machine did; ``None`` where there is no /proc."""
    try:
        # proc(5), field 22; the name in brackets may hold spaces
        return int(
            Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, IndexError):
        return None
