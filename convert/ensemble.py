"""Joins trained models to one that answers with the average of their answers.

The result is a checkpoint like any other. Its trunk is that of the models, or theirs side by side; models that share
one, such as probes of several seeds, take no more time than one of them. Its heads hold those of the models as blocks.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
from torch import Tensor, nn

from convert.conversion import write_network
from convert.plain.network import Asked
from facecls.errors import UserError
from facecls.files import make_folder, replacing
from facecls.model.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from facecls.model.graph import GRAPH, GraphNet
from facecls.model.heads import Head
from facecls.model.module import FaceModule
from facecls.model.trunk import Trunk, create_trunk, save_trunk
from facecls.run import BEST_CHECKPOINT, FACES, faces_of_training

_AGREEMENT = 1e-3
"""How far the logits may be from the average of the models', as a share of the largest."""


class _Place(NamedTuple):
    """Where the features of a model's trunk lie among those of the joined one.

    Attributes:
        start: The first of them.
        end: After the last.
    """

    start: int
    end: int


def join_models(paths: Sequence[Path], dest: Path) -> dict[str, Mapping[str, str]]:
    """Joins models, compares the result with them and writes it, with the faces of their trainings.

    Args:
        paths: Checkpoints that ``facecls.fit`` wrote, in the folders of their runs.
        dest: The checkpoint to write, in the folder of a run that has none yet.

    Returns:
        What was done, for ``print_sections``.

    Raises:
        UserError: If the models can't be joined, or one was trained on faces that another keeps for its test.
    """
    if len(paths) < 2:
        raise UserError(f"Expected two checkpoints or more, but got {paths[0]} alone; name another to join it with.")
    folder = dest.parent.parent
    if dest.parts[-2:] != Path(BEST_CHECKPOINT).parts:
        raise UserError(f"Expected a DEST such as runs/ensemble/version_0/{BEST_CHECKPOINT}, but got {dest}.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"Expected a DEST in a folder that is new, but {folder} has files; name another.")
    members = [read_checkpoint(path) for path in paths]
    _check_alike(paths, members)
    faces = _faces(paths)
    modules = [member.module for member in members]
    joined, places = _joined_trunk(modules)
    module = _create(joined, modules, places)
    difference = _verify(module, modules)
    make_folder(dest.parent)
    with replacing(folder / FACES) as part:
        faces.to_parquet(part, index=False)
    write_checkpoint(_content(module, members[0]), dest)
    size = sum(parameter.numel() for parameter in module.model.parameters()) / 1e6
    return {
        "read": {"models": "\n".join(map(str, paths))},
        "model": {
            "trunk": "that of all" if len({*places}) == 1 else f"{len({*places})} side by side",
            "features": f"{joined.features:,}",
            "parameters": f"{size:.1f} M",
        },
        "verified": {"average of the logits": f"{difference:.1e} of the largest"},
        "written": {"checkpoint": str(dest), "faces of the trainings": str(folder / FACES)},
    }


def _check_alike(paths: Sequence[Path], members: Sequence[Checkpoint]) -> None:
    """Refuses models whose answers can't be averaged."""
    first = members[0].module
    for path, member in zip(paths[1:], members[1:], strict=True):
        other = member.module
        differing = [name for name in ("image_size", "age_head") if first.hparams[name] != other.hparams[name]]
        if len(first.hparams["hidden"]) != len(other.hparams["hidden"]):
            differing.append("hidden")
        if differing or list(first.model.tasks.values()) != list(other.model.tasks.values()):
            raise UserError(
                f"Expected models of the same tasks with the same {', '.join(differing) or 'labels'}, but {paths[0]} "
                f"and {path} differ in that; join others."
            )


def _faces(paths: Sequence[Path]) -> pd.DataFrame:
    """All faces of the models' runs; refuses runs of which one tests what another was trained on."""
    tables = [faces_of_training(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table is None:
            raise UserError(
                f"Expected {FACES} in the run of {path}, which says what it was trained on, but there is none; join "
                "models whose runs are whole."
            )
    faces = pd.concat(cast("list[pd.DataFrame]", tables), ignore_index=True).drop_duplicates(["path", "sha1", "split"])
    trained = faces.loc[faces["split"].eq("train"), "sha1"]
    mixed = faces[faces["split"].notna() & faces["split"].ne("train") & faces["sha1"].isin(trained)]
    if len(mixed):
        raise UserError(
            f"Expected models of one split, but {len(mixed):,} faces that one keeps for validation or test are in the "
            f"training of another, such as {mixed['path'].iloc[0]}; train them with the same data.split_seed."
        )
    return faces


def _joined_trunk(modules: Sequence[FaceModule]) -> tuple[Trunk, list[_Place]]:
    """The trunks side by side, equal ones once, and where the features of each model are."""
    trunks: list[Trunk] = []
    numbers: list[int] = []
    for module in modules:
        equal = [number for number, trunk in enumerate(trunks) if _are_equal(trunk, module.model.trunk)]
        numbers.append(equal[0] if equal else len(trunks))
        if not equal:
            trunks.append(module.model.trunk)
    ends = [0]
    for trunk in trunks:
        ends.append(ends[-1] + trunk.features)
    spans = [_Place(*span) for span in pairwise(ends)]
    places = [spans[number] for number in numbers]
    if len(trunks) == 1:
        return trunks[0], places
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.safetensors" for number in range(len(trunks))]
        for file, trunk in zip(files, trunks, strict=True):
            about: dict[str, Any] = {"architecture": trunk.name}
            if isinstance(trunk.net, GraphNet):
                about |= {GRAPH: trunk.net.description, "input": trunk.net.description["input"]}
            save_trunk(file, trunk.net.state_dict(), about)
        dest = Path(folder) / "joined.safetensors"
        write_network(files, dest, None, Asked(size=modules[0].hparams["image_size"]))
        return create_trunk(GRAPH, dest), places


def _are_equal(one: Trunk, other: Trunk) -> bool:
    """Whether two trunks are the same network with the same weights, and take their images in the same way."""
    graphs = [trunk.net.description if isinstance(trunk.net, GraphNet) else None for trunk in (one, other)]
    if one.name != other.name or graphs[0] != graphs[1]:
        return False
    state, others = one.state_dict(), other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in state.items())


def _create(trunk: Trunk, modules: Sequence[FaceModule], places: Sequence[_Place]) -> FaceModule:
    """The model on the joined trunk, with heads that hold those of the models as blocks."""
    first = modules[0].hparams
    sizes = zip(*(module.hparams["hidden"] for module in modules), strict=True)
    kept = ("tasks", "dropout", "age_head", "age_sigma", "label_smoothing", "class_weights", "tta", "image_size")
    module = FaceModule(
        trunk.name,
        hidden=[sum(each) for each in sizes],
        task_options=first["task_options"],
        graph=dict(trunk.net.description) if isinstance(trunk.net, GraphNet) else None,
        face_frame=first["face_frame"],
        **{name: first[name] for name in kept},
    ).eval()
    module.model.trunk.load_state_dict(trunk.state_dict())
    for name, head in module.model.heads.items():
        _fill(head, [each.model.heads[name] for each in modules], places)
    return module


@torch.no_grad()
def _fill(head: Head, members: Sequence[Head], places: Sequence[_Place]) -> None:
    """Gives a head the weights of several, so that its logits are the average of theirs, and a temperature.

    Each weighs as the inverse of its temperature, and the temperature is the harmonic mean of theirs. So the logits
    over it are the mean of theirs over their own, as calibrated answers need; ages, which no temperature may move, come
    from the logits alone.
    """
    head.temperature.copy_(1 / torch.stack([1 / member.temperature.double() for member in members]).mean())
    rows = list(places)  # of each member, where what its next layer takes lies: at first the features of its trunk
    layers = [_linear_layers(member) for member in members]
    targets = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    for depth, target in enumerate(targets):
        columns, end = rows, 0
        target.weight.zero_()
        target.bias.zero_()
        for number, (member, own) in enumerate(zip(members, layers, strict=True)):
            weight, bias = own[depth]
            if target is targets[-1]:  # logits add up
                share = head.temperature.double() / (len(members) * member.temperature.double())
                block = _Place(0, len(bias))
            else:  # hidden ones lie side by side
                share = torch.ones((), dtype=torch.float64)
                block = _Place(end, end + len(bias))
            target.weight[slice(*block), slice(*columns[number])] += (weight * share).float()
            target.bias[slice(*block)] += (bias * share).float()
            rows = [*rows[:number], block, *rows[number + 1 :]]
            end = block.end


def _linear_layers(head: Head) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each linear layer, float64; the first one standardises, if the head does."""
    layers = [(each.weight.double(), each.bias.double()) for each in head.layers if isinstance(each, nn.Linear)]
    norm = head.layers[0]
    if isinstance(norm, nn.BatchNorm1d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = layers[0]
        weight = weight / (norm.running_var.double() + norm.eps).sqrt()
        layers[0] = weight, bias - weight @ norm.running_mean.double()
    return layers


def _verify(module: FaceModule, members: Sequence[FaceModule]) -> float:
    """How far calibrated logits of random images are from the mean of the models', as a share of the largest."""
    worst = 0.0
    size = module.hparams["image_size"]
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = module.model(images)
        each = [member.model(images) for member in members]
    for name, values in logits.items():
        shares = [own[name] / member.model.heads[name].temperature for own, member in zip(each, members, strict=True)]
        expected = torch.stack(shares).mean(0)
        calibrated = values / module.model.heads[name].temperature
        difference = float((calibrated - expected).abs().max() / expected.abs().max())
        if not difference <= _AGREEMENT:
            raise UserError(
                f"Expected the joined model to answer {name} with the average of the models, but it is off by "
                f"{difference:.1e} of the largest logit; please report this with the config.yaml of each."
            )
        worst = max(worst, difference)
    return worst


def _content(module: FaceModule, first: Checkpoint) -> dict[str, Any]:
    """The checkpoint, with data and precision as of the first model."""
    options = {name: value for name, value in module.hparams.items() if name != "optimizer"}
    options["schedule"] = vars(module.schedule)
    return {
        "state_dict": module.state_dict(),
        "hyper_parameters": options | {"precision": first.precision},
        "datamodule_hyper_parameters": dict(first.data),
    }
