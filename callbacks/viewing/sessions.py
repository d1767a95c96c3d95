"""One browser's side of the viewer, without the browser: what it asks for, has selected and has recorded."""

import io
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from callbacks.viewing.browser_cameras import BrowserCamera, camera_of_browser, canvas_size
from callbacks.viewing.drawing_thread import DrawingThread
from callbacks.viewing.renderer import Picture, Renderer, SceneView, ViewedScene, ViewerState, phrases_at
from callbacks.viewing.video import encode_video, find_ffmpeg
from datamodules.readers.gaussians import write_gaussian_ply
from lightning_modules.functional.answers.gaussian_answers import best_level, gaussian_relevancy
from lightning_modules.functional.answers.gaussian_components import SelectionSettings, linked_groups, select_gaussians
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.answers.view_answers import Prompts
from lightning_modules.functional.camera_paths import camera_path
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene

FRAMES_PER_SECOND = 24
Part = Literal["all", "selected", "others"]


class ViewerContent(NamedTuple):
    """What a viewer knows beside the scene itself.

    Attributes:
        title: Shown above the settings.
        level_names: Names of the levels of the scene's language; none without.
        cameras: Photographs' cameras by name; the first is looked through at the beginning.
        phrases: Texts of the class map and of what is at a point, until the user gives others.
        encode: Texts to unit embeddings; raises ``ValueError`` for a text it does not know. None without language.
        protocol: How relevancy becomes a mask.
    """

    title: str
    level_names: tuple[str, ...]
    cameras: dict[str, Camera]
    phrases: tuple[str, ...]
    encode: Callable[[Sequence[str]], Float[Tensor, "phrases channels"]] | None
    protocol: ProtocolSettings


class Look(NamedTuple):
    """Where a browser looks from, and the size of its canvas in pixels."""

    camera: BrowserCamera
    width: int
    height: int


class Selection(NamedTuple):
    """Gaussians chosen by a text.

    Attributes:
        prompt: The text.
        level: Level at which they answer it best.
        scores: [N] relevancy of all Gaussians at that level.
        selected: [N] the chosen ones.
        groups: [N] the group of linked Gaussians of each chosen one, the largest 0; -1 for the others.
    """

    prompt: str
    level: int
    scores: Float[Tensor, " gaussians"]
    selected: Bool[Tensor, " gaussians"]
    groups: Int[Tensor, " gaussians"]


class Here(NamedTuple):
    """What is at a point of the picture.

    Attributes:
        phrases: Text, relevancy and level, the most relevant first.
        position: Of the surface in the world, or None where the scene is transparent.
    """

    phrases: list[tuple[str, float, int]]
    position: tuple[float, float, float] | None


class Session:
    """Holds what one browser asks for; its methods are called by the browser's controls, in any thread.

    Args:
        content: Of the viewer.
        scene: The scene as it is now.
        renderer: Used in the drawing thread alone.
        drawing: The drawing thread.
        look: Returns where the browser looks from.
        max_pixels: Pixels of a fine picture at most.
        changed: Called when the picture is out of date.
    """

    def __init__(
        self,
        content: ViewerContent,
        scene: ViewedScene,
        renderer: Renderer,
        drawing: DrawingThread[Any],
        look: Callable[[], Look],
        max_pixels: int,
        changed: Callable[[], None],
    ) -> None:
        self.content, self.look, self.max_pixels = content, look, max_pixels
        self.state = ViewerState()
        self.whole = scene
        self.scene = scene
        self.selection: Selection | None = None
        self.key_frames: list[BrowserCamera] = []
        self.is_gone = False
        self._renderer, self._drawing, self._changed = renderer, drawing, changed
        self._lock = threading.Lock()

    def change(self, **settings: Any) -> None:
        """Changes fields of the state and has the picture drawn anew."""
        with self._lock:
            self.state = replace(self.state, **settings)
        self._changed()

    def show(self, scene: ViewedScene) -> None:
        """Goes over to a newer scene; a selection belongs to the older one."""
        with self._lock:
            self.whole = self.scene = scene
            self.selection = None
        self._changed()

    # Text

    def ask(self, text: str) -> None:
        """Shows the relevancy of a text.

        Raises:
            ValueError: If the text is empty or the encoder does not know it.
        """
        self.change(prompt=self._encoded([_given(text, "a text to look for")]), mode="relevancy")

    def ask_nothing(self) -> None:
        """Takes the prompt away."""
        self.change(prompt=None)

    def name_classes(self, text: str) -> None:
        """Takes a list, separated by commas, as classes and as the answers to what is at a point.

        Raises:
            ValueError: If the list is empty or the encoder does not know a phrase.
        """
        names = [name for name in (part.strip() for part in text.split(",")) if name]
        if not names:
            raise ValueError("The list of phrases is empty. Give some, separated by commas.")
        self.change(classes=self._encoded(list(dict.fromkeys(names))))

    def _encoded(self, texts: Sequence[str]) -> Prompts:
        if self.content.encode is None:
            raise ValueError("This scene has no language: there is no text encoder. Train a language field first.")
        return Prompts(tuple(texts), self.content.encode(texts).to(self.whole.gaussians.means.device))

    # Pictures

    def camera(self, scale: float = 1.0) -> Camera:
        """Returns the camera of the browser at the size to draw."""
        look = self.look()
        size = canvas_size(look.width, look.height, self.max_pixels, scale)
        return camera_of_browser(look.camera, *size)

    def what_is_here(self, x: float, y: float) -> Here:
        """Answers what is at a point of the canvas, from 0, 0 (top left) to 1, 1.

        Raises:
            ValueError: If there is no list of phrases.
        """
        classes = self.state.classes
        if classes is None:
            raise ValueError("There are no phrases to choose from. Give some, separated by commas.")
        return self._drawing.run(lambda: self._ask_point(self._view(), x, y, classes)).result()

    def _view(self) -> SceneView:
        return self._renderer.view(self.scene, self.camera())

    @staticmethod
    def _ask_point(view: SceneView, x: float, y: float, classes: Prompts) -> Here:
        height, width = view.size
        column, row = min(int(x * width), width - 1), min(int(y * height), height - 1)
        pixel_id = max(row, 0) * width + max(column, 0)
        return Here(phrases_at(view, pixel_id, classes), view.point(pixel_id))

    def picture_png(self) -> bytes:
        """Returns the picture as it is, fine, as a PNG file."""
        picture = self._drawing.run(lambda: self._draw(self.state, self.camera())).result()
        content = io.BytesIO()
        Image.fromarray(picture.image).save(content, "PNG")
        return content.getvalue()

    def _draw(self, state: ViewerState, camera: Camera) -> Picture:
        return self._renderer.draw(state, self.scene, camera)

    # Gaussians

    def select(self, settings: SelectionSettings) -> Selection:
        """Selects the Gaussians that answer the prompt.

        Raises:
            ValueError: If there is no prompt.
        """
        prompt = self.state.prompt
        if prompt is None:
            raise ValueError("There is no text to select by. Type one first.")
        selection = self._drawing.run(lambda: _select(self.whole, prompt, settings)).result()
        self.selection = selection
        return selection

    def show_part(self, part: Part) -> None:
        """Shows all Gaussians, the selected ones alone, or all but these.

        Raises:
            ValueError: If nothing is selected.
        """
        if part == "all":
            scene = self.whole
        else:
            selected = self._some_selected().selected
            scene = self.whole.part(selected if part == "selected" else ~selected)
        if self.scene is not self.whole:
            self._drawing.run(partial(self._renderer.forget, self.scene))
        self.scene = scene
        self._changed()

    def selected_ply(self) -> bytes:
        """Returns the selected Gaussians as a 3DGS ``.ply``.

        It has two further properties: ``relevancy``, and ``label``, the number of the object, the largest being 0.

        Raises:
            ValueError: If nothing is selected.
        """
        selection = self._some_selected()
        selected, whole = selection.selected, self.whole
        properties = {"relevancy": selection.scores[selected], "label": selection.groups[selected]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "selected.ply"
            write_gaussian_ply(path, GaussianScene(*(part[selected] for part in whole.gaussians)), properties)
            return path.read_bytes()

    def _some_selected(self) -> Selection:
        if self.selection is None or not bool(self.selection.selected.any()):
            raise ValueError("No Gaussian is selected. Type a text and select first, perhaps with a lower threshold.")
        return self.selection

    # Camera path

    def add_key_frame(self) -> int:
        """Keeps the camera for the path; returns how many are kept."""
        self.key_frames.append(self.look().camera)
        return len(self.key_frames)

    def video(self, seconds: float, closed: bool, progressed: Callable[[float], None]) -> tuple[str, bytes]:
        """Flies through the key frames and returns a video of what is shown: its suffix and its content.

        Args:
            seconds: Length.
            closed: Fly back to the first key frame.
            progressed: Told the share that is done, 0 to 1.

        Raises:
            ValueError: If there are fewer than two key frames.
        """
        if len(self.key_frames) < 2:
            raise ValueError(f"A camera path needs two key frames or more, there are {len(self.key_frames)}. Add some.")
        size = self.camera()
        cameras = [camera_of_browser(key, size.width, size.height) for key in self.key_frames]
        path = camera_path(cameras, max(2, round(seconds * FRAMES_PER_SECOND)), closed=closed)
        state, frames = self.state, []
        for camera in path:  # one frame a turn: the browsers are served in between
            frames.append(self._drawing.run(partial(self._draw, state, camera)).result().image)
            progressed(len(frames) / len(path))
            if self.is_gone:
                raise ValueError("The browser has gone; the video was given up.")
        return encode_video(frames, FRAMES_PER_SECOND, find_ffmpeg())


def _select(scene: ViewedScene, prompt: Prompts, settings: SelectionSettings) -> Selection:
    assert scene.language is not None  # there is no prompt without
    relevancy = gaussian_relevancy(scene.language, prompt.embeddings, baseline=scene.baseline)
    scores, levels = best_level(relevancy)
    selected = select_gaussians(scene.gaussians, scores[0], settings, neighbours=scene.neighbours)
    groups = linked_groups(scene.gaussians, selected, settings)
    return Selection(prompt.texts[0], int(levels[0]), scores[0], selected, groups)


def _given(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"The prompt is empty. Type {what}.")
    return text.strip()


def typical_distance(view: SceneView) -> float:
    """Returns the median depth of what a view shows, in the unit of the scene; 1 where it shows nothing."""
    depth = view.rendered.depth[view.rendered.alpha >= 0.5]
    return float(torch.median(depth)) if depth.numel() else 1.0
