"""Folders of trained models: what has to be there, and writing them whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

FORMAT_NAME = "prompt_format.json"  # in the final folder of a run: how its samples were written


def existing(folder: str | Path, name: str) -> Path:
    """A file or folder in a folder of ``BituneModel.save_pretrained``; FileNotFoundError where it is missing."""
    path = Path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a folder of save_pretrained (of a run: final)")
    return path


def check_new(option: str, folder: Path) -> None:
    """Refuse what can't become a new folder, as an error of ``option`` (ValueError)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(".")):
        raise ValueError(f"{option}: expected a new or empty folder, other than the current one, got {folder}")
    if any(p.is_file() for p in folder.parents):
        raise ValueError(f"{option}: expected a new or empty folder, got {folder}, which is below a file")


@contextmanager
def whole_folder(folder: Path):
    """Inside, a hidden folder beside it to write in, which becomes ``folder`` when all is there."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    os.replace(unfinished, folder)
