"""What is written under a temporary name gets its own when it is on the disk."""

from __future__ import annotations

import os
from pathlib import Path


def publish(temporary: Path, path: Path) -> None:
    """Give a file or a directory its name, whose files are on the disk; then the names are, too."""
    if temporary.is_dir():
        sync_directory(temporary)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """The names in a directory, down to the disk; other systems than POSIX do not offer it."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
