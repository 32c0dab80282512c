"""Checks that a command's options fit the checkpoint that it starts from."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from facecls.data.datamodule import FacesDataModule
from facecls.data.folders import expanded
from facecls.data.manifests import stream_rows
from facecls.data.sources import Root, is_drawn, is_manifest, roots_of
from facecls.data.split import split_seed_of
from facecls.data.tasks import Task, Tasks, create_tasks
from facecls.errors import UserError, is_out_of_memory
from facecls.files import resolved
from facecls.model.checkpoint import Checkpoint
from facecls.model.graph import GraphNet, is_restored
from facecls.model.module import FaceModule
from facecls.run import CONFIG, FACES, LAST_CHECKPOINT, faces_of_training, heads_of_run
from facecls.training.batchnorms import check_folded

_STRUCTURE = ("trunk", "hidden", "feature_norm", "age_head", "task_weights")
"""Options of ``FaceModule`` beside its tasks that decide which weights a model has."""
_STATE: Mapping[str, type] = {
    "callbacks": Mapping,
    "epoch": int,
    "FacesDataModule": Mapping,
    "global_step": int,
    "loops": Mapping,
    "lr_schedulers": list,
    "optimizer_states": list,
}
"""What a checkpoint has beside weights and options if a run can be resumed from it."""
_OF_BEST_EPOCH: Mapping[str, Any] = {"best_model_score": Tensor | None, "best_model_path": str}
"""What the callback that keeps the best epoch takes as it is."""
_KEPT_BY_OPTIMIZERS = ("amsgrad", "centered", "momentum")
"""Arguments of torch's optimizers beside their class that decide what they keep of each weight."""
_BEGINS_ANY_TIME = "torch.optim.SGD"
"""It makes what it keeps when it is needed."""


def has_faces_of_training(data: FacesDataModule, trained: Mapping[str, Any]) -> bool:
    """Whether the faces are those that the model was trained with.

    Args:
        data: The faces, before or after ``setup``.
        trained: Options of the data in training, as ``Checkpoint.data``.
    """
    same_seed = data.seed == trained.get("seed")
    if "root" not in trained or _places(data.root) != _places(trained["root"]):
        return False
    return same_seed or not any(map(is_drawn, roots_of(data.root)))


def _places(root: Root) -> list[str]:
    """Where sources lie, however they are written."""
    return [place if is_drawn(place) else os.path.realpath(expanded(place)) for place in roots_of(root)]


def check_split(data: FacesDataModule, trained: Mapping[str, Any]) -> None:
    """Refuses to split the training run's faces in another way, where training faces would be tested unnoticed.

    Args:
        data: The faces, before or after ``setup``.
        trained: Options of the data in training, as ``Checkpoint.data``.

    Raises:
        UserError: If the faces are those of the training run, but an option that decides their split differs.
    """
    if not has_faces_of_training(data, trained):
        return
    options = {**data.hparams, "split_seed": data.split_seed}
    trained = {"tasks": {}, **trained, "split_seed": split_seed_of(trained)}  # version 0.1 had no such options
    if options["split_file"] != trained.get("split_file"):
        differing = ["split_file"]
    elif isinstance(data.split_file, dict) and "val" not in data.split_file:
        differing = [name for name in ("split_seed", "val_fraction") if options[name] != trained.get(name)]
    elif data.split_file is not None or _has_split_column(data.root):
        return
    else:
        decisive = ("split_seed", "val_fraction", "test_fraction")
        differing = [name for name in decisive if options[name] != trained.get(name)]
        # strata are numbered in the order of the tasks
        if list(data.tasks.values()) != list(create_tasks(trained["tasks"]).values()):
            differing.append("tasks")
    if differing:
        before, now = (
            ", ".join(f"data.{name} {values.get(name)}" for name in differing) for values in (trained, options)
        )
        raise UserError(
            f"Expected {before} as in training, since the split of {', '.join(roots_of(data.root))} depends on it, but "
            f"got {now}; use the same, or other faces."
        )


def keep_split(path: str, data: FacesDataModule) -> str:
    """Leaves each face of a training in its part of the split.

    Args:
        path: Of the checkpoint.
        data: The faces, after ``setup``.

    Returns:
        A line, with its end, if the faces are others than those of the training or it can't be known; else nothing.

    Raises:
        UserError: If a split is given that tests faces that were trained on, or the run's faces can't be read.
    """
    earlier = faces_of_training(path)
    if earlier is None:
        return f"the run of {path} has no {FACES} any more: faces added or taken away since would be split otherwise\n"
    line = data.keep_split(earlier)
    return "" if line is None else f"{line}\n"


def keep_split_of_heads(path: str, trained: Mapping[str, Any], data: FacesDataModule) -> str:
    """Leaves each face in the part in which the training of heads had it, so that none is tested that they learnt.

    Args:
        path: Of their checkpoint.
        trained: Options of the data in their training, as ``Checkpoint.data``.
        data: The faces, after ``setup``.

    Returns:
        A line.

    Raises:
        UserError: If a split is given that tests faces that the heads were trained on; or, where the faces of their
            training are not known, these faces would be split in another way.
    """
    earlier = faces_of_training(path)
    if earlier is not None:
        # by the image alone, since other faces may have the same paths
        return data.keep_split(earlier, by=("sha1",)) or "all faces keep the part that they had for the heads"
    check_split(data, trained)
    return f"the run of {path} has no {FACES} any more: whether its heads were trained on faces to test is not known"


def describe_trained(path: str, data: FacesDataModule) -> str:
    """Says how many of the faces to test the model was trained on, though they are not where its training faces were.

    Args:
        path: Of the checkpoint.
        data: The faces, after ``setup``.

    Returns:
        A line, with its end, if there are any; else nothing.
    """
    earlier = faces_of_training(path)
    if earlier is None:
        return ""
    tested = data.faces["sha1"].iloc[data.rows(data.split)]
    trained = int(tested.isin(earlier["sha1"][earlier["split"].eq("train")]).sum())
    return f"{trained:,} of {len(tested):,} faces to test are images that the model was trained on\n" if trained else ""


def heads_of_resumed(path: str, given: str | None) -> str | None:
    """The checkpoint whose heads a resumed run began with; it has had its own since, so the file is not read again.

    Args:
        path: The checkpoint to resume.
        given: Those that the options name, if any.

    Returns:
        Their checkpoint; those that are given if the run's options are gone.

    Raises:
        UserError: If the options name others than the run's did.
    """
    began = heads_of_run(path)
    is_known = (resolved(path).parent.parent / CONFIG).is_file()
    if is_known and given is not None and (began is None or resolved(given) != resolved(began)):
        raise UserError(
            f"Expected heads {'null' if began is None else began} as when the run of {path} began, since a resumed run "
            f"goes on with its own, but got {given}; set it so or to null, or start a new run."
        )
    return began if is_known else given


def take_restored(path: str, trained: Checkpoint, module: FaceModule, is_asked: bool) -> None:
    """Gives the model of a run that is resumed the BatchNorms that the run restored in its trunk.

    Args:
        path: The checkpoint, for messages.
        trained: What it holds.
        module: The model that is to continue; its trunk may change.
        is_asked: Whether the options ask for restored BatchNorms.

    Raises:
        UserError: If the run has restored them and the options don't ask for it, or the reverse; or if the trunk has
            none to restore.
    """
    own, net = module.model.trunk.net, trained.module.model.trunk.net
    if not (isinstance(own, GraphNet) and isinstance(net, GraphNet)):
        if is_asked:
            check_folded(module)
        return
    was_restored = is_restored(net, own)
    if was_restored and is_asked:
        module.take_graph(net)
    elif was_restored or (is_asked and net.description == own.description):
        raise UserError(
            f"Expected restore_batchnorm {str(was_restored).lower()} as in the run of {path}, but got "
            f"{str(is_asked).lower()}; set it as it was."
        )


def check_resumed(path: str, trained: Checkpoint, module: FaceModule, data: FacesDataModule) -> None:
    """Refuses to resume with another model or optimizer, or with faces that are split in another way.

    Args:
        path: The checkpoint, for messages.
        trained: What it holds.
        module: The model that is to continue.
        data: The faces that it is to be trained on.

    Raises:
        UserError: If the weights don't fit the model, or its training faces would be tested or come in another order.
    """
    before, now = trained.module.model.tasks, module.model.tasks
    if list(before.values()) != list(now.values()):
        raise UserError(
            f"Expected the tasks of {path} to resume it ({_describe(before, now)}), but got {_describe(now, before)}; "
            "set model.tasks and data.tasks as they were."
        )
    if _shapes(trained.module) != _shapes(module):
        differing = [name for name in _STRUCTURE if trained.module.hparams.get(name) != module.hparams[name]]
        before_text, now_text = (
            ", ".join(f"model.{name} {each.hparams.get(name)}" for name in differing) or "its weights"
            for each in (trained.module, module)
        )
        raise UserError(
            f"Expected the model of {path} to resume it ({before_text}), but got {now_text}; set it as it was."
        )
    _check_preparation(path, trained.module, module)
    _check_optimizer(path, trained.optimizer, module.hparams["optimizer"])
    if (seed := trained.data.get("seed", data.seed)) != data.seed:
        raise UserError(
            f"Expected seed_everything {seed} as in the run, whose order follows from it, but got {data.seed}; "
            "use the same."
        )
    check_split(data, trained.data)


def _check_preparation(path: str, before: FaceModule, now: FaceModule) -> None:
    """Refuses a trunk file whose network takes its images otherwise, which weights don't show."""
    one, other = ([each.model.trunk.mean, each.model.trunk.std] for each in (before, now))
    if not all(map(torch.equal, one, other)):
        raise UserError(
            f"Expected the trunk file that the run of {path} began with, but {now.hparams['weights']} subtracts and "
            "divides by other numbers; set model.weights as it was."
        )


def check_state(content: Mapping[str, Any]) -> None:
    """Checks that a checkpoint holds the state of a run, of which Lightning would leave out what is missing in a list.

    Args:
        content: Its contents.

    Raises:
        UserError: If something is missing, or of another kind.
    """
    if missing := _STATE.keys() - content.keys():
        raise UserError(
            f"Expected a checkpoint to resume such as {LAST_CHECKPOINT}, but got one without "
            f"{', '.join(sorted(missing))}; for weights alone, see facecls.evaluate and facecls.predict."
        )
    wrong = [name for name, kind in _STATE.items() if not isinstance(content[name], kind)]
    if not wrong:
        states = [content["optimizer_states"], content["lr_schedulers"], list(content["callbacks"].values())]
        names = ("optimizer_states", "lr_schedulers", "callbacks")
        wrong = [name for name, state in zip(names, states, strict=True) if not _are_mappings(state)]
        wrong += [name for name, state in zip(names[:2], states[:2], strict=True) if len(state) != 1]
    if not wrong:
        (optimizer,), _, callbacks = states
        if not (isinstance(kept := optimizer.get("state"), Mapping) and _are_mappings(list(kept.values()))):
            wrong.append("optimizer_states")
        for state in callbacks:
            wrong += [
                name for name, kind in _OF_BEST_EPOCH.items() if name in state and not isinstance(state[name], kind)
            ]
    if wrong:
        raise UserError(
            f"Expected a checkpoint to resume such as {LAST_CHECKPOINT}, but in this one {', '.join(wrong)} is not "
            "what a run leaves; take another, or start the run again."
        )


@contextmanager
def restoring(path: str) -> Iterator[None]:
    """Says of a checkpoint from which a run can't be restored that it is one.

    Args:
        path: The checkpoint, for messages.

    Raises:
        UserError: For whatever goes wrong, unless memory has run out.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Lightning and torch raise many kinds over a state that is not theirs
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"Expected a checkpoint to resume such as {LAST_CHECKPOINT}, but the state in {path} can't be restored "
            f"({reason}); take another, or start the run again."
        ) from error


def _are_mappings(states: list[Any]) -> bool:
    return all(isinstance(state, Mapping) for state in states)


def _check_optimizer(path: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses an optimizer that could not go on with the state of the one that was saved."""
    names = ("class_path", *(f"init_args.{name}" for name in _KEPT_BY_OPTIMIZERS))
    told = [{"class_path": each.get("class_path"), **_kept(each)} for each in (before, now)]
    if before and told[0] != told[1]:
        names = names[:1] if told[0]["class_path"] != told[1]["class_path"] else names
        old, new = (
            ", ".join(
                f"model.optimizer.{name} {each.get(name)}" for name in names if told[0].get(name) != told[1].get(name)
            )
            for each in told
        )
        raise UserError(f"Expected the optimizer of {path} to resume it ({old}), but got {new}; set it as it was.")


def _kept(optimizer: Mapping[str, Any]) -> dict[str, bool]:
    arguments = optimizer.get("init_args") or {}
    if optimizer.get("class_path") == _BEGINS_ANY_TIME:
        return {}
    return {f"init_args.{name}": bool(arguments.get(name)) for name in _KEPT_BY_OPTIMIZERS}


def _has_split_column(root: Root) -> bool:
    files = [expanded(place) for place in roots_of(root)]
    return any("split" in next(stream_rows(file, {})) for file in files if is_manifest(file) and file.is_file())


def _describe(tasks: Tasks, others: Tasks) -> str:
    """Names of tasks, with what their labels are where others of the same name have other labels."""

    def describe(task: Task) -> str:
        return task.name if others.get(task.name, task) == task else f"{task.name}: {task.expected}"

    return "; ".join(map(describe, tasks.values()))


def _shapes(module: FaceModule) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
