"""Prints what was converted."""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from torch import nn

from convert.finish import Map
from convert.plain.network import Contract, Network
from facecls.console import console
from facecls.model.graph import GraphNet
from facecls.model.graph_operators import Constant, ScaleAndShift
from facecls.model.schedule import layer_of
from facecls.model.trunk import Trunk

_SHOWN = 6
"""Names of layers left out that are shown."""


def print_summary(
    network: Network,
    trunk: Trunk,
    found_map: Map | None,
    measured: Mapping[str, float],
    written: Mapping[Path, str],
) -> None:
    """Prints a table.

    Args:
        network: What was read.
        trunk: What was made of it.
        found_map: The last map of the network.
        measured: Differences from ONNX Runtime by name.
        written: What was written to which file.
    """
    sections = {
        "read": {"file": str(network.source), **network.summary, "SHA-256": network.sha256},
        "trunk": {
            "model.trunk": trunk.name,
            "input": _describe_input(network.contract, trunk),
            "features": f"{trunk.features:,} numbers, output of {network.features}",
            "map": _describe_map(found_map, trunk.net),
            "layers": f"{max(layer_of(trunk.net).values()) + 1} (model.schedule.frozen counts them)",
            "BatchNorms": _describe_norms(trunk.net),
            **_describe_constants(trunk.net),
            **({"left out": _describe_left_out(network.left_out)} if network.left_out else {}),
        },
        "verified": {name: f"{difference:.1e} of the largest" for name, difference in measured.items()},
        "written": {what: str(path) for path, what in written.items()},
    }
    print_sections(sections)


def print_sections(sections: Mapping[str, Mapping[str, str]]) -> None:
    """Prints a table of labels and texts, in sections with a title each."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for title, rows in sections.items():
        for row, (label, text) in enumerate(rows.items()):
            table.add_row("" if row else title, label, text)
    console().print(table, soft_wrap=False)


def _describe_input(contract: Contract, trunk: Trunk) -> str:
    mean = f" minus {', '.join(f'{value:g}' for value in contract.mean)}" if any(contract.mean) else ""
    std = "" if set(contract.std) == {1.0} else f", divided by {', '.join(f'{value:g}' for value in contract.std)}"
    sizes = "and other sizes" if trunk.fixed_size is None else "only"
    return f"{contract.size} x {contract.size} {sizes}, {contract.channels.upper()} 0..255{mean}{std}"


def _describe_map(found_map: Map | None, net: nn.Module) -> str:
    if found_map:
        return f"{found_map.name}, {' x '.join(map(str, found_map.shape))}"
    return "one in each network" if isinstance(net, GraphNet) and net.joined else "none"


def _describe_norms(net: nn.Module) -> str:
    norms = sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in net.modules())
    folded = sum(isinstance(module, ScaleAndShift) for module in net.modules())
    if folded:
        return f"{norms}, and {folded} folded before: without statistics, they train as scale and shift"
    return f"{norms}" if norms else "none, or folded before: convolutions train with what they took over"


def _describe_constants(net: nn.Module) -> dict[str, str]:
    """What is not trained; single numbers, and those of an image's three channels, are no weights."""
    sizes = [size for module in net.modules() if isinstance(module, Constant) and (size := module.value.numel()) > 3]
    if not sizes:
        return {}
    return {"not trained": f"{len(sizes)} constants, {sum(sizes):,} numbers; export with opset 17 to have fewer"}


def _describe_left_out(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
