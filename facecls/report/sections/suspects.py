"""Section with labels worth checking, and duplicates."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from facecls.analysis.duplicates import ImageLoader
from facecls.analysis.suspects import DUPLICATE, DUPLICATES_DISAGREE, KINDS, MODEL, suspects
from facecls.report.blocks import (
    NONE,
    Block,
    Content,
    Missing,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    count,
    listed,
    sentence,
)
from facecls.report.sections.gallery import NO_PICTURES, data_uri
from facecls.run import SUSPECTS, Run

_SHOWN = 12
"""Suspects of each list that are shown with their faces."""
_LISTED = 100
"""Suspects in the table of each list; the file has them all."""
_TITLES = {
    MODEL: "Labels that the model contradicts",
    DUPLICATES_DISAGREE: "Duplicates with contradicting labels",
    DUPLICATE: "Other duplicates",
}


def find_suspects(run: Run, image: ImageLoader | None, trusted: Collection[str]) -> pd.DataFrame:
    """Labels worth checking among the tested faces, and duplicates among all faces of the data.

    Args:
        run: The run.
        image: Row number of the predictions -> the face, for near-identical images; ``None`` without images.
        trusted: Names of the tasks whose predictions may contradict labels.

    Returns:
        As ``analysis.suspects.suspects``.
    """
    entries = suspects(run.predictions, run.tasks, image, trusted)
    if run.faces is None:
        return entries
    untested = run.faces[~run.faces["path"].isin(run.predictions["path"])]
    everything = pd.concat([run.predictions, untested], ignore_index=True)
    both = pd.concat([entries, suspects(everything, run.tasks, trusted=())], ignore_index=True)
    both = both.sort_values("score", ascending=False, kind="stable").drop_duplicates(["path", "task", "kind"])
    disagreeing = both.loc[both["kind"] == DUPLICATES_DISAGREE, "path"]
    both = both[(both["kind"] != DUPLICATE) | ~both["path"].isin(disagreeing)]
    return both.sort_values("kind", key=lambda kinds: kinds.map(KINDS.index), kind="stable", ignore_index=True)


def suspects_section(run: Run, entries: pd.DataFrame, image: ImageLoader | None, guessed: Sequence[str]) -> Section:
    """Labels worth checking, and duplicates: three lists.

    Args:
        run: The run.
        entries: As ``find_suspects`` returns them.
        image: Row number of the predictions -> the face; ``None`` without images.
        guessed: Names of the tasks at which the model is not shown to be better than guessing.
    """
    lists = {kind: entries[entries["kind"] == kind] for kind in KINDS}
    blocks: list[Block] = [Text(f"{SUSPECTS} lists them all, in this order.")] if len(entries) else []
    if image is None:
        blocks.append(Missing(NO_PICTURES.format(run.folder) + " Near-identical images were not searched for."))
    blocks += _list(MODEL, lists[MODEL], _about_model(run, lists[MODEL], guessed), run, image)
    blocks += _list(
        DUPLICATES_DISAGREE,
        lists[DUPLICATES_DISAGREE],
        [Text(_about_disagreeing(run, lists[DUPLICATES_DISAGREE]))],
        run,
        image,
    )
    about_duplicates = (
        "Images with the same bytes as an earlier one, or nearly the same content, without a contradiction."
    )
    blocks += _list(
        DUPLICATE,
        lists[DUPLICATE],
        [Text(about_duplicates if len(lists[DUPLICATE]) else "There are none.")],
        run,
        image,
    )
    return Section("suspects", "Suspects", blocks)


def _about_model(run: Run, entries: pd.DataFrame, guessed: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    if guessed:
        names = listed([run.tasks[name].title.lower() for name in guessed], "or")
        blocks.append(
            Missing(f"The model is not shown to be better than guessing at {names}, so it cannot judge these labels.")
        )
    if len(entries):
        text = "{}. Either the label or the model may be wrong, so check each one before you correct it."
        blocks.append(Text(sentence(text, _by_task(run, entries))))
    elif len(guessed) < len(run.tasks):
        blocks.append(Text("There are none."))
    return blocks


def _about_disagreeing(run: Run, entries: pd.DataFrame) -> Content:
    if not len(entries):
        return "There are none."
    text = "{}. The same image has different labels, so at least one of each pair is wrong."
    return sentence(text, _by_task(run, entries))


def _by_task(run: Run, entries: pd.DataFrame) -> Content:
    """Counts such as ``5 of gender and 7 of race``."""
    kind, counts = entries["kind"].iloc[0], entries["task"].value_counts()
    tasks = [name for name in run.tasks if name in counts]
    return listed(
        [
            sentence("{} of {}", count(f"suspects/{kind}/{name}", int(counts[name])), run.tasks[name].title.lower())
            for name in tasks
        ]
    )


def _list(kind: str, entries: pd.DataFrame, about: Sequence[Block], run: Run, image: ImageLoader | None) -> list[Block]:
    title = sentence("<strong>{} ({})</strong>", _TITLES[kind], count(f"suspects/{kind}", len(entries)))
    blocks: list[Block] = [Text(title), *about]
    if image is not None and (tiles := _tiles(run.predictions, _in_turn(entries), image)):
        blocks.append(Tiles(_TITLES[kind], tiles))
    return [*blocks, _table(kind, entries)] if len(entries) else blocks


def _in_turn(entries: pd.DataFrame) -> pd.DataFrame:
    """The suspects, taken from each task in turn, so that all tasks are among the first ones."""
    turn = entries.groupby("task", sort=False, dropna=False).cumcount()
    return entries.assign(turn=turn).sort_values(["turn", "score"], ascending=[True, False], kind="stable")


def _tiles(table: pd.DataFrame, entries: pd.DataFrame, image: ImageLoader) -> list[Tile]:
    """The first suspects that have images; each face once, and each pair once."""
    rows = {path: row for row, path in enumerate(table["path"])}
    shown: set[str] = set()
    tiles: list[Tile] = []
    for suspect in entries.to_dict("records"):
        path, other = suspect["path"], suspect["other"]
        if len(tiles) == _SHOWN:
            break
        if path not in rows or {path, other} & shown:
            continue
        shown |= {path, other} if isinstance(other, str) else {path}
        pictures = [image(rows[name]) for name in (path, other) if name in rows]
        if len(pictures) > 1 and np.array_equal(pictures[0], pictures[1]):
            pictures.pop()
        tiles.append(_tile(suspect, [data_uri(picture) for picture in pictures]))
    return tiles


def _tile(suspect: Mapping[Hashable, Any], images: Sequence[str]) -> Tile:
    if pd.isna(suspect["task"]):
        return Tile([(uri, f"duplicate {suspect['path']}") for uri in images], ["duplicate"], [suspect["reason"]])
    shows = f"{suspect['task']} labelled {suspect['label']}"
    line = sentence("{}: <b>{}?</b>", suspect["task"], suspect["label"])
    return Tile([(uri, shows) for uri in images], [line], [suspect["reason"]])


_COLUMNS = {
    MODEL: {"path": "face", "task": "task", "label": "label", "predicted": "predicted", "reason": "why"},
    DUPLICATES_DISAGREE: {"path": "face", "task": "task", "label": "label", "other": "duplicate", "reason": "why"},
    DUPLICATE: {"path": "face", "other": "duplicate of", "reason": "why"},
}


def _table(kind: str, entries: pd.DataFrame) -> Table:
    columns = _COLUMNS[kind]
    rows: list[list[Content]] = []
    for suspect in entries.head(_LISTED).to_dict("records"):
        cells = [NONE if pd.isna(suspect[column]) else str(suspect[column]) for column in columns]
        rows.append([*cells, f"{suspect['score']:.3f}", "yes" if suspect["seen_in_training"] else "no"])
    which = f"The first {len(rows)} of {len(entries):,}" if len(entries) > len(rows) else f"All {len(entries)}"
    head = [*columns.values(), "score", "seen in training"]
    return Table(f"{which} in a table", head, rows, fold=True, wraps=True)
