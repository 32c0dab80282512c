"""Gender, race and age from faces."""

__version__ = "0.1.0"
