"""The controls of one browser: what they do is in :mod:`callbacks.viewing.sessions`."""

import html
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import viser

from callbacks.viewing.browser_cameras import browser_camera
from callbacks.viewing.renderer import LANGUAGE_MODES, MODES, Answer, Mode, Picture
from callbacks.viewing.sessions import Here, Part, Session
from callbacks.viewing.video import find_ffmpeg
from lightning_modules.functional.answers.gaussian_components import SelectionSettings
from lightning_modules.functional.colour_maps import class_colours

TYPING_PAUSE_S = 0.2
"""A text is looked up when nothing was typed for this long, seconds."""
COMPLAINT_PAUSE_S = 1.0
"""An unknown text that still stands after this long is complained of, seconds."""

BEST_LEVEL = "best"
PARTS: dict[str, Part] = {"All": "all", "Selected": "selected", "Others": "others"}
LEGEND_ROWS = 12
HERE_ROWS = 5


class Panel:
    """Builds the controls in a browser and keeps what they say up to date.

    Args:
        client: The browser.
        session: What the controls act on.
    """

    def __init__(self, client: viser.ClientHandle, session: Session) -> None:
        self._client, self._session, self._gui = client, session, client.gui
        self._has_language = session.content.encode is not None
        self._complained_of = ""
        self._status = self._gui.add_markdown("")
        self._build_view()
        if self._has_language:
            with self._gui.add_folder("What is here", expand_by_default=False):
                self._build_phrases()
            with self._gui.add_folder("Take objects out", expand_by_default=False):
                self._build_selection()
        with self._gui.add_folder("Camera", expand_by_default=False):
            self._build_camera()
        with self._gui.add_folder("Picture", expand_by_default=False):
            self._build_picture()

    # What the browser shows

    def show(self, picture: Picture, status: str | None) -> None:
        """Says about a picture what it cannot show itself."""
        if status is not None:
            _set(self._status, status)
        if not self._has_language:
            return
        if picture.answer is not None:
            _set(self._answer, answer_text(picture.answer, self._session.content.level_names))
        if picture.class_shares is not None:
            _set(self._legend, legend(picture.class_shares))
        self._legend.visible = picture.class_shares is not None

    def notify(self, title: str, body: str) -> None:
        """Shows a notice that something went wrong; it goes away by itself."""
        self._client.add_notification(title, body, auto_close_seconds=8.0, color="red")

    # Controls

    def _build_view(self) -> None:
        gui, session = self._gui, self._session
        modes = [mode.capitalize() for mode in MODES if self._has_language or mode not in LANGUAGE_MODES]
        if self._has_language:
            with gui.add_form(None) as form:
                self._prompt = gui.add_text("Prompt", "", hint="A text to look for; Enter asks at once.")
            self._prompt.on_update(lambda _: self._typed())
            form.on_submit(lambda _: self._entered())
            self._answer = gui.add_markdown("Type what to look for.")
        self._mode = gui.add_dropdown("Show", modes, initial_value=session.state.mode.capitalize())
        self._mode.on_update(lambda _: self._mode_chosen())
        if self._has_language:
            levels = [BEST_LEVEL, *session.content.level_names]
            level = gui.add_dropdown(
                "Level", levels, hint="Best: the one that answers the prompt best; for features the first."
            )
            level.on_update(
                lambda _: session.change(level=levels.index(level.value) - 1 if level.value != BEST_LEVEL else None)
            )
            threshold = gui.add_slider("Threshold", 0.0, 0.95, 0.05, session.state.threshold, hint="Of the mask.")
            threshold.on_update(lambda _: session.change(threshold=float(threshold.value)))
            opacity = gui.add_slider("Opacity", 0.0, 1.0, 0.05, session.state.opacity, hint="Of what is laid over.")
            opacity.on_update(lambda _: session.change(opacity=float(opacity.value)))
            mask = gui.add_checkbox("Mask", session.state.has_mask, hint="Outline and tint the mask.")
            mask.on_update(lambda _: session.change(has_mask=mask.value))
            self._legend = gui.add_html("", visible=False)

    def _build_phrases(self) -> None:
        gui, session = self._gui, self._session
        phrases = gui.add_text(
            "Phrases",
            ", ".join(session.content.phrases),
            multiline=True,
            hint="Separated by commas; also the classes of the class map.",
        )
        phrases.on_update(lambda _: self._phrases_typed(phrases))
        self._here = gui.add_markdown("Click on the picture.")
        self._client.scene.on_click()(lambda event: self._clicked(*event.screen_pos))
        if session.content.phrases:
            self._guarded(lambda: session.name_classes(phrases.value))

    def _build_selection(self) -> None:
        gui, session = self._gui, self._session
        settings = SelectionSettings()
        threshold = gui.add_slider(
            "Relevancy", 0.0, 1.0, 0.05, settings.threshold, hint="Least, of the way to the peak."
        )
        opacity = gui.add_slider("Min. opacity", 0.0, 1.0, 0.05, settings.min_opacity, hint="Of a Gaussian.")
        select = gui.add_button("Select by the prompt")
        said = gui.add_markdown("Selects the Gaussians that answer the prompt.")
        part = gui.add_button_group("Show", list(PARTS))
        download = gui.add_button("Download .ply", hint="The selected Gaussians, for any 3DGS viewer.")

        def selected() -> None:
            chosen = session.select(
                SelectionSettings(threshold=float(threshold.value), min_opacity=float(opacity.value))
            )
            count, objects = int(chosen.selected.sum()), int(chosen.groups.amax()) + 1
            name = session.content.level_names[chosen.level]
            parts = f"{objects} part{'' if objects == 1 else 's'}"
            _set(said, f"**{plain(chosen.prompt)}**: {count} Gaussians in {parts}, level {plain(name)}.")

        def downloaded() -> None:
            name = file_name(session.selection.prompt if session.selection else "selected")
            self._client.send_file_download(f"{name}.ply", session.selected_ply(), save_immediately=True)

        select.on_click(lambda _: self._guarded(selected))
        part.on_click(lambda _: self._guarded(lambda: session.show_part(PARTS[part.value])))
        download.on_click(lambda _: self._guarded(downloaded))

    def _build_camera(self) -> None:
        gui, session = self._gui, self._session
        names = list(session.content.cameras)
        if names:
            views = gui.add_dropdown("Photograph", names, hint="Look through its camera.")
            again = gui.add_button("Back to this photograph", color="gray")
            views.on_update(lambda _: self._go_to(views.value))
            again.on_click(lambda _: self._go_to(views.value))
        keep = gui.add_button("Add key frame", color="gray", hint="Of a flight, from where the camera is.")
        drop = gui.add_button("Drop all key frames", color="gray")
        seconds = gui.add_slider("Seconds", 1.0, 30.0, 0.5, 4.0)
        closed = gui.add_checkbox("Closed", False, hint="Fly back to the first key frame.")
        kind = "MP4" if find_ffmpeg() else "animated WebP; MP4 with ffmpeg installed"
        film = gui.add_button("Download video", hint=f"As {kind}.")
        progress = gui.add_progress_bar(0.0, visible=False)

        def counted() -> None:
            keep.label = f"Add key frame ({len(session.key_frames)})" if session.key_frames else "Add key frame"

        def kept() -> None:
            session.add_key_frame()
            counted()

        def dropped() -> None:
            session.key_frames.clear()
            counted()

        def advanced(share: float) -> None:
            progress.value = 100 * share

        def filmed() -> None:
            progress.visible = film.disabled = True
            try:
                suffix, content = session.video(float(seconds.value), closed.value, advanced)
                self._client.send_file_download(f"camera_path{suffix}", content, save_immediately=True)
            finally:
                progress.visible = film.disabled = False

        keep.on_click(lambda _: kept())
        drop.on_click(lambda _: dropped())
        film.on_click(lambda _: self._guarded(filmed))

    def _build_picture(self) -> None:
        gui, session = self._gui, self._session
        background = gui.add_rgb("Background", (0, 0, 0))
        background.on_update(lambda _: session.change(background=tuple(part / 255 for part in background.value)))
        save = gui.add_button("Save picture (PNG)")

        def saved() -> None:
            name = session.state.prompt.texts[0] if session.state.prompt is not None else session.state.mode
            self._client.send_file_download(f"{file_name(name)}.png", session.picture_png(), save_immediately=True)

        save.on_click(lambda _: self._guarded(saved))

    # Events

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Runs what a user asked for; what was wrong with it is said in the browser."""
        try:
            action()
        except ValueError as error:
            self.notify("That did not work", str(error))

    def _typed(self) -> None:
        """Looks a text up once typing rests; complains only of one that is left standing."""
        text = self._prompt.value
        time.sleep(TYPING_PAUSE_S)
        if text != self._prompt.value:
            return
        if not text.strip():
            self._session.ask_nothing()
            _set(self._answer, "Type what to look for.")
            return
        try:
            self._ask(text)
        except ValueError as error:
            _set(self._answer, f"*{plain(str(error))}*")
            time.sleep(COMPLAINT_PAUSE_S)
            if text == self._prompt.value:
                self._complain(text, error)

    def _entered(self) -> None:
        text = self._prompt.value
        try:
            self._ask(text)
        except ValueError as error:
            self._complain(text, error)

    def _ask(self, text: str) -> None:
        self._session.ask(text)
        self._complained_of = ""
        if self._mode.value != "Relevancy":
            self._mode.value = "Relevancy"

    def _complain(self, text: str, error: ValueError) -> None:
        if not text or text != self._complained_of:
            self._complained_of = text
            self.notify("No answer to that prompt", str(error))

    def _mode_chosen(self) -> None:
        mode = cast(Mode, self._mode.value.lower())
        if mode != self._session.state.mode:
            self._session.change(mode=mode)
        if mode == "relevancy" and self._session.state.prompt is None:
            _set(self._answer, "Type what to look for.")

    def _phrases_typed(self, phrases: viser.GuiTextHandle) -> None:
        text = phrases.value
        time.sleep(COMPLAINT_PAUSE_S)
        if text == phrases.value:
            self._guarded(lambda: self._session.name_classes(text))

    def _clicked(self, x: float, y: float) -> None:
        def asked() -> None:
            here = self._session.what_is_here(x, y)
            _set(self._here, here_text(here, self._session.content.level_names))
            self._mark(here)

        self._guarded(asked)

    def _mark(self, here: Here) -> None:
        """Marks a point in the picture with the name of what is there."""
        scene = self._client.scene
        if here.position is None:
            scene.remove_by_name("/here")
            return
        text, score, _ = here.phrases[0]
        scene.add_label("/here", f"{text} {score:.2f}", position=here.position, anchor="bottom-left")

    def _go_to(self, name: str) -> None:
        target = browser_camera(self._session.content.cameras[name])
        with self._client.atomic():
            self._client.camera.wxyz = cast(Any, target.wxyz)
            self._client.camera.position = cast(Any, target.position)
            self._client.camera.fov = target.fov


def answer_text(answer: Answer, level_names: tuple[str, ...]) -> str:
    """Returns what is said about the answer to a prompt, as Markdown."""
    best = max(answer.peaks)
    levels = " · ".join(
        f"**{plain(name)} {peak:.2f}**" if level == answer.level else f"{plain(name)} {peak:.2f}"
        for level, (name, peak) in enumerate(zip(level_names, answer.peaks, strict=True))
    )
    # At 0.5 the prompt fits no better than the best fitting negative phrase.
    verdict = "" if best > 0.5 else "<br>Nothing in sight fits better than the negative phrases."
    return (
        f"**{plain(answer.prompt)}** at level **{plain(level_names[answer.level])}**, "
        f"mask {100 * answer.covered:.1f} %<br>{levels}{verdict}"
    )


def here_text(here: Here, level_names: tuple[str, ...]) -> str:
    """Returns what is said about a point, as Markdown."""
    rows = [
        f"{plain(text)} {score:.2f} ({plain(level_names[level])})" for text, score, level in here.phrases[:HERE_ROWS]
    ]
    place = "nothing solid here" if here.position is None else "at ({:.2f}, {:.2f}, {:.2f})".format(*here.position)
    return "<br>".join([f"**{rows[0]}**", *rows[1:], place])


def legend(shares: Sequence[tuple[str, float]]) -> str:
    """Returns the colours of the classes in sight as HTML, the largest first."""
    colours = (class_colours(len(shares)) * 255).round().int().tolist()
    rows = [(share, name, colour) for (name, share), colour in zip(shares, colours, strict=True) if share > 0]
    rows.sort(key=lambda row: -row[0])
    square = "display:inline-block;width:.8em;height:.8em;border-radius:2px;background:rgb({},{},{})"
    lines = [
        f'<div><span style="{square.format(*colour)}"></span> {html.escape(name)} {100 * share:.1f} %</div>'
        for share, name, colour in rows[:LEGEND_ROWS]
    ]
    if len(rows) > LEGEND_ROWS:
        lines.append(f"<div>and {len(rows) - LEGEND_ROWS} more</div>")
    style = "padding:0 .8em .5em;font-size:.85em;line-height:1.5"
    return f'<div style="{style}">{"".join(lines) or "No class in sight."}</div>'


def plain(text: str) -> str:
    """Returns Markdown that shows a text as it is: viser runs what looks like HTML."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def file_name(text: str) -> str:
    """Returns a text as the stem of a file."""
    return re.sub(r"[^\w-]+", "_", text).strip("_") or "lexel"


def _set(handle: "viser.GuiMarkdownHandle | viser.GuiHtmlHandle", content: str) -> None:
    if handle.content != content:
        handle.content = content
