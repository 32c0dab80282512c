"""Archives that would take all memory or never end, and what is in them that is no file: rejects or one line."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from facecls.data import archives
from facecls.data.archives import CUT_OFF, NO_END, UnreadableError, archive_members
from facecls.data.limits import LIMITS
from facecls.data.synthetic import draw_faces
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.predict.inputs import stream as stream_inputs

CONTENT = {"a.jpg": b"first" * 200, "b/c.jpg": b"", "d.jpg": bytes(range(256)) * 9, "é.jpg": b"x"}


def read(archive: Path) -> dict[str, bytes | str]:
    """Bytes of each member, or why it can't be read."""
    found: dict[str, bytes | str] = {}
    for name, load in archive_members(archive):
        try:
            found[name] = load()
        except UnreadableError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["short", "x" * 99, "p" * 99 + "/" + "x" * 99, "long/" * 60 + "x", "naïve\udcff", "a b"]
)
def test_a_tar_has_the_members_that_tarfile_finds(layout: int, name: str, tmp_path: Path) -> None:
    if layout == tarfile.USTAR_FORMAT and len(name) > 256:
        name = name[:255]
    with tarfile.open(tmp_path / "x.tar", "w", format=layout) as tar:
        tar.addfile(_folder())
        for path, data in ({name: b"y" * 700} | CONTENT).items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(tmp_path / "x.tar") as tar:
        wanted = {each.name: tar.extractfile(each).read() for each in tar if each.isreg()}  # type: ignore[union-attr]
    assert read(tmp_path / "x.tar") == wanted
    assert name in wanted


def _folder() -> tarfile.TarInfo:
    folder = tarfile.TarInfo("b")
    folder.type = tarfile.DIRTYPE
    return folder


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "a link in the archive"),
        (tarfile.LNKTYPE, "a link in the archive"),
        (tarfile.FIFOTYPE, "no regular file in the archive"),
        (tarfile.CHRTYPE, "no regular file in the archive"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file in the archive"),
    ],
)
def test_a_member_that_is_no_file_has_its_reason(kind: bytes, reason: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("odd.jpg")
        member.type, member.linkname = kind, "nowhere.jpg"
        tar.addfile(member)
        after = tarfile.TarInfo("a.jpg")
        after.size = 3
        tar.addfile(after, io.BytesIO(b"abc"))
    assert read(tmp_path / "x.tar") == {"odd.jpg": reason, "a.jpg": b"abc"}


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size, kind
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(content: bytes) -> bytes:
    return header(b"pax", b"%011o\0" % len(content), b"x") + content + bytes(-len(content) % 512)


END = bytes(1024)
FILE = header(b"a.jpg", b"%011o\0" % 3) + b"abc" + bytes(509)
HOSTILE_TARS = {
    "negative size": (header(b"a", b"\xff" * 10 + b"\xfe\0") + END, "negative"),
    "negative size in pax": (pax(b"13 size=-512\n") + FILE + END, "no number"),
    "long pax header of digits": (pax(b"1" * 250_000) + FILE + END, "pax header is damaged"),
    "endless pax headers": (pax(b"9 a=bcde\n") * 99 + FILE + END, "too long"),
    "pax header of 8 GB": (header(b"p", b"%011o\0" % (8**11 - 1), b"x") + END, "too long"),
    "member of 6 GB": (header(b"a.jpg", b"\x80" + (6 << 30).to_bytes(11, "big")) + END, "cut off in a member"),
    "size in words": (header(b"a.jpg", b"many bytes!!") + END, "header is damaged"),
    "a name of a megabyte": (header(b"n", b"%011o\0" % 900_000, b"L") + b"x" * 900_096 + FILE + END, "name is longer"),
    "a tail of zeros": (FILE + bytes(3 << 20), "more than .* zeros"),
    "no end": (FILE + FILE[:511], "cut off before its end"),
    "no member after its header": (FILE + pax(b"14 path=b.jpg\n"), "cut off before its end"),
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_hostile_tar_is_one_line(name: str, ending: str, tmp_path: Path) -> None:
    content, message = HOSTILE_TARS[name]
    archive = tmp_path / f"x.{ending}"
    archive.write_bytes(gzip.compress(content, 1) if ending == "tar.gz" else content)
    with pytest.raises(UserError, match=rf"archive .*x\.{ending}: .*{message}"):
        read(archive)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_tar_without_end_marks_is_read_and_says_so(ending: str, tmp_path: Path) -> None:
    """As some programs write it, and as a download may be cut off."""
    name, stream = "1_0_0_20170116174525125.jpg", io.BytesIO()
    face = bytes(cv2.imencode(".jpg", np.zeros((9, 9, 3), np.uint8))[1])
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(face)
        tar.addfile(member, io.BytesIO(face))
        length = tar.offset
    content, archive = stream.getvalue()[:length], tmp_path / f"x.{ending}"
    archive.write_bytes(gzip.compress(content) if ending == "tar.gz" else content)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [name]
    assert read(archive) == {name: face, NO_END: "the archive has no end marks and may be cut off"}
    for root, prefix in ((archive, ""), (tmp_path, f"{archive.name}/")):
        table = read_table(root, 0, UTKFACE)
        assert table.faces["path"].tolist() == [prefix + name]
        assert table.rejects.to_numpy().tolist() == [[prefix + NO_END, CUT_OFF]]
    *_, last = stream_inputs([str(archive)])
    assert last.problem == CUT_OFF


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED, content: dict[str, bytes] = CONTENT) -> bytearray:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_are_read_whatever_their_compression(method: int, tmp_path: Path) -> None:
    data = zipped(tmp_path / "x.zip", method)
    assert read(tmp_path / "x.zip") == CONTENT
    (tmp_path / "x.zip").write_bytes(b"#!/bin/sh\n" + data)  # something before it, as in one that unpacks itself
    assert read(tmp_path / "x.zip") == CONTENT


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_any_compression_is_a_reject(method: int, tmp_path: Path) -> None:
    data = zipped(tmp_path / "x.zip", method)
    start = 30 + len("a.jpg")
    for at in range(start, start + 14):
        data[at] ^= 0xFF
    (tmp_path / "x.zip").write_bytes(data)
    assert read(tmp_path / "x.zip") == CONTENT | {"a.jpg": "damaged or encrypted in the archive"}


def _fewer(data: bytearray, end: int, central: int) -> None:
    """The directory's end says that its last member alone is there."""
    size = 46 + len("é.jpg".encode())
    struct.pack_into("<HHL", data, end + 8, 4, 4, size)


def _miscounted(data: bytearray, end: int, central: int) -> None:
    struct.pack_into("<HH", data, end + 8, 3, 3)


def _no_text(data: bytearray, end: int, central: int) -> None:
    struct.pack_into("<H", data, central + 8, 0x800)
    data[central + 46] = 0xFF


@pytest.mark.parametrize(
    ("change", "message"), [(_fewer, "lists 1 files where 4"), (_miscounted, "lists 4 .* 3"), (_no_text, "decode")]
)
def test_a_zip_with_a_wrong_directory_is_one_line(
    change: Callable[[bytearray, int, int], None], message: str, tmp_path: Path
) -> None:
    data = zipped(tmp_path / "x.zip")
    change(data, data.rindex(b"PK\5\6"), data.index(b"PK\1\2"))
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match=rf"archive .*x\.zip: .*{message}"):
        read(tmp_path / "x.zip")


PLACES = {"crc": (16, 14), "packed": (20, 18), "unpacked": (24, 22), "offset": (42, None), "name": (28, 26)}
"""Of numbers in an entry of the directory, and in the header before the member."""


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", PLACES)
def test_wrong_sizes_and_offsets_give_reasons_and_no_other_bytes(
    name: str, number: int, method: int, tmp_path: Path
) -> None:
    """A member is as it was or has its reason, none is missing, or the archive is refused in one line."""
    content = {key: CONTENT[key] for key in ("a.jpg", "d.jpg")}
    whole = zipped(tmp_path / "x.zip", method, content)
    entry = [at for at in range(len(whole)) if whole[at : at + 4] == b"PK\1\2"][number]
    start = struct.unpack_from("<L", whole, entry + 42)[0]
    form = "<H" if name == "name" else "<L"
    rejects = 0
    for base, place in ((entry, PLACES[name][0]), (start, PLACES[name][1])):
        if place is None:
            continue
        true = struct.unpack_from(form, whole, base + place)[0]
        for value in (0, 1, true - 1, true + 1, 2 * true, len(whole), len(whole) - 1, 0xFFFF, 0xFFFFFFFF, 300_000_000):
            data = bytearray(whole)
            struct.pack_into(form, data, base + place, value & (0xFFFF if form == "<H" else 0xFFFFFFFF))
            (tmp_path / "x.zip").write_bytes(data)
            try:
                found = read(tmp_path / "x.zip")
            except UserError:
                rejects += 1
                continue
            assert len(found) == 2
            for (key, got), (own, wanted) in zip(found.items(), content.items(), strict=True):
                assert isinstance(got, str) or (got == wanted and (key == own or name == "name"))
                rejects += isinstance(got, str)
    assert rejects >= 2


def test_members_that_overlap_are_rejects(tmp_path: Path) -> None:
    data = zipped(tmp_path / "x.zip", content={"a.jpg": b"x" * 99, "b.jpg": b"x" * 99})
    second = data.rindex(b"PK\1\2")
    struct.pack_into("<L", data, second + 42, 0)  # it begins where the first does
    (tmp_path / "x.zip").write_bytes(data)
    assert read(tmp_path / "x.zip") == {
        "a.jpg": b"x" * 99,
        "b.jpg": "damaged: it overlaps another member of the archive",
    }


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_a_member_beyond_the_limit_is_a_reject(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "file_bytes", 1_000)
    archive = tmp_path / f"x.{ending}"
    if ending == "zip":
        zipped(archive, content={"a.jpg": bytes(1_001), "b.jpg": bytes(1_000)})
    else:
        with tarfile.open(archive, "w:gz" if ending == "tar.gz" else "w") as tar:
            for name, size in (("a.jpg", 1_001), ("b.jpg", 1_000)):
                member = tarfile.TarInfo(name)
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    reason = "too large (1,001 bytes; the limit is 1,000, --limits.file_bytes=1001 raises it)"
    assert read(archive) == {"a.jpg": reason, "b.jpg": bytes(1_000)}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_face_whose_name_ends_as_a_folder_s_is_a_reject(kind: str, tmp_path: Path) -> None:
    faces = {f"faces/{name}": bytes(data) for name, data in draw_faces(3, 1)}
    path, lost = tmp_path / f"a.{kind}", sorted(faces)[1]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in faces.items():
                archive.writestr(name, data)
        path.write_bytes(path.read_bytes().replace(lost.encode(), b"faces/\0" + lost[7:].encode()))
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in faces.items():
                member = tarfile.TarInfo("faces/x" if name == lost else name)
                member.type, member.size = tarfile.AREGTYPE, len(data)
                archive.addfile(member, io.BytesIO(data))
        content = bytearray(path.read_bytes())
        at = content.index(b"faces/x\0")
        content[at : at + 8] = b"faces/\0\0"
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        path.write_bytes(content)
    table = read_table(str(path), 0, UTKFACE)
    assert (len(table.faces), len(table.rejects)) == (2, 1)


def test_a_directory_that_understates_a_member_unpacks_no_more(tmp_path: Path) -> None:
    data = zipped(tmp_path / "x.zip", content={"a.jpg": bytes(50_000_000)})
    struct.pack_into("<L", data, data.rindex(b"PK\1\2") + 24, 10)
    (tmp_path / "x.zip").write_bytes(data)
    assert read(tmp_path / "x.zip") == {"a.jpg": "damaged or encrypted in the archive"}


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_an_archive_that_unpacks_to_too_much_is_one_line(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ARCHIVE_ALLOWANCE", 1_000_000)
    content = {f"{number}.jpg": bytes(100_000) for number in range(40)}
    archive = tmp_path / f"x.{ending}"
    if ending == "zip":
        zipped(archive, content=content)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    says = r"unpacks to more than 1,\d+,\d+ bytes, the limit for its size; --limits.archive_growth=1000 raises it"
    with pytest.raises(UserError, match=says):
        read(archive)
    monkeypatch.setattr(LIMITS, "archive_bytes", 2_000)
    with pytest.raises(UserError, match=r"more than 2,000 bytes, .*; --limits.archive_bytes=20000 raises it"):
        read(archive)
    monkeypatch.undo()
    assert read(archive) == content
    monkeypatch.setattr(LIMITS, "names", 39)
    with pytest.raises(UserError, match=r"39 \w+, (the limit; )?--limits.names=\d+ raises it"):
        read(archive)
