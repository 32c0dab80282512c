"""Suspects: labels worth a second look."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from facecls.analysis.duplicates import Pixels
from facecls.analysis.suspects import suspects
from facecls.data.tasks import TASKS
from facecls.report.blocks import NONE, Block, Content, Missing, Section, Table, Text, Tile, Tiles, count, words
from facecls.report.sections.gallery import NO_PICTURES, data_uri
from facecls.run import Run

SUSPECTS = 12
"""Of either kind that are shown with their faces."""
LISTED = 100
"""Suspects in the table; the file has them all."""


def find_suspects(run: Run, image: Pixels | None) -> pd.DataFrame:
    """The suspects among the tested faces, and the byte-identical ones among all faces of the data.

    Args:
        run: With its predictions, and all faces if it kept them.
        image: For near-identical pictures among the tested faces.

    Returns:
        As ``suspects.suspects`` gives them.
    """
    found = suspects(run.predictions, image)
    if run.faces is None:
        return found
    tested = run.faces["path"].isin(run.predictions["path"])
    everything = pd.concat([run.predictions, run.faces[~tested]], ignore_index=True)
    both = pd.concat([found, suspects(everything)[lambda some: some["other"].notna()]])
    both = both.drop_duplicates(["path", "task", "reason"])
    return both.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def suspects_section(run: Run, found: pd.DataFrame, image: Pixels | None) -> Section:
    """Labels worth a second look.

    Args:
        run: With its predictions.
        found: As ``find_suspects`` gives them.
        image: As for ``gallery``.
    """
    if not len(found):
        return Section("Suspects", [Text("No label of the tested faces looks wrong.")])
    labels = found.drop_duplicates(["path", "task"])  # one may be suspect for two reasons
    counts = labels["task"].value_counts()
    said = words(", ").join(
        words("{} of {}", count(f"suspects/{task}", int(counts[task])), task) for task in TASKS if task in counts
    )
    blocks: list[Block] = [
        Text(
            words(
                "{} labels look wrong: {}. A model that contradicts a label may be right or wrong itself, so each is "
                "worth a look, not a correction by rule. All of them are in suspects.csv, the most suspect first.",
                count("suspects", len(labels)), said,
            )
        )
    ]  # fmt: skip
    if image is None:
        blocks.append(Missing(NO_PICTURES.format(run.folder) + " Near-identical pictures were not looked for."))
    else:
        twins = found["other"].notna()
        for title, some in (
            ("The model is surest that these are wrong", found[~twins]),
            ("The same picture under different labels", found[twins]),
        ):
            if tiles := _suspect_tiles(run.predictions, _spread(some), image):
                blocks += [Text(words("<strong>{}</strong>", title)), Tiles(title, tiles)]
    blocks.append(_listed(found))
    return Section("Suspects", blocks)


def _spread(found: pd.DataFrame) -> pd.DataFrame:
    """The suspects, of each task in turn, so that the first ones are of all."""
    turn = found.groupby("task", sort=False).cumcount()
    return found.assign(turn=turn).sort_values(["turn", "score"], ascending=[True, False], kind="stable")


def _suspect_tiles(table: pd.DataFrame, found: pd.DataFrame, image: Pixels) -> list[Tile]:
    """The first suspects whose pictures are there; each face once, and a pair once."""
    rows = {path: row for row, path in enumerate(table["path"])}
    shown: set[str] = set()
    tiles: list[Tile] = []
    for suspect in found.to_dict("records"):
        path, other = suspect["path"], suspect["other"]
        if len(tiles) == SUSPECTS:
            break
        if path not in rows or {path, other} & shown:
            continue
        shown |= {path, other} if isinstance(other, str) else {path}
        pictures = [image(rows[name]) for name in (path, other) if name in rows]
        if len(pictures) > 1 and np.array_equal(pictures[0], pictures[1]):
            pictures.pop()
        images = [(data_uri(picture), f"{suspect['task']} labelled {suspect['label']}") for picture in pictures]
        tiles.append(Tile(images, [words("{}: <b>{}?</b>", suspect["task"], suspect["label"])], [suspect["reason"]]))
    return tiles


def _listed(found: pd.DataFrame) -> Table:
    rows: list[Sequence[Content]] = []
    for suspect in found.head(LISTED).to_dict("records"):
        cells: Iterable[object] = (suspect["path"], suspect["task"], suspect["label"], suspect["predicted"])
        texts = [NONE if pd.isna(cell) else str(cell) for cell in cells]  # type: ignore[call-overload]
        rows.append(
            [*texts, f"{suspect['score']:.3f}", suspect["reason"], "yes" if suspect["seen_in_training"] else "no"]
        )
    caption = f"The first {len(rows)} of {len(found):,} suspects" if len(found) > len(rows) else "All suspects"
    head = ["face", "task", "label", "predicted", "suspicion", "why", "seen in training"]
    return Table(caption, head, rows, fold=True, words=True)
