"""Serves a scene to browsers: viser's server, the drawing thread and a session per browser."""

import logging
import socket
import threading
import time
import warnings
from typing import NamedTuple

import numpy as np
import viser
from lightning.pytorch.utilities import rank_zero_info

from callbacks.viewing.browser_cameras import (
    BrowserCamera,
    browser_camera,
    camera_of_browser,
    canvas_size,
    point_in_front,
    scene_up,
)
from callbacks.viewing.drawing_thread import DrawingThread
from callbacks.viewing.panels import Panel
from callbacks.viewing.renderer import Renderer, ViewedScene, needs_language
from callbacks.viewing.sessions import Look, Session, ViewerContent, typical_distance
from lightning_modules.functional.cameras import resize_camera

# A browser may go away at any moment; what is still sent to it is lost, and that is all.
warnings.filterwarnings("ignore", "Queued a .* on a closed connection")

DEFAULT_PORT = 8080
MAX_PIXELS = {"cpu": 272_160, "cuda": 1_200_000}  # 648 x 420, and about 1300 x 900
COARSE_SCALES = (1.0, 0.5, 0.25, 0.125)
COARSE_BUDGET_S = 0.1
"""A picture that would take longer is drawn coarse first, seconds."""
JPEG_QUALITY = 90


class Pace:
    """Remembers how long pictures take and says how coarse the first one of a view should be."""

    def __init__(self) -> None:
        self._seconds_per_pixel: dict[bool, float] = {}

    def scale(self, num_pixels: int, with_language: bool) -> float:
        """Returns the largest scale of both sides that is expected to be drawn in time; a quarter at the beginning."""
        cost = self._seconds_per_pixel.get(with_language)
        if cost is None:
            return 0.25
        fitting = [scale for scale in COARSE_SCALES if cost * num_pixels * scale**2 <= COARSE_BUDGET_S]
        return max(fitting, default=COARSE_SCALES[-1])

    def note(self, num_pixels: int, with_language: bool, seconds: float) -> None:
        """Notes how long a picture of a new view took."""
        self._seconds_per_pixel[with_language] = seconds / num_pixels


class Browser(NamedTuple):
    """One browser that is open."""

    client: viser.ClientHandle
    session: Session
    panel: Panel


class SceneServer:
    """Shows a scene in all browsers that come, each with settings of its own.

    Args:
        content: What is known beside the scene.
        scene: The scene; :meth:`show` replaces it.
        host: Address to serve at; others than 127.0.0.1 let anybody in reach in.
        port: Port to serve at. By default 8080 or the next one that is free; 0 takes any.
        max_pixels: Pixels of a fine picture at most; by default as many as the device draws smoothly.
        cache_mib: Memory for views that were drawn.

    Raises:
        ValueError: If ``port`` is in use, or the address cannot be served at, or a picture is to have no pixel.
    """

    def __init__(
        self,
        content: ViewerContent,
        scene: ViewedScene,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        max_pixels: int | None = None,
        cache_mib: int = 1024,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; allowed: 1 or more, or none for as many as draw smoothly.")
        check_address(host, port)
        device = scene.gaussians.means.device.type
        self.content, self.scene, self.note = content, scene, ""
        self.drawing_s = 0.0  # spent on drawing since the scene was replaced
        self.max_pixels = max_pixels or MAX_PIXELS.get(device, MAX_PIXELS["cpu"])
        self._renderer, self._pace = Renderer(content.protocol, cache_mib), Pace()
        self._browsers: dict[int, Browser] = {}
        self._drawing: DrawingThread[int] = DrawingThread(self._draw_for, self._drawing_failed)
        self._server = viser.ViserServer(host, DEFAULT_PORT if port is None else port, content.title, verbose=False)
        self.host, self.port = host, self._server.get_port()
        if port and self.port != port:  # taken by somebody since it was checked
            self.stop()
            raise ValueError(_in_use(host, port))
        if port is None and self.port != DEFAULT_PORT:
            rank_zero_info(f"Port {DEFAULT_PORT} is in use, so the viewer took {self.port}.")
        self._set_up_browsers()
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)

    @property
    def url(self) -> str:
        """Where the viewer is."""
        return f"http://{'localhost' if self.host == '0.0.0.0' else self.host}:{self.port}"  # noqa: S104

    @property
    def num_browsers(self) -> int:
        """Browsers that are open."""
        return len(self._browsers)

    def show(self, scene: ViewedScene, note: str = "") -> None:
        """Goes over to another state of the scene.

        Args:
            scene: What to show from now on; nobody may change its tensors any more.
            note: What is said about it, such as the step of training.
        """
        old, self.scene, self.note, self.drawing_s = self.scene, scene, note, 0.0
        for browser in list(self._browsers.values()):
            browser.session.show(scene)
        self._drawing.run(lambda: self._renderer.forget(old))

    def wait(self, seconds: float | None = None) -> None:
        """Serves until Ctrl+C, or for some seconds."""
        try:
            threading.Event().wait(seconds)
        except KeyboardInterrupt:
            rank_zero_info("The viewer is closed.")

    def stop(self) -> None:
        """Closes the port and ends all threads."""
        for browser in self._browsers.values():
            browser.session.is_gone = True
        self._drawing.stop()
        self._server.stop()

    def _set_up_browsers(self) -> None:
        server = self._server
        server.gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, control_width="large")
        server.gui.main_panel.dock_right()
        server.scene.world_axes.visible = False
        cameras = list(self.content.cameras.values())
        if not cameras:
            return
        first, up = cameras[0], scene_up(cameras)
        small = resize_camera(first, *canvas_size(first.width, first.height, 20_000))
        distance = self._drawing.run(lambda: typical_distance(self._renderer.view(self.scene, small))).result()
        start = browser_camera(first)
        server.scene.set_up_direction(tuple(up.tolist()))
        server.initial_camera.position = np.asarray(start.position)
        server.initial_camera.look_at = point_in_front(first, distance).double().numpy()
        server.initial_camera.up = up.numpy()
        server.initial_camera.fov = start.fov

    def _connect(self, client: viser.ClientHandle) -> None:
        def look() -> Look:
            camera = client.camera
            at = BrowserCamera(tuple(camera.wxyz), tuple(camera.position), camera.fov)
            return Look(at, camera.image_width, camera.image_height)

        session = Session(
            self.content,
            self.scene,
            self._renderer,
            self._drawing,
            look,
            self.max_pixels,
            lambda: self._drawing.mark(client.client_id),
        )
        self._browsers[client.client_id] = Browser(client, session, Panel(client, session))
        client.camera.on_update(lambda _: self._drawing.mark(client.client_id))
        self._drawing.mark(client.client_id)
        if session.whole is not self.scene:  # replaced while the controls were built
            session.show(self.scene)
        if client.client_id not in self._server.get_clients():  # gone already, and nobody will say so again
            self._disconnect(client)

    def _disconnect(self, client: viser.ClientHandle) -> None:
        browser = self._browsers.pop(client.client_id, None)
        if browser is not None:
            browser.session.is_gone = True
        self._drawing.forget(client.client_id)

    def _draw_for(self, key: int, is_final: bool) -> bool:
        """Draws for a browser in the drawing thread; returns whether a finer picture is left."""
        browser = self._browsers.get(key)
        if browser is None:
            return False
        began = time.perf_counter()
        client, session, panel = browser
        state, scene, look = session.state, session.scene, session.look()
        if look.width < 1 or look.height < 1:  # a window that is folded away
            return False
        width, height = canvas_size(look.width, look.height, self.max_pixels)
        camera = camera_of_browser(look.camera, width, height)
        is_new, scale = not self._renderer.is_at_hand(state, scene, camera), 1.0
        if is_new and not is_final:
            scale = self._pace.scale(width * height, needs_language(state, scene))
            width, height = canvas_size(look.width, look.height, self.max_pixels, scale)
            camera = camera_of_browser(look.camera, width, height)
        if is_final and needs_language(state, scene):
            view = self._renderer.view(scene, camera)
            if not view.splat_language(lambda: not self._drawing.is_awaited()):
                self.drawing_s += time.perf_counter() - began
                return True  # somebody waits; it goes on when all rest
        picture = self._renderer.draw(state, scene, camera)
        elapsed = time.perf_counter() - began
        self.drawing_s += elapsed
        if is_new:
            self._pace.note(width * height, needs_language(state, scene), elapsed)
        if session.is_gone:
            return False
        client.scene.set_background_image(picture.image, "jpeg", jpeg_quality=JPEG_QUALITY)
        client.flush()
        status = _status(picture.depth_range, width, height, elapsed, self.note)
        panel.show(picture, status if scale == 1 else None)
        return scale < 1

    def _drawing_failed(self, key: int, error: BaseException) -> None:
        """Tells what broke a drawing; the viewer goes on with the next one."""
        logging.getLogger(__name__).error("The viewer could not draw a picture.", exc_info=error)
        browser = self._browsers.get(key)
        if browser is not None:
            browser.panel.notify("The picture could not be drawn", f"{type(error).__name__}: {error}")


def check_address(host: str, port: int | None) -> None:
    """Tries to listen at an address, for viser would take another port without a word.

    Args:
        host: The address.
        port: The port; 0 stands for any, None for the default one or the next that is free.

    Raises:
        ValueError: If the port is in use, out of range or not allowed, or the address is none of this computer's.
    """
    is_firm, port = port is not None, DEFAULT_PORT if port is None else port
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; allowed: 1 to 65535, or 0 for any that is free.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just closed is free
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise ValueError(f"port {port} is not allowed for this user ({error}); take one from 1024 on.") from error
        except socket.gaierror as error:
            raise ValueError(f"host {host!r} is unknown ({error}); allowed: 127.0.0.1, or 0.0.0.0 for all.") from error
        except OSError as error:
            is_in_use = error.errno in (48, 98, 10048)  # EADDRINUSE on BSD, Linux, Windows
            if not is_in_use:
                raise ValueError(
                    f"host {host!r} is no address of this computer ({error}); allowed: 127.0.0.1, or 0.0.0.0 for all."
                ) from error
            if is_firm:
                raise ValueError(_in_use(host, port)) from error


def _in_use(host: str, port: int) -> str:
    return (
        f"port {port} on {host} is in use, perhaps by another viewer. Close that one, give another port, or leave the "
        "port out to take the next one that is free."
    )


def _status(depth_range: tuple[float, float] | None, width: int, height: int, elapsed: float, note: str) -> str:
    depth = "" if depth_range is None else " · depth {:.2f} to {:.2f}".format(*depth_range)
    return f"{width} × {height} in {elapsed:.2f} s{depth}{f' · {note}' if note else ''}"
