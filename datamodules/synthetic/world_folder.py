"""Synthetic worlds as folders that are written once, whole or not at all, with their settings beside the files."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_folder_once(
    root: Path, settings_file: str, settings: Mapping[str, Any], write: Callable[[Path], None]
) -> None:
    """Writes a world to ``root`` unless it is there.

    Args:
        root: Its folder.
        settings_file: Name of the file in it that says what the world was made by.
        settings: All that decides the world's files, as JSON holds it.
        write: Makes the folder that it is given, with all files but that one.

    Raises:
        ValueError: If ``root`` holds a world of other settings, or something else.
    """
    if _is_written(root, settings_file, settings):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        (temporary / settings_file).write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(temporary, root)  # an empty folder may stand there
    except OSError:
        if not _is_written(root, settings_file, settings):  # unless another run wrote the same world meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_written(root: Path, settings_file: str, settings: Mapping[str, Any]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / settings_file
    remedy = "Give another root, or delete that folder to have the world written anew."
    if not file.is_file():
        raise ValueError(f"{root} is no synthetic world of this kind: it holds files, but no {settings_file}. {remedy}")
    try:
        found = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {remedy}") from error
    if different := [key for key in {**settings, **found} if found.get(key) != settings.get(key)]:
        held, asked = ({key: one.get(key) for key in different} for one in (found, settings))
        raise ValueError(f"{root} holds a world with {held}, but the settings ask for {asked}. {remedy}")
    return True
