"""Limits of what is read, so that a small hostile file takes neither all memory nor all time.

What is beyond a limit is a reject or an error that says so, and by which option the limit is raised.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, fields

from facecls.errors import UserError

IMAGE_PIXELS = 100_000_000
"""Of one image by default, and of those that OpenCV decodes; the sensors of telephones have up to 200 million, but
write 12 to 50."""
PIXELS_AT_ONCE = 2 * IMAGE_PIXELS
"""Of all images that threads decode and look at together. Processes of a loader decode one image each, besides: with
``data.num_workers`` N there may be N of ``image_pixels`` at once."""
BYTES_AHEAD = 256_000_000
"""Of encoded images that wait to be decoded."""
ARCHIVE_ALLOWANCE = 1_000_000_000
"""Bytes that any archive may unpack to, since few images of one colour do shrink."""
NAME_BYTES = 4096
"""Of a name in an archive, as of a path on Linux."""
SIDE = 4096
"""Pixels of a side of the images that a model takes."""
_INHERITED = "FACECLS_LIMITS"
"""A variable of the environment, by which loaders that import everything anew have the limits of their process."""


@dataclass
class Limits:
    """What is read at most.

    Attributes:
        image_pixels: Pixels of one image, or of a frame of a video.
        file_bytes: Bytes of one image file, or of one member of an archive.
        archive_bytes: Bytes that an archive unpacks to.
        archive_growth: How many times its own bytes an archive unpacks to, beyond a gigabyte; images hardly shrink, and
            deflate reaches 1,000.
        names: Files of an archive, rows of a manifest.
        folders: Folders inside one another.
    """

    image_pixels: int = IMAGE_PIXELS
    file_bytes: int = 256_000_000
    archive_bytes: int = 64_000_000_000
    archive_growth: int = 100
    names: int = 10_000_000
    folders: int = 100


def _inherited() -> Limits:
    try:
        return Limits(**json.loads(os.environ.get(_INHERITED, "{}")))
    except (TypeError, ValueError):  # no such process has written it
        return Limits()


LIMITS = _inherited()
"""The limits of this process; read them here each time, since a command sets them after everything is imported."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds an option ``--limits.NAME`` for each limit."""
    group = parser.add_argument_group("limits", "of what is read of an image, an archive, a manifest or a folder")
    for field in fields(Limits):
        group.add_argument(
            f"--limits.{field.name}", type=int, metavar="N", default=field.default, help="(default: %(default)s)"
        )


def set_limits_of(options: argparse.Namespace) -> None:
    """Sets the limits that the options of ``add_limits`` name.

    Raises:
        UserError: As ``set_limits``.
    """
    set_limits(**{field.name: getattr(options, f"limits.{field.name}") for field in fields(Limits)})


def set_limits(**values: int) -> None:
    """Sets the limits of this process and of those that it starts.

    Args:
        values: By name; those without have their defaults.

    Raises:
        UserError: If one is not above 0.
    """
    for name, value in values.items():
        if value < 1:
            raise UserError(
                f"Expected --limits.{name} to be at least 1, but got {value}; leave it out for the default."
            )
    for name, value in asdict(Limits(**values)).items():
        setattr(LIMITS, name, value)  # in place, for those that have imported it
    os.environ[_INHERITED] = json.dumps(asdict(LIMITS))


def too_large(count: int, name: str, unit: str) -> str:
    """Says in a few words that something is beyond a limit.

    Args:
        count: What came.
        name: The limit.
        unit: Of both, such as ``pixels``.

    Examples:
        >>> too_large(150_000_000, "image_pixels", "pixels")
        'too large (150,000,000 pixels; the limit is 100,000,000, --limits.image_pixels=150000000 raises it)'
    """
    return f"too large ({count:,} {unit}; the limit is {getattr(LIMITS, name):,}, {raised(name, count)})"


def raised(name: str, count: int) -> str:
    """How a limit is raised, such as ``--limits.names=20000000 raises it``."""
    return f"--limits.{name}={count} raises it"
