"""How the faces of a training lie in their images, so that those of photos can be brought to lie so."""

from facecls.data.datamodule import FacesDataModule
from facecls.data.parallel import in_order
from facecls.finding.detector import usual_detector
from facecls.finding.frame import MEASURED, Frame, measure


def measure_frame(data: FacesDataModule) -> Frame | None:
    """Measures the frame of the training faces, on up to ``MEASURED`` of them.

    Args:
        data: The faces, after ``setup``.

    Returns:
        The frame, or ``None`` where too few faces are found.
    """
    rows = data.sample(MEASURED)
    detector = usual_detector()
    found = in_order(lambda row: detector.share_of_largest(data.picture(row)), iter(rows.tolist()), ahead=16)
    return measure(found, f"{len(rows):,} faces of the training")


def describe_frame(frame: Frame | None) -> str:
    """One line about the frame of the training faces."""
    if frame is None:
        return "the detector finds no faces in the training images, so predict will take photos as they are"
    return f"predict will find the faces of photos and bring them into the frame of {frame.source}"
