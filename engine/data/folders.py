"""Common parts of sources that are folders: the folder, the names that count, and messages about the rest."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.errors import UserError

logger = logging.getLogger(__name__)

# torchvision's IMG_EXTENSIONS; timm's are fewer.
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
# Folders that tools create; folders whose name begins with a dot are hidden too.
_TOOL_FOLDERS = frozenset(("__pycache__", "__MACOSX", "@eaDir", "lost+found"))
_TOOL_FILES = frozenset((".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".gitignore", ".keep"))


def is_hidden(folder: str) -> bool:
    """Return whether a folder of this name holds no data: `.ipynb_checkpoints`, `.git`, `__MACOSX`."""
    return folder.startswith(".") or folder in _TOOL_FOLDERS


def is_image(file: str) -> bool:
    """Return whether a file of this name is an image; `._NAME` is not, macOS stores attributes of NAME there."""
    return not file.startswith("._") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _is_of_a_tool(file: str) -> bool:
    return file.startswith("._") or file in _TOOL_FILES


def existing_folder(kind: str, location: str) -> Path:
    """Return the folder of a location.

    Raises:
        UserError: There is none.
    """
    folder = Path(location).expanduser()
    if not location or not folder.is_dir():
        raise UserError(
            f"data source '{kind}:{location}': {location or '(nothing)'} is not a folder; write {kind}:FOLDER"
        )
    return folder


def note_left_out(name: str, place: Path | str, files: Sequence[str]) -> None:
    """Log how many files were left out, by suffix, and the first of them; files of tools do not count."""
    files = [file for file in files if not _is_of_a_tool(os.path.basename(file))]
    if not files:
        return
    kinds = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files)
    listed = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common(5))
    what = "1 file" if len(files) == 1 else f"{len(files)} files"
    logger.warning(
        "%s: %s in %s left out, no images by their names (%s), such as %s", name, what, place, listed, files[0]
    )


def note_not_read(name: str, place: Path | str, what: Iterable[str]) -> None:
    """Log files or folders that belong to no split and are not read."""
    found = sorted(what)
    if found:
        listed = ", ".join(found[:5])
        logger.warning("%s: not read, since the name has no split: %s (%d in %s)", name, listed, len(found), place)
