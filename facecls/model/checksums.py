"""Checksums of models: a damaged file that still loads would predict something else without a word."""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from facecls.data.zips import open_zip
from facecls.errors import UserError

_UNSEALED = b"0" * 64
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"')
SEAL = {"sha256": _UNSEALED.decode()}
"""What the metadata of a file must hold before ``sealed`` is called, as JSON."""


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, types and shapes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Rejects tensors with a value that is not finite.

    Args:
        tensors: By name.
        source: Where they come from, for messages.

    Raises:
        UserError: If there is one, with its name.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"Expected finite weights in {source}, but {name} holds NaN or infinity; get it again.")


def check_members(archive: Path) -> None:
    """Compares the members of a zip archive, which a checkpoint is, with their checksums, before torch reads it.

    torch itself does not (2.14: its reader is built without the check), and unpacks members that are compressed or
    overlap, which its own never are, to any size.

    Args:
        archive: The file.

    Raises:
        UserError: If one differs, or if they hold more than the file.
        ValueError: If the directory is not what the end of the archive says.
        zipfile.BadZipFile: If it is no such archive.
    """
    with archive.open("rb") as stream, open_zip(stream) as members:
        infos = members.infolist()
        is_packed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
        if is_packed or sum(info.file_size for info in infos) > archive.stat().st_size:
            raise UserError(
                f"Expected the parts of {archive} side by side and unpacked, as torch writes them, but they are packed "
                "or overlap; get the file again."
            )
        if (damaged := members.testzip()) is not None:
            raise UserError(
                f"Expected {archive} as it was written, but its part {damaged} is damaged; get the file again."
            )


def sealed(data: bytes) -> bytes:
    """Puts the checksum of a file into its metadata, whose ``SEAL`` it replaces; all else stays as it is."""
    return _SEAL.sub(b'"sha256": "%s"' % hashlib.sha256(data).hexdigest().encode(), data, count=1)


def is_intact(data: bytes) -> bool:
    """Whether a file is as it was when it was sealed; one that was not is taken to be."""
    if (seal := _SEAL.search(data)) is None:
        return True
    digest = hashlib.sha256(data[: seal.start(1)])
    digest.update(_UNSEALED)
    digest.update(memoryview(data)[seal.end(1) :])
    return digest.hexdigest().encode() == seal[1]
