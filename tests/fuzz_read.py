"""Feeds the readers of faces thousands of damaged and hostile files: ``python tests/fuzz_read.py KIND COUNT``.

KIND is ``tar``, ``zip``, ``image``, ``csv`` or ``parquet``, or several with commas between them. Each file is a sound
one with random changes: bytes flipped, cut, repeated or zeroed, and numbers of headers replaced by extreme ones. Each
is read for training and for prediction in a process of its own, which must find faces and rejects, or raise a
``UserError``, within half a minute and 2 GB. What has check sums must not come back changed, and of what a sound file
holds nothing may be missing without a word. Prints what was otherwise, keeps those files, and exits with 1 if there is
any.
"""

import gzip
import hashlib
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pillow_heif
from children import run_in_child
from damage import damaged
from PIL import Image

from facecls.data.archives import UnreadableError
from facecls.data.store import decode, why_unusable
from facecls.data.synthetic import draw_faces
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.predict.inputs import stream

KINDS = ("tar", "zip", "image", "csv", "parquet")
SECONDS, BYTES = 30, 2 << 30
FACES = 6
ENDINGS = {"tar": (".tar", ".tar.gz"), "zip": (".zip",), "csv": (".csv",), "parquet": (".parquet",)}
EXTREMES = (0, 1, -1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)


def _extreme(data: bytes, rng: random.Random) -> bytes:
    """Replaces a number of 1 to 8 bytes somewhere in the first or last bytes, where headers and directories are."""
    changed = bytearray(data)
    width = rng.choice((1, 2, 4, 8))
    span = min(len(changed) - width, rng.choice((32, 128, 600)))
    at = rng.randrange(span + 1) if rng.random() < 0.6 else len(changed) - width - rng.randrange(span + 1)
    number = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
    changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    return bytes(changed)


def _change(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice((damaged, _extreme))(data, rng)
        if len(data) < 64:
            break
    return data


def _tar_header(data: bytes, rng: random.Random) -> bytes:
    """Changes a header of a tar and mends its check sum, so that it is believed."""
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not blocks:
        return _change(data, rng)
    at = rng.choice(blocks)
    changed = bytearray(data)
    block = bytearray(changed[at : at + 512])
    place, width = rng.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155)))
    block[place : place + width] = rng.choice((os.urandom, bytes, lambda n: b"7" * n, lambda n: b"\xff" * n))(width)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    changed[at : at + 512] = block
    return bytes(changed)


def _seeds(kind: str, folder: Path) -> list[Path]:
    """Sound files."""
    faces = {f"faces/{name}": bytes(data) for name, data in draw_faces(FACES, 3)}
    if kind == "tar":
        for layout, ending in (
            (tarfile.USTAR_FORMAT, "tar"),
            (tarfile.PAX_FORMAT, "tar"),
            (tarfile.GNU_FORMAT, "tar.gz"),
        ):
            with tarfile.open(
                folder / f"{layout}.{ending}", "w:gz" if ending == "tar.gz" else "w", format=layout
            ) as tar:
                for name, data in faces.items():
                    member = tarfile.TarInfo(name if layout == tarfile.USTAR_FORMAT else f"é{'x' * 120}/{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    elif kind == "zip":
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        for method in methods:
            with zipfile.ZipFile(folder / f"{method}.zip", "w", method) as archive:
                for name, data in faces.items():
                    archive.writestr(name, data)
    elif kind == "image":
        _images(next(iter(faces.values())), folder)
    else:
        for path, data in faces.items():
            (folder / Path(path).name).write_bytes(data)
        table = pd.DataFrame({"path": [Path(path).name for path in faces], "age": range(20, 20 + FACES), "sex": "f"})
        if kind == "csv":
            table.to_csv(folder / "0.csv", index=False)
            table.to_csv(folder / "1.csv", index=False, sep=";", encoding="utf-16")
        else:
            table.to_parquet(folder / "0.parquet", compression="zstd")
            table.to_parquet(folder / "1.parquet", compression=None, use_dictionary=False)
    return sorted(path for path in folder.iterdir() if kind == "image" or path.name.endswith(ENDINGS[kind]))


def _images(face: bytes, folder: Path) -> None:
    pillow_heif.register_heif_opener()
    pixels = decode(np.frombuffer(face, np.uint8))
    for number, ending in enumerate((".jpg", ".png", ".webp", ".bmp", ".jp2", ".hdr", ".sr", ".ppm", ".pam", ".tiff")):
        values = pixels.astype(np.float32) if ending == ".hdr" else pixels
        (folder / f"{number}{ending}").write_bytes(cv2.imencode(ending, values)[1].tobytes())
    image = Image.fromarray(pixels).resize((64, 64))
    for form, options in (
        ("GIF", {}), ("AVIF", {}), ("HEIF", {}), ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True}), ("JPEG2000", {"no_jp2": True}),
    ):  # fmt: skip
        name = "-".join([form, *map(str, options.values())])
        image.save(folder / name, form, **options)


def _read(path: Path, kind: str) -> str:
    """Reads a file as training and prediction do; says how that ended."""
    if kind == "image":
        data = path.read_bytes()
        ends = {"refused" if why_unusable(data) else "read"}
    else:
        try:
            table = read_table(path, 0, UTKFACE)
            ends = {json.dumps([table.faces["sha1"].tolist(), len(table.rejects)])}
        except UserError:
            ends = {"refused"}
    for given in stream([str(path)]):
        try:
            pixels = given.load()
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8
        except UnreadableError:
            pass
    return ends.pop()


def _run(path: Path, kind: str, said: Path) -> tuple[str, float]:
    """Reads a file in a child of this process; says how that ended, and after how many seconds."""

    def read() -> int:
        said.with_suffix(".end").write_text(_read(path, kind))
        return 0

    ended = run_in_child(read, said, SECONDS)
    if ended.status < 0:
        return f"signal {-ended.status}", ended.seconds
    if ended.memory > BYTES:
        return "memory", ended.seconds
    return ("traceback" if ended.status else said.with_suffix(".end").read_text()), ended.seconds


def _judged(end: str, kind: str, is_checked: bool) -> str:
    """Whether faces came back as they were, and all of them as faces or rejects."""
    if not end.startswith("["):
        return end
    found, rejects = json.loads(end)
    known = {hashlib.sha1(data).hexdigest() for _, data in draw_faces(FACES, 3)}
    if is_checked and not known >= set(found):
        return "changed"
    if is_checked and len(found) + rejects < FACES:
        return "missing"
    return "read"


def main(kind: str, count: int) -> int:
    """Runs the cases of a kind.

    Args:
        kind: One of ``KINDS``.
        count: How many.

    Returns:
        The number of those that ended badly.
    """
    ends: Counter[str] = Counter()
    longest = 0.0
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = _seeds(kind, folder)
        for number in range(count):
            rng = random.Random(number)
            seed = rng.choice(seeds)
            ending = "".join(Path(seed.name).suffixes)
            path = folder / f"damaged-{number}{ending}"
            data, is_packed = seed.read_bytes(), seed.name.endswith(".gz")
            change: Callable[[bytes, random.Random], bytes] = _tar_header if kind == "tar" else _change
            change = change if rng.random() < 0.5 else _change
            is_inner = is_packed and rng.random() < 0.5
            data = gzip.compress(change(gzip.decompress(data), rng), 1) if is_inner else change(data, rng)
            path.write_bytes(data)
            end, seconds = _run(path, kind, folder / "said")
            end = _judged(end, kind, is_checked=kind == "zip" or (is_packed and not is_inner))
            longest = max(longest, seconds)
            ends[end] += 1
            if end not in ("read", "refused"):
                path.rename(kept / path.name)
                (kept / f"{number}.txt").write_text(f"{end}\n{(folder / 'said').read_text(errors='replace')}")
            else:
                path.unlink()
    bad = sum(ends.values()) - ends["read"] - ends["refused"]
    if not bad:
        kept.rmdir()
    print(
        f"{kind}: {count} files: {dict(ends)}, longest {longest:.1f} s" + (f"; see {kept}" if bad else ""), flush=True
    )
    return bad


if __name__ == "__main__":
    cv2.setNumThreads(0)
    sys.exit(sum(main(kind, int(sys.argv[2])) for kind in sys.argv[1].split(",")) > 0)
