"""Converts a network to a trunk file, verified before it is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from facecls._version import __version__
from facecls.errors import UserError
from facecls.files import make_folder, replacing

# heavy libraries are imported late, so that neither --help nor a wrong file waits for them
if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

    from convert.finish import Map
    from convert.plain.network import Asked, Network
    from facecls.model.trunk import Trunk

CONVERTER = f"facecls {__version__}"
"""Named in the metadata of the trunk file."""
TRUNK = (".safetensors",)
"""How the names of trunk files end."""
_ONNX = (".onnx",)


def write_network(
    sources: Sequence[Path], dest: Path, onnx_dest: Path | None, asked: "Asked"
) -> "tuple[Network, Trunk, Map | None, Mapping[str, float], Mapping[Path, str]]":
    """Converts as ``convert``, but no CLIP checkpoint, and prints nothing.

    Args:
        sources: As there.
        dest: As there.
        onnx_dest: As there.
        asked: As there.

    Returns:
        The network, its trunk and map, by check the difference as a share of the largest feature, what was written.

    Raises:
        UserError: As there.
    """
    if sources[0].suffix.lower() in TRUNK:
        _check_dest(sources, dest)
    network = _read(sources, asked)
    from convert.finish import finish, last_map
    from convert.graph_trunk import describe
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
        return network, trunk, found_map, measured, written


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


def _read(sources: Sequence[Path], asked: "Asked") -> "Network":
    suffix = sources[0].suffix.lower()
    if len(sources) > 1 or suffix in TRUNK:
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
