"""Reads a file that is to be converted, whatever its format."""

from pathlib import Path

from facecls.errors import UserError
from facecls.files import sha256

_LFS = b"version https://git-lfs.github.com/spec/v1"


def digest(path: Path, kind: str) -> tuple[str, bytes]:
    """Computes the SHA-256 of a file.

    Args:
        path: The file, which is there.
        kind: What it should be, for messages, such as ``a Keras file``.

    Returns:
        The SHA-256 in hexadecimal, and the file's first bytes.

    Raises:
        UserError: If it can't be read, or only points to the file in Git LFS.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
        digested = sha256(path)
    except OSError as error:
        raise UserError(
            f"Can't read {path}: {error.strerror}; check its permissions or copy it to another disk."
        ) from None
    if head.startswith(_LFS):
        raise UserError(
            f"Expected {kind}, but {path} is only a Git LFS pointer to it; run `git lfs pull` in its repository."
        )
    return digested, head
