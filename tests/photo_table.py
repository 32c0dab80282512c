"""Measures a model on faces in photos: ``python tests/photo_table.py CKPT ROOT [--faces N]``.

The faces that the model was tested on are predicted as they are, by the default (found and aligned), and from photos of
1,000 x 800 pixels into which they are put at a random place, 60 to 400 pixels large, leaning by up to 30 degrees, on
noise, gradients and textures. Prints how many are found, and accuracy and error of each way.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from photos import Pixels, background, put

from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import Classification
from facecls.model.checkpoint import read_checkpoint
from facecls.model.engine import open_predictor
from facecls.model.predictor import Predictor
from facecls.predict.faces import predict_stream
from facecls.predict.finder import Faces, Finder
from facecls.predict.inputs import Input

KINDS = ("noise", "gradient", "texture")
SIZE = 1000, 800


def photo_of(face: Pixels, number: int) -> Pixels:
    """A photo with a face in it; the number decides where and how."""
    rng = np.random.default_rng(number)
    photo = background(KINDS[number % len(KINDS)], *SIZE, seed=number)
    size, angle = rng.uniform(60, 400), rng.uniform(-30, 30)
    reach = size * 0.7  # half of the diagonal
    x, y = (rng.uniform(reach, side - reach) for side in SIZE)
    put(photo, face, x, y, size, angle)
    return photo


def predict(
    predictor: Predictor, images: Iterator[tuple[int, Pixels]], faces: Faces
) -> tuple[pd.DataFrame, int, float]:
    """Predictions of the largest face of each image, by number; how many faces there were, and seconds."""
    started = time.monotonic()
    inputs = (Input(str(number), partial(np.asarray, image)) for number, image in images)
    table = pd.concat(batch.table for batch in predict_stream(predictor, Finder(predictor, faces), inputs))
    known = table[table["error"].isna()]
    if "width" in known:
        known = known.sort_values("width", ascending=False)
    return known.drop_duplicates("path").set_index("path"), len(known), time.monotonic() - started


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("root")
    parser.add_argument("--faces", type=int, help="how many; all that were tested if not given")
    options = parser.parse_args()
    kept = dict(read_checkpoint(options.model).data) | {"root": options.root, "num_workers": 0, "train_transform": None}
    data = FacesDataModule(**kept)
    data.setup()
    predictor = open_predictor(options.model, "cpu")
    tested = np.flatnonzero(data.faces["split"].eq("test"))
    if options.faces is not None:
        tested = np.sort(np.random.default_rng(0).permutation(tested)[: options.faces])
    labels = data.faces.iloc[tested].set_axis(map(str, tested), axis=0).add_suffix("_true")

    def pictures() -> Iterator[tuple[int, Pixels]]:
        return ((row, data.picture(row)) for row in tested.tolist())

    ways = {
        "crops, whole": (pictures(), "whole"),
        "crops, found": (pictures(), "all"),
        "photos, found": (((row, photo_of(face, row)) for row, face in pictures()), "all"),
        "photos, whole": (((row, photo_of(face, row)) for row, face in pictures()), "whole"),
    }
    for way, (images, faces) in ways.items():
        rows, count, seconds = predict(predictor, images, faces)  # type: ignore[arg-type]
        both = labels.join(rows, how="inner")
        words = [f"{way:14} found {len(both)} of {len(tested)} ({count} faces in {seconds:.0f} s)"]
        for name, task in predictor.tasks.items():
            known = both[both[f"{name}_true"].notna()]
            if isinstance(task, Classification):
                right = known[name] == [task.text(code) for code in known[f"{name}_true"]]
                words.append(f"{name} {100 * right.mean():.1f} %")
            else:
                words.append(f"{name} {(known[name] - known[f'{name}_true']).abs().mean():.2f} years off")
        print(", ".join(words), flush=True)


if __name__ == "__main__":
    main()
