"""Lists of prompts, checked before anything is asked."""

import re
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn


def read_prompts(path: str | Path) -> list[str]:
    """Reads prompts, one per line; empty lines go, and comments from a # at the start of a line or after a blank.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Give a text file with one prompt per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). Save it as one, with one prompt per line.") from error
    prompts = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    if not any(prompts):
        raise ValueError(f"{path} holds no prompt; write one per line.")
    return [prompt for prompt in prompts if prompt]


def distinct_prompts(prompts: Sequence[str], setting: str) -> list[str]:
    """Returns prompts without outer blanks, each once, and says which were given again.

    Args:
        prompts: As given.
        setting: Where they were given, for the messages.

    Raises:
        ValueError: If a prompt is empty.
    """
    stripped = [prompt.strip() for prompt in prompts]
    if "" in stripped:
        raise ValueError(
            f"{setting}[{stripped.index('')}] of {len(stripped)} prompts is empty; allowed: words such as 'teapot'."
        )
    distinct = list(dict.fromkeys(stripped))
    if len(distinct) < len(stripped):
        again = [prompt for prompt in distinct if stripped.count(prompt) > 1]
        listing = ", ".join(map(repr, again[:5])) + (f" and {len(again) - 5} more" if len(again) > 5 else "")
        rank_zero_warn(f"{setting} has {listing} more than once; asked once.")
    return distinct
