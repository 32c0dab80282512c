"""``python -m convert``: converts a face network to a trunk file, verified before it is written."""

import argparse
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from facecls._version import __version__
from facecls.errors import CommandParser, UserError, command, program
from facecls.files import check_no_input, make_folder, replacing

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

    from convert.plain.network import Asked, Network

_DESCRIPTION = """Converts a face network to a trunk file, and verifies it before writing anything: a model saved by
Keras, any ONNX file, the image tower of a CLIP checkpoint such as FaRL's, or a trunk file, of which other layers are
taken. Several trunk files are joined to one, whose features are those of all."""
CONVERTER = f"facecls {__version__}"
"""Named in the metadata of the trunk file."""
_ONNX = (".onnx",)
_TORCH = (".pth", ".pt", ".bin")
_TRUNK = (".safetensors",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Raises:
        SystemExit: With status 2 and one line on stderr if the file can't be converted.
    """
    parser = CommandParser(prog=program("convert"), description=_DESCRIPTION)
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="the network: .h5 or .keras, .onnx, .pth (CLIP), or .safetensors, of which several are joined",
    )
    parser.add_argument("dest", type=Path, metavar="DEST.safetensors", help="the trunk file to write")
    parser.add_argument(
        "--output", metavar="NAME", help="layer whose output is the features; default: the last before a classifier"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME",
        help="layer before it whose average over places is joined to the features; may be repeated",
    )
    contract = parser.add_argument_group("how the network takes its images, where the file does not say")
    contract.add_argument("--size", type=int, metavar="PIXELS", help="height and width")
    contract.add_argument("--channels", choices=("rgb", "bgr"), help="order of the channels")
    contract.add_argument(
        "--mean",
        type=_three,
        metavar="M",
        help="subtracted from 0..255: one number, or three with commas as --channels",
    )
    contract.add_argument("--std", type=_three, metavar="S", help="divided by afterwards; 1 for nothing")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="also write the ONNX model (takes prepared images)")
    parser.add_argument(
        "--keep-classifier", action="store_true", help="keep the classifier of a Keras file, for facecls.identify"
    )
    with command("convert"):
        options = parser.parse_intermixed_args(arguments)  # files may come after options
        _check_options(options)
        from convert.plain.network import Asked  # imports onnx

        told = ("size", "channels", "mean", "std", "output", "keep_classifier")
        asked = Asked(also=tuple(options.also), **{name: getattr(options, name) for name in told})
        convert(options.sources, options.dest, options.onnx, asked)


def _check_options(options: argparse.Namespace) -> None:
    others = [source for source in options.sources if source.suffix.lower() not in _TRUNK]
    if len(options.sources) > 1 and others:
        raise UserError(
            f"Expected trunk files (.safetensors) to be joined, but got {others[0]}; convert it alone first."
        )
    if options.size is not None and not 16 <= options.size <= 1024:
        raise UserError(f"Expected --size from 16 to 1024 pixels, but got {options.size}.")
    if options.also and options.keep_classifier:
        raise UserError(
            "Expected --keep-classifier without --also, since the classifier reads the features of one layer."
        )
    if options.std is not None and min(options.std) <= 0:
        raise UserError(f"Expected --std above 0, but got {min(options.std):g}; 1 divides by nothing.")


def _three(text: str) -> tuple[float, ...]:
    """One number or three, as three."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected one number or three with commas, such as 127.5, but got {text!r}")
    return values * 3 if len(values) == 1 else values


def convert(sources: Sequence[Path], dest: Path, onnx_dest: Path | None, asked: "Asked") -> None:
    """Converts a file, verifies the result, writes it and prints a summary.

    Args:
        sources: A Keras file, an ONNX file, or a CLIP checkpoint of PyTorch; or trunk files.
        dest: The trunk file to write.
        onnx_dest: Where to write the ONNX model as well; ``None`` for nowhere.
        asked: What the user says about the network.

    Raises:
        UserError: If the file can't be converted or the result can't be written; then nothing is written.
    """
    check_no_input(dest, sources)
    if onnx_dest is not None:
        check_no_input(onnx_dest, [*sources, dest])
    if len(sources) == 1 and sources[0].suffix.lower() in _TORCH:
        _convert_clip(sources[0], dest, onnx_dest, asked)
        return
    if sources[0].suffix.lower() in _TRUNK:
        _check_dest(sources, dest)
    # heavy libraries are imported late, so that neither --help nor a wrong file waits for them
    network = _read(sources, asked)
    from convert.finish import finish, last_map
    from convert.graph_trunk import describe
    from convert.summary import print_summary
    from convert.verify import verify
    from facecls.model.trunk import VGGFACE2

    shapes = finish(network, asked.also)
    network = replace(network, features=", ".join((network.features, *asked.also)))
    found_map = last_map(network.model, shapes)
    graph = None if network.layout == VGGFACE2 else describe(network.model, shapes, network.contract, found_map)
    for place in filter(None, (dest, onnx_dest)):
        make_folder(place.parent)
    with replacing(onnx_dest) if onnx_dest else nullcontext() as onnx_part:
        with _temporary_onnx(dest, network.model, onnx_part) as model:
            network.model.Clear()  # it still holds all weights, even those that it has written
            state, trunk, measured = verify(model, network, graph)
        _save(dest, network, state, graph and graph[0], measured)
        written = {dest: f"{len(state)} tensors"} | ({onnx_dest: "ONNX"} if onnx_dest else {})
        print_summary(network, trunk, found_map, measured, written)


def _check_dest(sources: Sequence[Path], dest: Path) -> None:
    """Refuses to write over a trunk of something else, as where the last source was meant to be joined."""
    if not dest.is_file():
        return
    from facecls.model.trunk import read_trunk

    names, made_of = " + ".join(source.name for source in sources), None
    with suppress(UserError):  # no trunk file
        made_of = read_trunk(dest)[1].get("source", "another")
    if made_of not in (None, names):
        raise UserError(
            f"Expected a DEST that is new, or was made of {names}, but {dest} was made of {made_of}; if it is a "
            "source, name a DEST after it, otherwise delete it first."
        )


def _convert_clip(source: Path, dest: Path, onnx_dest: Path | None, asked: "Asked") -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in vars(asked).items() if value not in (None, False, ())]
    given += ["--onnx"] if onnx_dest else []
    if given:
        raise UserError(f"Expected no {', '.join(given)} with a CLIP checkpoint, whose network is known; leave it out.")
    from convert.clip import read_clip
    from convert.summary import print_sections
    from facecls.model.trunk import save_trunk

    state, metadata = read_clip(source)
    make_folder(dest.parent)
    save_trunk(dest, state, metadata)
    size = metadata["input"]["size"]
    print_sections(
        {
            "read": {"file": str(source), "kind": "CLIP's image tower, PyTorch", "SHA-256": metadata["source_sha256"]},
            "trunk": {"model.trunk": metadata["architecture"], "input": f"{size} x {size}, RGB, as CLIP's"},
            "verified": {"timm's features": f"{metadata['parity']['reference']:.1e} of the largest"},
            "written": {f"{len(state)} tensors": str(dest)},
        }
    )


def _read(sources: Sequence[Path], asked: "Asked") -> "Network":
    suffix = sources[0].suffix.lower()
    if len(sources) > 1 or suffix in _TRUNK:
        from convert.trunk_files import read_trunks

        return read_trunks(sources, asked)
    if suffix in _ONNX:
        from convert.onnx.network import read_onnx

        return read_onnx(sources[0], asked)
    from convert.keras.network import read_keras

    return read_keras(sources[0], asked)


@contextmanager
def _temporary_onnx(dest: Path, model: "ModelProto", onnx_part: Path | None) -> Iterator[Path]:
    """Writes the ONNX model to a temporary folder beside ``dest``, and to ``onnx_part`` if given; both are checked."""
    import onnx

    if onnx_part:
        onnx_part.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(onnx_part, full_check=True)
    try:
        with TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder:
            path = Path(folder) / "model.onnx"
            # weights in a file of their own, which readers map into memory or read only once
            onnx.save_model(model, path, save_as_external_data=True, location="model.weights")
            onnx.checker.check_model(path, full_check=True)
            yield path
    except OSError as error:
        raise UserError(
            f"Can't write beside {dest}: {error.strerror or error}; name a writable folder with room for two copies."
        ) from None


def _save(
    dest: Path,
    network: "Network",
    state: "dict[str, Tensor]",
    graph: Mapping[str, Any] | None,
    measured: Mapping[str, float],
) -> None:
    from convert import parity
    from facecls.model.graph import GRAPH
    from facecls.model.trunk import VGGFACE2, save_trunk

    contract = network.contract
    # the first convolution of VGGFace2's ResNet-50 is turned to RGB, a graph keeps its own order
    order = -1 if network.layout == VGGFACE2 else 1
    metadata: dict[str, Any] = {
        "architecture": network.layout,
        "source": network.source.name,
        "source_sha256": network.sha256,
        "input": {
            "size": contract.size,
            "channels": "RGB" if network.layout == VGGFACE2 else contract.channels.upper(),
            "range": [0, 255],
            "mean": list(contract.mean[::order]),
            "std": list(contract.std[::order]),
        },
        "classes": len(network.classifier[1]) if network.classifier else 0,
        "features": network.features,
        "parity": {
            "reference": "onnxruntime",
            "images": parity.IMAGES,
            "seed": parity.SEED,
            "limit": parity.LIMIT,
            "at_most": {name: parity.bound(difference) for name, difference in measured.items()},
        },
        "converter": CONVERTER,
    }
    if graph:
        metadata[GRAPH] = graph
    save_trunk(dest, state, metadata)


if __name__ == "__main__":
    gc.disable()  # the imports create 640,000 objects that stay; searching them for garbage takes a second,
    main()
    gc.freeze()  # and half a second more at exit
