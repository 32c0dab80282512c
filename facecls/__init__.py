"""Gender, race and age from faces."""

from typing import TYPE_CHECKING, Literal

from facecls._version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    from facecls.predict.faces import Faces


def load(
    path: "str | Path", device: Literal["auto", "cpu", "cuda"] = "auto", tta: Literal["none", "flip"] = "none"
) -> "Faces":
    """Loads a trained model to predict faces with.

    Args:
        path: A checkpoint of ``facecls.fit``, or a ``.onnx`` file of ``facecls.export``.
        device: ``auto`` for a GPU where there is one.
        tta: ``flip`` averages over a face and its mirror image, at twice the time.

    Returns:
        The model; its ``predict`` takes paths, arrays, Pillow's pictures or a tensor and returns a DataFrame.

    Raises:
        UserError: If there is no such file, it is none of these, or the device is missing.

    Examples:
        >>> import numpy as np
        >>> faces = load("best.ckpt")
        >>> grey = np.full((200, 180, 3), 128, np.uint8)
        >>> table = faces.predict([grey, "no_such_file.jpg"])
        >>> list(table.columns)[:6]
        ['path', 'gender', 'p_male', 'p_female', 'race', 'p_white']
        >>> table["error"].tolist()
        [nan, 'missing file']
    """
    from facecls.model.predictor import open_predictor
    from facecls.predict.faces import Faces

    return Faces(open_predictor(path, device, tta))
