"""Gender, race, age and other attributes of faces."""

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

from facecls._version import __version__
from facecls.data.limits import IMAGE_PIXELS
from facecls.errors import UserError, command
from facecls.ranks import launched

os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(IMAGE_PIXELS)  # which OpenCV reads once, when it is imported

if TYPE_CHECKING:
    from pathlib import Path

    from facecls.predict.faces import FacePredictor

if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module to run, which may import Lightning
    with command("facecls"):
        launched()

__all__ = ["FacePredictor", "UserError", "__version__", "load"]


def load(
    path: "str | Path",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tta: Literal["none", "flip", "zoom"] = "none",
    engine: Literal["auto", "torch", "onnx"] = "auto",
) -> "FacePredictor":
    """Loads a trained model.

    Args:
        path: A checkpoint of ``facecls.fit``, or a ``.onnx`` file of ``facecls.export``.
        device: ``auto`` for a GPU where there is one.
        tta: ``flip`` averages over a face and its mirror image, at twice the time; ``zoom`` over both from further
            away as well, at six times.
        engine: What runs a checkpoint on a CPU: ``torch``, ``onnx`` for ONNX Runtime, or ``auto`` for torch until the
            other, tried after half a minute of work, turns out to be faster.

    Returns:
        The model; its ``predict`` takes paths, arrays, Pillow images or a tensor and returns a DataFrame.

    Raises:
        UserError: If there is no such file, it is neither, the device is missing, or the engine can't run it.

    Examples:
        A file that can't be read has a row too, with the reason under ``error``:

        >>> table = load("best.ckpt").predict(["face.jpg", "gone.jpg"])
        >>> list(table)[:4]
        ['path', 'gender', 'p_male', 'p_female']
        >>> table["error"].tolist()
        [nan, 'missing file']
    """
    from facecls.model.engine import open_predictor
    from facecls.predict.faces import FacePredictor

    return FacePredictor(open_predictor(path, device, tta, engine=engine))


def __getattr__(name: str) -> Any:
    """Imports ``FacePredictor``, and torch with it, only when it is asked for."""
    if name == "FacePredictor":
        from facecls.predict.faces import FacePredictor

        return FacePredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
