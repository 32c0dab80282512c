"""``python -m convert``: converts a Keras VGGFace2 ResNet-50 to a trunk file, verified before it is written."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from facecls._version import __version__
from facecls.errors import UserError, command, program
from facecls.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from convert.keras_h5 import KerasFile

_DESCRIPTION = "Converts keras-vggface's VGGFace2 ResNet-50 to a trunk file, and verifies it before writing anything."
CONVERTER = f"facecls {__version__}"
"""Named in the metadata of the trunk file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Raises:
        SystemExit: With status 2 and one line on stderr if the file can't be converted.
    """
    parser = argparse.ArgumentParser(prog=program("convert"), description=_DESCRIPTION)
    parser.add_argument("source", type=Path, metavar="SOURCE.h5", help="whole model or weights only, saved by Keras 2")
    parser.add_argument("dest", type=Path, metavar="DEST.safetensors", help="the trunk file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="also write the ONNX model (takes BGR minus mean)")
    parser.add_argument("--keep-classifier", action="store_true", help="keep the 8631 identities, for facecls.identify")
    options = parser.parse_args(arguments)
    with command("convert"):
        convert(options.source, options.dest, options.onnx, options.keep_classifier)


def convert(source: Path, dest: Path, onnx_dest: Path | None, keep_classifier: bool) -> None:
    """Converts a file, verifies the result, writes it and prints a summary.

    Args:
        source: The Keras .h5 file.
        dest: The trunk file to write.
        onnx_dest: Where to write the ONNX model as well; ``None`` for nowhere.
        keep_classifier: Whether the trunk file includes the classifier.

    Raises:
        UserError: If the file can't be converted or the result can't be written; then nothing is written.
    """
    paths = [path.resolve() for path in (source, dest, onnx_dest) if path]
    if len(set(paths)) < len(paths):
        raise UserError("Expected different files to read and to write, but one is named twice; name another.")
    # heavy libraries are imported late, so that neither --help nor a wrong file waits for them
    from convert.keras_h5 import open_keras

    with open_keras(source) as file, replacing(onnx_dest) if onnx_dest else nullcontext() as onnx_part:
        if keep_classifier and not file.classifier:
            raise UserError(f"{source} has no classifier to keep; use a file that has one or drop --keep-classifier.")
        with _temporary_onnx(dest, file, keep_classifier, onnx_part) as model:
            state, measured = _verify(model, keep_classifier)
        _save(dest, file, state, measured)
        _print_summary(file, measured, {dest: f"{len(state)} tensors"} | ({onnx_dest: "ONNX"} if onnx_dest else {}))


@contextmanager
def _temporary_onnx(dest: Path, file: "KerasFile", classifier: bool, onnx_part: Path | None) -> Iterator[Path]:
    """Writes the ONNX model to a temporary folder beside ``dest``, and to ``onnx_part`` if given; both are checked."""
    import onnx

    from convert.onnx_graph import to_onnx

    model = to_onnx(file, classifier)
    if onnx_part:
        onnx_part.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(onnx_part, full_check=True)
    try:
        with TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder:
            path = Path(folder) / "model.onnx"
            # weights in a file of their own, which readers map into memory or read only once
            onnx.save_model(model, path, save_as_external_data=True, location="model.weights")
            del model  # it still holds all weights, even those that it has written
            onnx.checker.check_model(path, full_check=True)
            yield path
    except OSError as error:
        raise UserError(
            f"Can't write beside {dest}: {error.strerror or error}; name a writable folder with room for two copies."
        ) from None


def _verify(model: Path, classifier: bool) -> "tuple[dict[str, Tensor], dict[str, float]]":
    """Converts an ONNX file to the trunk's tensors, and measures the difference of each stage from ONNX Runtime."""
    from convert import parity
    from convert.trunk_weights import to_module, to_trunk, trunk_state

    images = parity.seeded_images()
    reference = parity.run_onnx(model, images)
    module = to_module(model)
    state = trunk_state(module, classifier)
    trunk = to_trunk(module, state)
    measured = parity.differences("onnx2torch", reference, parity.run_module(module, images))
    measured |= parity.differences("trunk", reference, parity.run_trunk(trunk, state, images))
    return state, measured


def _save(dest: Path, file: "KerasFile", state: "dict[str, Tensor]", measured: dict[str, float]) -> None:
    from convert import parity
    from convert.layout import CLASSES, CLASSIFIER, SIZE
    from facecls.model.trunk import VGGFACE2, VGGFACE2_MEAN, save_trunk

    metadata: dict[str, Any] = {
        "architecture": VGGFACE2,
        "source": file.path.name,
        "source_sha256": file.sha256,
        "input": {"size": SIZE, "channels": "RGB", "range": [0, 255], "mean": list(VGGFACE2_MEAN), "std": [1, 1, 1]},
        "classes": CLASSES if f"{CLASSIFIER}.weight" in state else 0,
        "parity": {
            "reference": "onnxruntime",
            "images": parity.IMAGES,
            "seed": parity.SEED,
            "limit": parity.LIMIT,
            "at_most": {name: parity.bound(difference) for name, difference in measured.items()},
        },
        "converter": CONVERTER,
    }
    save_trunk(dest, state, metadata)


def _print_summary(file: "KerasFile", measured: dict[str, float], written: dict[Path, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("read", "file", str(file.path))
    table.add_row("", "kind", f"{file.kind}, Keras {file.keras_version}")
    table.add_row("", "size", f"{len(file.layers)} layers, {file.parameters:,} parameters")
    table.add_row("", "SHA-256", file.sha256)
    for row, (name, difference) in enumerate(measured.items()):
        table.add_row("" if row else "verified", name, f"within {difference:.1e} of ONNX Runtime's")
    for row, (path, what) in enumerate(written.items()):
        table.add_row("" if row else "written", what, str(path))
    Console().print(table)


if __name__ == "__main__":
    gc.disable()  # the imports create 640,000 objects that stay; searching them for garbage takes a second,
    main()
    gc.freeze()  # and half a second more at exit
