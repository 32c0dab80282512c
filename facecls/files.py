"""Writing files so that nothing half written is ever seen, and their digests."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from facecls.errors import UserError


@contextmanager
def replacing(dest: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``dest`` to write to, and renames it to ``dest`` if the body succeeds.

    If the body fails, the temporary file is removed and ``dest`` stays as it was.

    Args:
        dest: The file to create or replace; its folder must exist.

    Yields:
        The temporary path, on the same file system as ``dest``; it exists and is empty.

    Raises:
        UserError: If the folder is missing or not writable, or the disk is full.
    """
    if dest.is_dir():
        raise UserError(f"Expected a file to write to, but {dest} is a folder; name a file in it.")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{dest.name}.", suffix=".part", dir=dest.parent)
    except OSError as error:
        raise UserError(f"Can't write {dest}: {error.strerror}; name a folder that exists and is writable.") from None
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        part.replace(dest)
    except OSError as error:
        raise UserError(
            f"Can't write {dest}: {error.strerror or error}; free some space or name another place."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
