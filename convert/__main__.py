"""``python -m convert``: converts a face network to a trunk file, verified before it is written."""

import argparse
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.conversion import TRUNK, write_network
from facecls.errors import CommandParser, UserError, command, program
from facecls.files import check_no_input, make_folder

if TYPE_CHECKING:
    from convert.plain.network import Asked

_DESCRIPTION = """Converts a face network to a trunk file, and verifies it before writing anything: a model saved by
Keras, any ONNX file, the image tower of a CLIP checkpoint such as FaRL's, or a trunk file, of which other layers are
taken. Several trunk files are joined to one, whose features are those of all; several checkpoints to one, whose answers
are the average of theirs."""
_TORCH = (".pth", ".pt", ".bin")
_MODEL = (".ckpt",)


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
        help="the network: .h5 or .keras, .onnx, .pth (CLIP), or .safetensors or .ckpt, of which several are joined",
    )
    parser.add_argument(
        "dest", type=Path, metavar="DEST.safetensors", help="the trunk file to write, or the checkpoint (.ckpt)"
    )
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
    kinds = _MODEL if _are_models(options.sources) else TRUNK
    others = [source for source in options.sources if source.suffix.lower() not in kinds]
    if len(options.sources) > 1 and others:
        raise UserError(
            f"Expected trunk files (.safetensors) to be joined, or checkpoints ({_MODEL[0]}), but got {others[0]}; "
            "convert it alone first."
        )
    if options.size is not None and not 16 <= options.size <= 1024:
        raise UserError(f"Expected --size from 16 to 1024 pixels, but got {options.size}.")
    if options.also and options.keep_classifier:
        raise UserError(
            "Expected --keep-classifier without --also, since the classifier reads the features of one layer."
        )
    if options.std is not None and min(options.std) <= 0:
        raise UserError(f"Expected --std above 0, but got {min(options.std):g}; 1 divides by nothing.")


def _are_models(sources: Sequence[Path]) -> bool:
    return sources[0].suffix.lower() in _MODEL


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
        sources: A Keras file, an ONNX file, or a CLIP checkpoint of PyTorch; or trunk files, or checkpoints of ours.
        dest: The trunk file or the checkpoint to write.
        onnx_dest: Where to write the ONNX model as well; ``None`` for nowhere.
        asked: What the user says about the network.

    Raises:
        UserError: If the file can't be converted or the result can't be written; then nothing is written.
    """
    check_no_input(dest, sources)
    if onnx_dest is not None:
        check_no_input(onnx_dest, [*sources, dest])
    if len(sources) == 1 and sources[0].suffix.lower() in _TORCH:
        _refuse_options(asked, onnx_dest, "a CLIP checkpoint, whose network is known")
        _convert_clip(sources[0], dest)
        return
    if _are_models(sources):
        _refuse_options(asked, onnx_dest, "checkpoints, whose networks are known")
        _join_models(sources, dest)
        return
    written = write_network(sources, dest, onnx_dest, asked)
    from convert.summary import print_summary

    print_summary(*written)


def _refuse_options(asked: "Asked", onnx_dest: Path | None, what: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in vars(asked).items() if value not in (None, False, ())]
    given += ["--onnx"] if onnx_dest else []
    if given:
        raise UserError(f"Expected no {', '.join(given)} with {what}; leave it out.")


def _join_models(sources: Sequence[Path], dest: Path) -> None:
    from convert.ensemble import join_models
    from convert.summary import print_sections

    print_sections(join_models(sources, dest))


def _convert_clip(source: Path, dest: Path) -> None:
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


if __name__ == "__main__":
    gc.disable()  # the imports create 640,000 objects that stay; searching them for garbage takes a second,
    main()
    gc.freeze()  # and half a second more at exit
