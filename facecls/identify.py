"""``python -m facecls.identify``: which of a network's identities is it? A quick check of converted weights.

The whole image is resized to the network's size, as in keras-vggface's own test, so faces should be cropped closely.
"""

import io
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.lib.format as npy
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from facecls.console import console
from facecls.data.archives import UnreadableError
from facecls.data.folders import file_bytes
from facecls.data.limits import add_limits, set_limits_of
from facecls.data.store import decode, why_unusable
from facecls.errors import CommandParser, UserError, command, program
from facecls.model.checkpoint import check_side
from facecls.model.trunk import CLASSIFIER, create_trunk, read_trunk

_DESCRIPTION = "Prints the most probable of a network's identities for a face: a quick check of converted weights."
_PICKLED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # bytes in pickles of protocol 2, which NumPy wrote until 2019
}
"""All names that a pickled array of str refers to."""
_INDEXED = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_OPCODES = _INDEXED | {
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("GET", "BINGET", "LONG_BINGET", "MEMOIZE", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "EMPTY_LIST", "APPEND", "APPENDS"),
}
"""What a pickled array of str is written in (``pickletools``)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: Words of the command line; ``None`` for the program's own.

    Raises:
        SystemExit: With status 2 and one line on stderr if weights, labels or an image can't be used.
    """
    parser = CommandParser(prog=program("facecls.identify"), description=_DESCRIPTION)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="trunk file converted with --keep-classifier")
    parser.add_argument("images", type=Path, metavar="IMAGE", nargs="+", help="a closely cropped face")
    parser.add_argument("--labels", type=Path, metavar="FILE.npy", help="names, rcmalli_vggface_labels_v2.npy")
    parser.add_argument("--top", type=int, default=5, help="how many identities to print (default: %(default)s)")
    add_limits(parser)
    with command("facecls.identify"):
        options = parser.parse_args(arguments)
        set_limits_of(options)
        if options.top < 1:
            raise UserError(f"Expected --top to be at least 1, but got {options.top}; choose another number.")
        labels = read_labels(options.labels) if options.labels else None
        probabilities = identify(options.weights, options.images)
        if labels and len(labels) != probabilities.shape[1]:
            raise UserError(
                f"Expected {probabilities.shape[1]} labels, but {options.labels} has {len(labels)}; "
                "use the labels that belong to the weights."
            )
        for image, row in zip(options.images, probabilities, strict=True):
            console().print(_table(image, row, labels, options.top))


def read_face(path: Path, size: int) -> Tensor:
    """Reads an image and resizes it.

    Args:
        path: An image in any format that OpenCV reads.
        size: Height and width to resize it to, in pixels.

    Returns:
        (3, size, size) uint8 RGB.

    Raises:
        UserError: If the file is missing, or not a complete image.
    """
    try:
        encoded = file_bytes(path)
    except UnreadableError as error:
        raise UserError(f"Expected an image at {path}, but: {error}; name an image file.") from None
    if (reason := why_unusable(encoded)) is not None:
        raise UserError(f"Expected an image, but {path} is {reason}; name a JPEG or PNG file.")
    pixels = decode(np.frombuffer(encoded, np.uint8))
    how = cv2.INTER_AREA if min(pixels.shape[:2]) > size else cv2.INTER_LINEAR
    resized: Any = cv2.resize(pixels, (size, size), interpolation=how)
    return torch.from_numpy(resized).permute(2, 0, 1)


def identify(weights: Path, images: Sequence[Path]) -> Tensor:
    """Computes the probability of each identity.

    Args:
        weights: A trunk file with a classifier.
        images: Image files.

    Returns:
        (N, C) float probabilities, on the CPU.

    Raises:
        UserError: If the file is missing, is not a trunk file, or has no classifier; or an image can't be used.
    """
    state, metadata = read_trunk(weights)
    if f"{CLASSIFIER}.weight" not in state:
        raise UserError(
            f"Expected weights with a classifier, but {weights} has none; convert them again with --keep-classifier."
        )
    try:
        size = check_side(metadata["input"]["size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"Expected a trunk file that says the size of its images, but {weights} does not; convert it again."
        ) from None
    faces = [read_face(image, size) for image in images]
    trunk = create_trunk(metadata["architecture"], weights).eval()
    with torch.inference_mode():
        features = torch.cat([trunk(face[None]) for face in faces])  # (N, D); one by one, in little memory
        return F.linear(features, state[f"{CLASSIFIER}.weight"], state[f"{CLASSIFIER}.bias"]).softmax(1)  # (N, C)


def read_labels(path: Path) -> list[str]:
    """Reads the names of the identities.

    A file of Python objects, as the public one is, holds a pickle, and a pickle can run any code and make arrays over
    any bytes. So nothing of NumPy is made from it: what it names stays empty, and only the texts are taken.

    Args:
        path: A .npy file with an array of str, as text or as objects.

    Returns:
        Names by class.

    Raises:
        UserError: If the file is missing, or contains anything else.
    """
    try:
        names = _read_npy(file_bytes(path))
    except UnreadableError as error:
        raise UserError(f"Expected labels at {path}, but: {error}; name a .npy file.") from None
    except Exception:  # a damaged pickle can raise anything
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"Expected a .npy file with an array of names, but {path} is none; get it with "
            "`python -m facecls.download labels`."
        )
    return [name.strip() for name in names]


def _read_npy(content: bytes) -> Any:
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    header = npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
    shape, _, dtype = header
    if len(shape) != 1:
        return None
    data = content[stream.tell() :]
    if dtype.hasobject:
        return _unpickled(data)
    if dtype.kind != "U" or shape[0] * dtype.itemsize != len(data):
        return None
    return np.frombuffer(data, dtype).tolist()


def _unpickled(data: bytes) -> Any:
    opcodes = list(pickletools.genops(data))
    # the others can take any memory before a byte of it is read, or refer to what is elsewhere
    if not {opcode.name for opcode, _, _ in opcodes} <= _OPCODES:
        return None
    if any(opcode.name in _INDEXED and int(number or 0) > len(opcodes) for opcode, number, _ in opcodes):
        return None
    array = _ArrayUnpickler(io.BytesIO(data)).load()
    return array.state[-1] if isinstance(array, _Inert) else None


class _Inert:
    """Stands for what a pickle would make, and keeps what it would be made of."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    """Makes nothing but what stands for an array of str."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before NumPy 2
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array of str")
        return _Inert


def _table(image: Path, probabilities: Tensor, labels: list[str] | None, top: int) -> Table:
    table = Table("identity", "probability", title=str(image), title_justify="left")
    values, classes = probabilities.topk(min(top, len(probabilities)))
    for value, number in zip(values.tolist(), classes.tolist(), strict=True):
        table.add_row(labels[number] if labels else f"class {number}", f"{value:.6f}")
    return table


if __name__ == "__main__":
    main()
