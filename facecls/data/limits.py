"""Limits of what is read, so that a small hostile file takes neither all memory nor all time.

They are constants: whoever needs more changes them here. What is beyond a limit is a reject or an error that says so.
"""

IMAGE_PIXELS = 100_000_000
"""Of one image; the sensors of telephones have up to 200 million, but write 12 to 50."""
PIXELS_AT_ONCE = 2 * IMAGE_PIXELS
"""Of all images that threads decode and look at together."""
FILE_BYTES = 256_000_000
"""Of one image file or one member of an archive; also of those that wait to be decoded together."""
ARCHIVE_BYTES = 64_000_000_000
"""Of all that an archive unpacks to."""
ARCHIVE_GROWTH = 100
"""An archive unpacks to at most so many times its own bytes: images hardly shrink, and deflate reaches 1,000."""
ARCHIVE_ALLOWANCE = 1_000_000_000
"""Bytes that any archive may unpack to, since few images of one colour do shrink."""
NAMES = 10_000_000
"""Files of an archive, rows of a manifest."""
NAME_BYTES = 4096
"""Of a name in an archive, as of a path on Linux."""
FOLDERS = 100
"""Folders inside one another."""
SIDE = 4096
"""Pixels of a side of the images that a model takes."""


def too_large(count: int, limit: int, unit: str) -> str:
    """Says in a few words that something is beyond a limit.

    Args:
        count: What came.
        limit: What was allowed.
        unit: Of both, such as ``pixels``.

    Examples:
        >>> too_large(150_000_000, IMAGE_PIXELS, "pixels")
        'too large (150,000,000 pixels; the limit is 100,000,000)'
    """
    return f"too large ({count:,} {unit}; the limit is {limit:,})"
