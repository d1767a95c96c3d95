"""From a scene, a camera and settings to a picture: all that the viewer shows, without a browser."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightning_modules.functional.answers.gaussian_answers import GaussianBaseline, gaussian_baseline, nearest_gaussians
from lightning_modules.functional.answers.gaussian_components import SelectionSettings
from lightning_modules.functional.answers.language_scene import (
    LanguageMap,
    LanguageScene,
    language_map,
    level_weights,
    render_language,
)
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings, Segmentation, segment
from lightning_modules.functional.answers.next_prompt import negative_cosines, next_prompt_relevancy
from lightning_modules.functional.answers.view_answers import MIN_ALPHA, Prompts, class_map, nearest_prompts
from lightning_modules.functional.cameras import Camera, back_project
from lightning_modules.functional.colour_maps import (
    class_colours,
    class_picture,
    depth_picture,
    feature_colours,
    heat,
    mask_overlay,
    outlined,
    overlay,
)
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    PreparedView,
    RenderedPixels,
    prepare_view,
    render,
    render_codes,
)

Mode = Literal["colours", "depth", "features", "relevancy", "classes"]
MODES: tuple[Mode, ...] = get_args(Mode)
LANGUAGE_MODES: tuple[Mode, ...] = ("features", "relevancy", "classes")

PIXELS_AT_ONCE = 2**15
"""On a processor language is splatted so many pixels at a time, so that a browser that moves on need not wait long."""


@dataclass(frozen=True, eq=False)
class ViewerState:
    """What one browser asks to see."""

    mode: Mode = "colours"
    """Colours, depth, features (their principal components), relevancy of the prompt, or classes of a list."""
    prompt: Prompts | None = None
    """The one text that relevancy is shown of."""
    classes: Prompts | None = None
    """Texts of the class map, and of the answer to what is at a point."""
    level: int | None = None
    """Level to show; None takes the one that answers the prompt best, and the first for features."""
    threshold: float = 0.4
    """Of the mask; see ``ProtocolSettings.mask_threshold``."""
    opacity: float = 0.7
    """How much of the picture the highest relevancy, or a class, covers, 0..1."""
    has_mask: bool = True
    """Whether the mask is outlined and tinted."""
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Colour behind the scene, 0..1."""


class ViewedScene:
    """The Gaussians that are shown, with what they say of language if they have any.

    Args:
        gaussians: The scene.
        language: The same Gaussians with language, or None.
    """

    def __init__(self, gaussians: GaussianScene, language: LanguageScene | None) -> None:
        self.gaussians = gaussians
        self.language = language

    @cached_property
    def baseline(self) -> GaussianBaseline:
        """What every question to the Gaussians themselves needs."""
        assert self.language is not None  # nobody is offered the question otherwise
        return gaussian_baseline(self.language)

    @cached_property
    def neighbours(self) -> Int[Tensor, "gaussians neighbours"]:
        """The nearest Gaussians of each, over which a selection smooths; most of its work."""
        return nearest_gaussians(self.gaussians, SelectionSettings().smoothing_neighbours)

    def part(self, kept: Bool[Tensor, " gaussians"]) -> "ViewedScene":
        """Returns the scene with some of its Gaussians alone."""
        gaussians = GaussianScene(*(parameter[kept] for parameter in self.gaussians))
        if self.language is None:
            return ViewedScene(gaussians, None)
        codes = self.language.codes
        own = SparseCodes(codes.channel_ids[kept], codes.values[kept], codes.num_channels)
        return ViewedScene(gaussians, self.language._replace(gaussians=gaussians, codes=own))


class Answer(NamedTuple):
    """The answer to the prompt in the view, as numbers.

    Attributes:
        prompt: The prompt.
        level: The level that is shown.
        peaks: Highest smoothed relevancy at each level.
        covered: Share of the picture that the mask covers.
    """

    prompt: str
    level: int
    peaks: tuple[float, ...]
    covered: float


class Picture(NamedTuple):
    """What is shown.

    Attributes:
        image: [H, W, 3] uint8 RGB, on the CPU.
        answer: Of the relevancy mode.
        class_shares: Of the class mode: each class and its share of the picture, 0 to 1.
        depth_range: Of the depth mode: nearest and farthest, in the unit of the scene.
    """

    image: UInt8[np.ndarray, "height width 3"]
    answer: Answer | None = None
    class_shares: tuple[tuple[str, float], ...] | None = None
    depth_range: tuple[float, float] | None = None


class SceneView:
    """One view of a scene. What was computed is kept, so that the next picture of it costs only what has changed.

    Args:
        scene: The scene.
        camera: The camera, on the device of the scene.
    """

    def __init__(self, scene: ViewedScene, camera: Camera) -> None:
        self.scene = scene
        self.camera = camera
        self._answered: tuple[Prompts, Tensor] | None = None
        self._splatted: LanguageMap | None = None  # filled up to the pixel where the next band begins
        self._next_pixel = 0

    @cached_property
    def prepared(self) -> PreparedView:
        """The projected Gaussians."""
        return prepare_view(self.scene.gaussians, self.camera)

    @cached_property
    def rendered(self) -> RenderedPixels:
        """Colours on black, depth and opacity."""
        return render(self.scene.gaussians, self.prepared)

    @cached_property
    def language_map(self) -> LanguageMap:
        """What every prompt needs of the view."""
        self.splat_language(lambda: True)
        assert self._splatted is not None
        return self._splatted

    def splat_language(self, is_wanted: Callable[[], bool]) -> bool:
        """Splats the language in bands of rows and returns whether it is complete.

        It is the longest work on a view, on a processor a second and more. Between two bands it may be given up; the
        next call goes on where this one stopped.

        Args:
            is_wanted: Asked before each band.
        """
        num_pixels = self.camera.num_pixels
        if num_pixels <= PIXELS_AT_ONCE or self.prepared.projected.is_cuda:
            if self._splatted is None:
                self._splatted, self._next_pixel = render_language(self.language, self.prepared), num_pixels
            return True
        if self._splatted is None:
            codes, device = self.language.codes, self.prepared.projected.device
            self._splatted = LanguageMap(
                self.camera,
                torch.empty(num_pixels, codes.num_channels, device=device),
                torch.empty(self.language.num_levels, num_pixels, device=device),
                torch.empty(num_pixels, device=device),
            )
        while self._next_pixel < num_pixels:
            if not is_wanted():
                return False
            stop = min(self._next_pixel + PIXELS_AT_ONCE, num_pixels)
            pixel_ids = torch.arange(self._next_pixel, stop, device=self.prepared.projected.device)
            weights, alpha = render_codes(self.prepared, self.language.codes, pixel_ids)
            band = slice(self._next_pixel, stop)
            self._splatted.weights[band], self._splatted.alpha[band] = weights, alpha
            self._splatted.norms[:, band] = language_map(self.language, self.camera, weights, alpha).norms
            self._next_pixel = stop
        return True

    @cached_property
    def negatives(self) -> Float[Tensor, "levels pixels"]:
        """Highest cosine with a negative phrase: like the lengths, the same for every prompt."""
        return negative_cosines(self.language, self.language_map)

    @property
    def language(self) -> LanguageScene:
        """The scene with language."""
        assert self.scene.language is not None  # the modes that need it are not offered without
        return self.scene.language

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.camera.height, self.camera.width

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept, in bytes; grows when a mode is first asked for."""
        return sum(_bytes(value) for value in vars(self).values())

    def relevancy(self, prompt: Prompts) -> Float[Tensor, "levels 1 height width"]:
        """Returns the relevancy of one prompt at all levels; the last one is kept, for its threshold to be tried."""
        if self._answered is None or self._answered[0] is not prompt:
            maps = next_prompt_relevancy(self.language, self.language_map, self.negatives, prompt.embeddings[0])
            self._answered = prompt, maps[:, None]
        return self._answered[1]

    def segmentation(self, prompt: Prompts, threshold: float, protocol: ProtocolSettings) -> Segmentation:
        """Returns masks and smoothed relevancy of a prompt at all levels."""
        return segment(self.relevancy(prompt), replace(protocol, mask_threshold=threshold))

    def colours(self, background: tuple[float, float, float]) -> Float[Tensor, "height width 3"]:
        """Returns the scene's colours over a background, 0..1."""
        behind = (1 - self.rendered.alpha)[:, None] * self.rendered.rgb.new_tensor(background)
        return (self.rendered.rgb + behind).clamp(0, 1).unflatten(0, self.size)

    def features(self, level: int) -> Float[Tensor, "height width 3"]:
        """Returns a level's features as colours, the same for the same feature in every view."""
        weights = level_weights(self.language, self.language_map.weights)[level]
        colours = feature_colours(weights, self.language.codebooks[level], num_layers=self.language.num_layers)
        return colours.unflatten(0, self.size)

    def point(self, pixel_id: int) -> tuple[float, float, float] | None:
        """Returns where in the world a pixel's surface is, or None where the scene covers it by less than half."""
        if float(self.rendered.alpha[pixel_id]) < MIN_ALPHA:
            return None
        points, _ = back_project(self.rendered.depth.unflatten(0, self.size), self.camera)
        x, y, z = points.flatten(0, 1)[pixel_id].tolist()
        return x, y, z


def draw(state: ViewerState, view: SceneView, protocol: ProtocolSettings) -> Picture:
    """Draws a view as a browser asks for it.

    A mode that lacks its prompt, its list or a scene with language shows the colours.

    Args:
        state: What is asked for.
        view: The view.
        protocol: How relevancy becomes a mask and how the level is chosen; its pools belong to this picture's width.
    """
    colours = view.colours(state.background)
    if state.mode == "depth":
        depth, alpha = view.rendered.depth.unflatten(0, view.size), view.rendered.alpha.unflatten(0, view.size)
        picture, depth_range = depth_picture(depth, alpha >= MIN_ALPHA)
        return Picture(_pixels(picture), depth_range=depth_range)
    if view.scene.language is None:
        return Picture(_pixels(colours))
    if state.mode == "features":
        return Picture(_pixels(view.features(state.level or 0)))
    if state.mode == "relevancy" and state.prompt is not None:
        return _draw_relevancy(state, state.prompt, view, colours, protocol)
    if state.mode == "classes" and state.classes is not None:
        return _draw_classes(state, state.classes, view, colours)
    return Picture(_pixels(colours))


def _draw_relevancy(
    state: ViewerState, prompt: Prompts, view: SceneView, colours: Tensor, protocol: ProtocolSettings
) -> Picture:
    segmentation = view.segmentation(prompt, state.threshold, protocol)
    level = int(segmentation.levels[0]) if state.level is None else state.level
    relevancy, mask = segmentation.level_relevancy[level, 0], segmentation.level_masks[level, 0]
    picture = overlay(colours, heat(relevancy), state.opacity)
    if state.has_mask:
        picture = outlined(mask_overlay(picture, mask, alpha=0.15), mask)
    peaks = tuple(segmentation.scores[:, 0].tolist())
    return Picture(_pixels(picture), Answer(prompt.texts[0], level, peaks, float(mask.float().mean())))


def _draw_classes(state: ViewerState, classes: Prompts, view: SceneView, colours: Tensor) -> Picture:
    ids = class_map(view.language, view.language_map, classes.embeddings)
    picture = class_picture(colours, ids, class_colours(len(classes.texts)), state.opacity)
    shares = torch.bincount(ids[ids >= 0], minlength=len(classes.texts)) / ids.numel()
    return Picture(_pixels(picture), class_shares=tuple(zip(classes.texts, shares.tolist(), strict=True)))


def phrases_at(view: SceneView, pixel_id: int, phrases: Prompts) -> list[tuple[str, float, int]]:
    """Returns text, relevancy and level of phrases at a pixel, the most relevant first: what is here."""
    scores, levels = nearest_prompts(view.language, view.language_map, pixel_id, phrases.embeddings).max(dim=0)
    rows = zip(phrases.texts, scores.tolist(), levels.tolist(), strict=True)
    return sorted(rows, key=lambda row: -row[1])


class Renderer:
    """Draws pictures and keeps the views last drawn, within a limit of memory.

    Args:
        protocol: See ``draw``.
        cache_mib: Memory for views; the last one is kept in any case.
    """

    def __init__(self, protocol: ProtocolSettings = ProtocolSettings(), cache_mib: int = 1024) -> None:
        # The pools belong to images of 988 pixels; here coarse and fine pictures of one view are to have one mask.
        self.protocol = replace(protocol, pool_scaling="relative")
        self._cache_bytes = cache_mib * 2**20
        self._views: OrderedDict[tuple[int, bytes], SceneView] = OrderedDict()

    def view(self, scene: ViewedScene, camera: Camera) -> SceneView:
        """Returns a view of a scene, the same one as long as it is in memory."""
        key = _key(scene, camera)
        if key not in self._views:
            device = scene.gaussians.means.device
            moved = camera._replace(
                camera_from_world=camera.camera_from_world.to(device), intrinsics=camera.intrinsics.to(device)
            )
            self._views[key] = SceneView(scene, moved)
        self._views.move_to_end(key)
        return self._views[key]

    def draw(self, state: ViewerState, scene: ViewedScene, camera: Camera) -> Picture:
        """Draws a picture; see :func:`draw`."""
        picture = draw(state, self.view(scene, camera), self.protocol)
        while len(self._views) > 1 and sum(view.num_bytes for view in self._views.values()) > self._cache_bytes:
            self._views.popitem(last=False)
        return picture

    def is_at_hand(self, state: ViewerState, scene: ViewedScene, camera: Camera) -> bool:
        """Returns whether a picture needs nothing that is not rendered already."""
        view = self._views.get(_key(scene, camera))
        needed = "language_map" if needs_language(state, scene) else "rendered"
        return view is not None and needed in vars(view)

    def forget(self, scene: ViewedScene) -> None:
        """Drops the views of a scene that is shown no more."""
        for key in [key for key, view in self._views.items() if view.scene is scene]:
            del self._views[key]


def needs_language(state: ViewerState, scene: ViewedScene) -> bool:
    """Returns whether a picture needs the weight map, which costs several times what colours do."""
    asked = {"features": True, "relevancy": state.prompt is not None, "classes": state.classes is not None}
    return scene.language is not None and asked.get(state.mode, False)


def _key(scene: ViewedScene, camera: Camera) -> tuple[int, bytes]:
    # A view in the cache holds its scene, so that no other scene can get the same id meanwhile.
    numbers = torch.cat([camera.camera_from_world.flatten(), camera.intrinsics.flatten()]).double().cpu().numpy()
    return id(scene), numbers.tobytes() + f"{camera.width}x{camera.height}".encode()


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, LanguageMap | RenderedPixels | PreparedView | tuple):
        return sum(_bytes(part) for part in value)
    return 0


def _pixels(picture: Float[Tensor, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
