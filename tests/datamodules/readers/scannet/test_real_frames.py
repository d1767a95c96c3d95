"""Real posed RGB-D frames, laid out like a raw scan: the convention of poses and pixels shows in how views agree."""

import json

import numpy as np
import pytest
import torch

from datamodules.readers.scannet.layouts import open_scannet
from lightning_modules.functional.cameras import back_project
from lightning_modules.functional.projection import build_uv_index


@pytest.fixture
def source(shared_data, tmp_path):
    real, folder = shared_data / "rgbd", tmp_path / "scene0000_00"
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    lines = [line.split() for line in (real / "trajectory.log").read_text().splitlines() if line.strip()]
    for start in range(0, len(lines), 5):
        number = int(lines[start][0])
        for name, suffix in (("color", ".jpg"), ("depth", ".png")):
            (stored,) = (real / name).glob(f"*{number:05d}{suffix}")
            (folder / name / f"{number}{suffix}").symlink_to(stored)
        rows = lines[start + 1 : start + 5]
        (folder / "pose" / f"{number}.txt").write_text("\n".join(map(" ".join, rows)))
    camera = json.loads((real / "camera_primesense.json").read_text())
    matrix = np.array(camera["intrinsic_matrix"]).reshape(3, 3).T
    for name in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", matrix)
    return open_scannet(tmp_path, frame_stride=1)


def agreement(first, second, camera_from_world) -> float:
    points, valid = back_project(first.depth, first.depth_camera)
    size = (second.camera.height, second.camera.width)
    index = build_uv_index(points[valid], second.camera.intrinsics, camera_from_world, size, second.depth)
    in_image = build_uv_index(points[valid], second.camera.intrinsics, camera_from_world, size).valid
    columns, rows = index.uv[in_image].long().unbind(1)
    return float(index.valid[in_image][second.depth[rows, columns] > 0].float().mean())


def test_real_frames_agree_with_the_right_pose_and_not_with_the_inverted_one(source):
    (scene,) = source.scenes()
    first, *_, last = (source.load(scene, frame) for frame in source.frames(scene))
    assert agreement(first, last, last.camera.camera_from_world) >= 0.95
    inverted = first._replace(depth_camera=inverse(first.depth_camera))
    assert agreement(inverted, last, inverse(last.camera).camera_from_world) <= 0.6


def inverse(camera):
    return camera._replace(camera_from_world=torch.linalg.inv(camera.camera_from_world))
