"""Pictures with words: captions, scales, legends and contact sheets."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_modules.functional.colour_maps import contact_sheet, turbo

TEXT_SIZE = 14  # pixels
ROW = TEXT_SIZE + 8  # height of a line of text
MARGIN = 8
PAPER, INK, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
LEGEND_ROWS = 14  # of a column at least, also beside a picture that is not as high
CELL_WIDTHS = (280, 440)  # of a contact sheet: narrower pictures are enlarged for the words, wider ones reduced


class LegendEntry(NamedTuple):
    """One line of a legend.

    Attributes:
        name: What it is about.
        colour: 0..1.
        detail: A few characters at the right.
    """

    name: str
    colour: Float[Tensor, "3"]
    detail: str


def captioned(
    picture: Float[Tensor, "height width 3"], caption: str, detail: str = ""
) -> Float[Tensor, "taller width 3"]:
    """Adds a line of words below a picture: what does not fit of the caption is cut, the detail stands at the right."""
    line = Image.new("RGB", (picture.shape[1], ROW), PAPER)
    draw = ImageDraw.Draw(line)
    detail_width = draw.textlength(detail, _font()) + MARGIN if detail else 0
    draw.text((MARGIN, ROW / 2), shortened(caption, line.width - detail_width - 2 * MARGIN), INK, _font(), "lm")
    draw.text((line.width - MARGIN, ROW / 2), detail, FAINT, _font(), "rm")
    return torch.cat([picture, _pixels(line).to(picture)])


def with_scale(picture: Float[Tensor, "height width 3"], low: str, high: str) -> Float[Tensor, "taller width 3"]:
    """Adds the colours below a picture, from blue to red, with what the ends stand for."""
    line = Image.new("RGB", (picture.shape[1], ROW), PAPER)
    draw = ImageDraw.Draw(line)
    left = draw.textlength(low, _font()) + 2 * MARGIN
    right = line.width - draw.textlength(high, _font()) - 2 * MARGIN
    draw.text((MARGIN, ROW / 2), low, INK, _font(), "lm")
    draw.text((line.width - MARGIN, ROW / 2), high, INK, _font(), "rm")
    if right - left >= 2 * MARGIN:  # a narrow picture has room for the words alone
        bar = turbo(torch.linspace(0, 1, int(right - left))).expand(ROW - 10, -1, -1)
        line.paste(_image(bar), (int(left), 5))
    return torch.cat([picture, _pixels(line).to(picture)])


def with_legend(
    picture: Float[Tensor, "height width 3"], entries: Sequence[LegendEntry], most: int = 60
) -> Float[Tensor, "taller wider 3"]:
    """Adds a panel at the right of a picture with the meaning of its colours, beside it and never over it.

    Args:
        picture: The picture.
        entries: The meanings, most important first; in columns as high as the picture allows.
        most: Entries shown; the rest is counted.
    """
    shown = list(entries[:most])
    if len(entries) > most:
        shown.append(LegendEntry(f"and {len(entries) - most} more", torch.tensor(PAPER) / 255, ""))
    most_rows = max(LEGEND_ROWS, (picture.shape[0] - 2 * MARGIN) // ROW)
    rows = math.ceil(len(shown) / math.ceil(len(shown) / most_rows))
    columns = [shown[start : start + rows] for start in range(0, len(shown), rows)]
    panels = [_legend_column(column) for column in columns]
    height = max([picture.shape[0], *(panel.height for panel in panels)])
    sheet = Image.new("RGB", (picture.shape[1] + sum(panel.width for panel in panels), height), PAPER)
    sheet.paste(_image(picture), (0, 0))
    left = picture.shape[1]
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    return _pixels(sheet).to(picture)


def _legend_column(entries: Sequence[LegendEntry]) -> Image.Image:
    names = [shortened(entry.name, 220) for entry in entries]
    width = max(_font().getlength(name) for name in names) + max(_font().getlength(entry.detail) for entry in entries)
    panel = Image.new("RGB", (int(width) + ROW + 4 * MARGIN, len(entries) * ROW + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(panel)
    for row, (name, entry) in enumerate(zip(names, entries, strict=True)):
        top = MARGIN + row * ROW
        colour = tuple(int(part) for part in (entry.colour * 255).round())
        draw.rectangle((MARGIN, top + 3, MARGIN + ROW - 6, top + ROW - 3), colour)
        draw.text((MARGIN + ROW + 2, top + ROW / 2), name, INK, _font(), "lm")
        draw.text((panel.width - MARGIN, top + ROW / 2), entry.detail, FAINT, _font(), "rm")
    return panel


def cell(
    picture: Float[Tensor, "height width 3"], caption: str, detail: str = ""
) -> Float[Tensor, "cell_height cell_width 3"]:
    """Brings a picture to the size of a contact sheet's cell, with a caption."""
    height, width = picture.shape[:2]
    new_width = min(max(width, CELL_WIDTHS[0]), CELL_WIDTHS[1])
    size = (new_width, max(1, round(height * new_width / width)))
    resized = _image(picture).resize(size, Image.Resampling.LANCZOS if new_width < width else Image.Resampling.BICUBIC)
    framed = Image.new("RGB", (size[0] + 4, size[1] + 4), PAPER)
    framed.paste(resized, (2, 2))
    return captioned(_pixels(framed), caption, detail)


def sheet(cells: Sequence[Float[Tensor, "height width 3"]]) -> Float[Tensor, "sheet_height sheet_width 3"]:
    """Lays cells out row by row, on paper."""
    stacked = torch.stack(list(cells))
    paper = torch.tensor(PAPER) / 255
    return contact_sheet(stacked - paper) + paper  # cells that are left over are zero: paper


def shortened(text: str, width: float) -> str:
    """Cuts a text to a width in pixels and marks the cut."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT_SIZE)


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)
