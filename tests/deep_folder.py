"""A folder so deep that a file of a long name can lie in it, and yet not be moved further down."""

from pathlib import Path

PATH_BYTES = 3820
"""With the name, just below the 4095 of Linux (PATH_MAX); with a job's folder between, above."""
LONG_NAME = "x" * 246 + ".csv"


def deep_folder(below: Path) -> Path:
    """Make one; to move a file LONG_NAME out of it downwards is refused even to root."""
    folder = below
    while (room := PATH_BYTES - len(str(folder)) - 1) > 0:
        folder /= "d" * (room if room <= 200 else min(200, room - 100))
    folder.mkdir(parents=True)
    return folder
