import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from datamodules.readers.feature_records import StoreHeader
from datamodules.readers.feature_store import write_feature_store
from datamodules.readers.scannet.class_tables import SCANNET200
from datamodules.readers.text_embeddings import TextEncoder
from datamodules.scannet import ScanNetDataModule
from datamodules.scannet_samples import WholeScenes, Window, collate
from lightning_modules.functional.projection import build_uv_index
from tests.datamodules.readers.scannet import tiny_scans

SCENES = ("scene0000_00", "scene0000_01", "scene0001_00", "scene0002_00")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny_scans.write_raw(tmp_path_factory.mktemp("scannet"), SCENES)
    for split, scenes in (("train", SCENES[:3]), ("val", SCENES[3:])):
        (folder / f"scannetv2_{split}.txt").write_text("\n".join(scenes) + "\n")
    return folder


def module(root, **settings) -> ScanNetDataModule:
    settings = {"views_per_sample": 2, "max_points": 400, "depth_size": (36, 48), "image_size": (32, 32)} | settings
    data = ScanNetDataModule(root, **settings)
    data.prepare_data()
    data.setup()
    return data


def test_a_batch_has_the_contracts_shapes(root):
    (frames, *_) = module(root).train_dataloader()
    assert frames.frame_ids.shape == (2, 2)
    assert frames.has_frame.all()
    assert frames.images.shape == (2, 2, 32, 32, 3)
    assert frames.images.dtype == torch.uint8
    assert frames.depth.shape == (2, 2, 36, 48)
    assert [points.shape for points in frames.points] == [(400, 6)] * 2
    assert set(frames.labels) == {"scannet20", "scannet200"}
    assert frames.tokens is None
    assert frames.clip_global is None


def test_labels_are_those_of_the_faces_the_points_lie_on(root):
    for frames in module(root, max_points=0).val_dataloader():
        points = frames.points[0][:, :3].numpy()
        distances = np.abs(np.concatenate([points, points - tiny_scans.ROOM], axis=1))[:, [0, 3, 1, 4, 2, 5]]
        face, is_clear = distances.argmin(axis=1), np.sort(distances, axis=1)[:, 1] > 0.1
        labels = frames.labels["scannet200"][0].numpy()
        known = is_clear & (frames.vertex_ids[0].numpy() >= 0)
        assert known.mean() > 0.4  # vertices are 10 cm apart, points up to 5 cm away take their label
        assert (labels[known] == tiny_scans.CLASSES_200[face[known]]).all()
        assert (labels[frames.vertex_ids[0].numpy() < 0] == -1).all()
        assert (frames.instances[0].numpy()[known] == face[known]).all()


def test_points_project_to_their_own_colour_and_depth(root):
    for frames in module(root, image_size=(72, 96), max_points=0, eval_views_per_sample=1).val_dataloader():
        index = build_uv_index(
            frames.points[0][:, :3],
            frames.intrinsics[0, 0],
            frames.camera_from_world[0, 0],
            frames.image_size,
            frames.depth[0, 0],
        )
        assert index.valid.float().mean() > 0.9  # the depth camera sees a little more than the colour camera
        columns, rows = index.uv[index.valid].long().unbind(1)
        colours = frames.images[0, 0][rows, columns] / 255
        assert (colours - frames.points[0][index.valid, 3:]).abs().max() < 1e-6


def test_cameras_are_squashed_with_their_images_each_axis_by_its_own_share(root):
    uvs = []
    for height, width in ((72, 96), (50, 30)):
        frames = next(iter(module(root, image_size=(height, width), max_points=0).val_dataloader()))
        uv = build_uv_index(
            frames.points[0][:, :3], frames.intrinsics[0, 1], frames.camera_from_world[0, 1], frames.image_size
        ).uv
        uvs.append(uv / torch.tensor([width, height]))
    torch.testing.assert_close(uvs[0], uvs[1])


def test_training_takes_consecutive_frames_from_a_random_one_on(root):
    data = module(root, samples_per_scene=8)
    drawn = {tuple(frames.frame_ids[0].tolist()) for frames in data.train_dataloader()}
    assert drawn == {(0, 20), (20, 60)}  # 40 is lost


def test_draws_differ_between_epochs_and_repeat_with_the_seed(root):
    def epochs(seed: int) -> list[torch.Tensor]:
        loader = module(root, seed=seed).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(torch.cat([frames.points[0] for frames in loader]))
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    samples = module(root).samples("train")
    assert not torch.equal(samples[0].points.points, samples[len(samples)].points.points)  # of the epoch after


def test_a_resumed_epoch_goes_on_with_the_same_batches(root):
    def loader():
        return module(root, samples_per_scene=3, batch_size=1).train_dataloader()

    whole = [frames.points[0] for frames in loader()]
    stopped, rest = loader(), loader()
    iterator = iter(stopped)
    for _ in range(4):
        next(iterator)
    rest.load_state_dict(stopped.state_dict())
    assert all(torch.equal(a.points[0], b) for a, b in zip(rest, whole[4:], strict=True))


def test_validation_streams_all_kept_frames_scene_by_scene(root):
    data = module(root, val_scenes=list(SCENES))
    seen = [(frames.scenes[0], *frames.frame_ids[0].tolist()) for frames in data.val_dataloader()]
    assert seen == [row for scene in SCENES for row in ((scene, 0, 20), (scene, 60))]


def test_predict_gives_single_frames_of_the_named_scenes(root, tmp_path):
    (tmp_path / "scenes.txt").write_text(f"{SCENES[2]}\nscene9999_00\n{SCENES[0]}\n")
    with pytest.warns(UserWarning, match="scene9999_00"):
        data = module(root, scenes_file=tmp_path / "scenes.txt", frames_per_scene=2)
    seen = [
        (scene, *ids.tolist())
        for frames in data.predict_dataloader()
        for scene, ids in zip(frames.scenes, frames.frame_ids, strict=True)
    ]
    assert seen == [(SCENES[2], 0), (SCENES[2], 60), (SCENES[0], 0), (SCENES[0], 60)]


def test_class_names_are_in_the_order_of_the_indices(root):
    data = module(root)
    assert data.class_names("scannet200") == SCANNET200.names
    groups = data.class_groups("scannet200")
    assert sorted(index for indices in groups.values() for index in indices) == list(range(200))
    assert [data.class_names("scannet20")[i] for i in range(20) if i not in data.foreground_ids("scannet20")] == [
        "wall",
        "floor",
        "otherfurniture",
    ]


@pytest.mark.parametrize("layout", ["esam_mv", "esam_sv"])
def test_stored_points_are_taken_where_a_layout_keeps_them(tmp_path, layout):
    scene = "scene0000_00"
    tiny_scans.write_esam(tmp_path, single_view=layout == "esam_sv")
    kept = tmp_path / "points" / (f"{scene}_20.bin" if layout == "esam_sv" else f"{scene}/20.bin")
    kept.unlink()
    data = module(tmp_path, val_scenes=[scene], max_points=0, label_distance_m=0.2)
    assert data.source.layout == layout
    assert data.kept_frames(scene) == (0, 60)
    (frames,) = data.val_dataloader()
    truth = np.concatenate([tiny_scans.lifted(frame)[0] for frame in (0, 60)])
    faces = np.concatenate([tiny_scans.lifted(frame)[1] for frame in (0, 60)])
    np.testing.assert_allclose(frames.points[0][:, :3], truth[:, :3], atol=1e-5)
    assert (frames.labels["scannet200"][0].numpy() == tiny_scans.CLASSES_200[faces]).all()
    assert (frames.instances[0].numpy() == faces).all()
    per_frame = [len(np.unique(tiny_scans.lifted(frame)[1])) for frame in (0, 60)]
    assert frames.superpoints[0].unique().tolist() == list(range(sum(per_frame)))  # frames do not share them
    assert (frames.vertex_ids[0] >= 0).all()
    lifted = next(iter(module(tmp_path, val_scenes=[scene], points="depth", max_points=0).val_dataloader()))
    assert lifted.frame_ids.tolist() == [[0, 20]]  # depth is there for all


def test_mesh_points_are_the_vertices_the_frames_see(root):
    for frames in module(root, points="mesh", max_points=0).val_dataloader():
        ids = frames.vertex_ids[0]
        points, faces = tiny_scans.mesh_vertices()
        np.testing.assert_allclose(frames.points[0][:, :3], points[ids], atol=1e-6)
        assert (frames.labels["scannet20"][0].numpy() == tiny_scans.CLASSES_20[faces[ids]]).all()
        assert 100 < len(ids) < len(points) / 2


def test_scenes_without_a_mesh_are_refused_where_its_vertices_are_asked_for(tmp_path):
    folder = tiny_scans.write_raw(tmp_path, SCENES[:2])
    (folder / SCENES[0] / f"{SCENES[0]}_vh_clean_2.ply").unlink()
    with pytest.warns(UserWarning, match=f"1 scenes of 2 cannot be used: {SCENES[0]}"):
        module(folder, points="mesh")
    (folder / SCENES[1] / f"{SCENES[1]}_vh_clean_2.ply").unlink()
    with pytest.raises(ValueError, match=r"it has no mesh, .* data\.init_args\.points=depth"):
        module(folder, points="mesh")


def test_pointcepts_arrays_take_the_frames_of_raw_scans(root, tmp_path):
    scene = SCENES[0]
    tiny_scans.write_pointcept(tmp_path, with_frames=False)
    data = module(tmp_path, frames_root=root, val_scenes=[scene])
    assert data.source.layout == "pointcept"
    frames = next(iter(data.val_dataloader()))
    raw = next(iter(module(root, val_scenes=[scene]).val_dataloader()))
    assert torch.equal(frames.points[0], raw.points[0])
    assert torch.equal(frames.labels["scannet200"][0], raw.labels["scannet200"][0])


def test_without_a_mesh_points_are_known_by_their_voxel(tmp_path):
    tiny_scans.write_frames(tmp_path / SCENES[0], lost=False)
    tiny_scans.write_intrinsics(tmp_path / SCENES[0])
    data = module(tmp_path, val_scenes=[SCENES[0]], max_points=0, eval_views_per_sample=1)
    batches = list(data.val_dataloader())
    assert batches[0].labels == {}
    assert batches[0].instances is None
    for points, ids in ((b.points[0][:, :3], b.vertex_ids[0]) for b in batches):
        cells = (points.double() / 0.05).floor()
        assert len(ids.unique()) == len(cells.unique(dim=0))
    shared = np.intersect1d(batches[0].vertex_ids[0], batches[1].vertex_ids[0])
    assert len(shared) > 100


def test_scenes_with_fewer_frames_are_padded(root):
    data = module(root, views_per_sample=3, train_scenes=list(SCENES), val_scenes=list(SCENES))
    dataset = data._dataset([Window(SCENES[0], (0, 20, 60)), Window(SCENES[1], (20,))])
    frames = collate(list(dataset), data.class_tables)
    assert frames.has_frame.tolist() == [[True] * 3, [True, False, False]]
    assert frames.frame_ids.tolist() == [[0, 20, 60], [20, -1, -1]]
    assert torch.equal(frames.camera_from_world[1, 2], torch.eye(4))
    assert (frames.depth[1, 1:] == 0).all()
    assert (frames.images[1, 1:] == 0).all()


def write_store(path, keys, image_size=(32, 32)):
    header = StoreHeader("tiny", "", "vanilla", image_size, (8, 2, 2), 4)
    draw = torch.Generator().manual_seed(0)
    projection, records = torch.randn(8, 4, generator=draw), {}
    with write_feature_store(path, header, projection) as writer:
        for scene, frame in keys:
            records[scene, frame] = (torch.randn(8, 2, 2, generator=draw), torch.randn(4, generator=draw))
            writer.write(scene, frame, *records[scene, frame])
    return projection, records


def test_offline_tokens_come_from_the_store(root, tmp_path):
    projection, records = write_store(tmp_path / "store", [(scene, f) for scene in SCENES for f in (0, 20)])
    settings = {"offline_clip_feat": True, "feature_store": tmp_path / "store"}
    with pytest.warns(UserWarning, match="no tokens of 4 frames"):
        data = module(root, **settings)
    assert torch.equal(data.projection, projection)
    online = module(root)
    assert online.projection is None
    for frames, same in zip(data.val_dataloader(), online.val_dataloader(), strict=False):
        assert frames.images is None
        assert frames.frame_ids.tolist() == [[0, 20]]
        for view, frame_id in enumerate((0, 20)):
            tokens, clip_global = records[frames.scenes[0], frame_id]
            assert torch.equal(frames.tokens[0, view], tokens.half())
            assert torch.equal(frames.clip_global[0, view], clip_global.half())
        assert torch.equal(frames.points[0], same.points[0])  # the same points as with photos


def test_a_store_of_another_image_size_or_of_other_scenes_is_refused(root, tmp_path):
    write_store(tmp_path / "small", [(SCENES[0], 0)], image_size=(16, 16))
    with pytest.raises(ValueError, match="image_size is"):
        module(root, offline_clip_feat=True, feature_store=tmp_path / "small")
    write_store(tmp_path / "other", [("scene0077_00", 0)])
    with pytest.raises(ValueError, match="no tokens of the 12 frames"):
        module(root, offline_clip_feat=True, feature_store=tmp_path / "other")


def test_class_names_are_encoded_once(root):
    asked = []

    class Counting(TextEncoder):
        def encode(self, phrases):
            asked.extend(phrases)
            return torch.eye(4)[: len(phrases)]

    data = module(root, text=Counting())
    data.encode_text(["a wall in a scene", "a floor in a scene"])
    assert torch.equal(data.encode_text(["a floor in a scene"]), torch.eye(4)[1:2])
    assert asked == ["a wall in a scene", "a floor in a scene"]
    with pytest.raises(ValueError, match=r"text_embeddings\.npz does not exist"):
        module(root).encode_text(["a wall in a scene"])


def test_a_damaged_frame_is_left_out_before_training(tmp_path):
    folder = tiny_scans.write_raw(tmp_path, ("scene0000_00", "scene0001_00"))
    photo = folder / "scene0000_00" / "color" / "20.png"
    photo.write_bytes(photo.read_bytes()[:200])
    data = module(folder)
    assert data.kept_frames("scene0000_00") == (0, 60)
    assert data.reports["scene0000_00"].damaged == (20,)


def test_a_data_set_of_which_nothing_can_be_used_is_refused(tmp_path):
    folder = tiny_scans.write_raw(tmp_path)
    for file in (folder / "scene0000_00" / "pose").iterdir():
        file.write_text(tiny_scans.text(np.full((4, 4), -np.inf)))
    with pytest.raises(ValueError, match=r"None of the 1 scenes .* 4 with bad poses"):
        module(folder)


def test_a_split_without_scenes_is_refused(root):
    data = module(root, train_scenes=["scene0500_00"])
    with pytest.raises(ValueError, match=r"no scene to use for train: stated are scene0500_00.*train_scenes"):
        data.train_dataloader()


def test_scenes_that_are_trained_on_and_judged_by_are_told(root):
    with pytest.warns(UserWarning, match=f"1 scenes are trained on and judged by: {SCENES[1]}"):
        module(root, val_scenes=[SCENES[1]], test_scenes=[SCENES[3]]).scenes("train")


def test_rooms_are_not_split_where_no_list_says_how(tmp_path):
    data = module(tiny_scans.write_raw(tmp_path, SCENES))
    assert data.scenes("train") == SCENES[:3]
    assert data.scenes("val") == data.scenes("test") == SCENES[3:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "nuscenes"}, "layout is 'nuscenes'"),
        ({"intrinsics": "mean"}, "allowed: per_scene, fixed"),
        ({"points": "voxels"}, "allowed: auto, depth, stored, mesh"),
        ({"class_tables": ("scannet40",)}, "allowed: some of scannet20, scannet200"),
        ({"views_per_sample": 0}, "views_per_sample is 0"),
        ({"max_points": 1}, "max_points is 1"),
        ({"offline_clip_feat": True}, "feature_store"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"frames_root": "elsewhere"}, "has its own frames"),
    ],
)
def test_settings_that_cannot_be_are_refused(root, settings, message):
    with pytest.raises(ValueError, match=message):
        module(root, **settings)


def test_processes_share_whole_scenes(root):
    samples = module(root, val_scenes=list(SCENES)).samples("val")
    seen = [
        [samples.windows[position].scene for position in WholeScenes(samples, num_replicas=2, rank=rank)]
        for rank in range(2)
    ]
    assert seen == [[SCENES[0]] * 2 + [SCENES[2]] * 2, [SCENES[1]] * 2 + [SCENES[3]] * 2]


def test_samples_sent_to_another_process_are_the_same(root):
    samples = module(root).samples("train")
    here = [samples[position] for position in range(len(samples))]
    sent = pickle.loads(pickle.dumps(samples))
    for position, sample in enumerate(here):
        assert torch.equal(sent[position].points.points, sample.points.points)
        assert torch.equal(sent[position].images, sample.images)


def test_a_full_memory_changes_nothing_but_the_reading(root):
    kept, read = module(root).samples("val"), module(root, cache_mib=0).samples("val")
    for _ in range(2):
        for a, b in zip(kept, read, strict=True):
            assert torch.equal(a.points.points, b.points.points)
            assert torch.equal(a.depth, b.depth)
    assert len(kept._views) == 3
    assert not read._views


class Recorder(LightningModule):
    """Keeps what it was trained on, and saves a checkpoint after some step."""

    def __init__(self, save_to=None, after: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.save_to, self.after = [], save_to, after

    def training_step(self, frames, batch_idx):
        self.seen.append(torch.cat(frames.points))
        return self.weight * frames.points[0].mean()

    def on_train_batch_end(self, *_):
        if self.save_to is not None and self.global_step == self.after:
            self.trainer.save_checkpoint(self.save_to)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_resumed_in_mid_epoch_sees_the_same_batches(root, tmp_path):
    def fit(recorder, checkpoint=None):
        data = ScanNetDataModule(root, views_per_sample=2, max_points=50, batch_size=1, samples_per_scene=2)
        Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
        ).fit(recorder, data, ckpt_path=checkpoint)  # fmt: skip
        return recorder.seen

    whole = fit(Recorder(tmp_path / "mid.ckpt", after=8))  # of 6 steps in an epoch
    rest = fit(Recorder(), tmp_path / "mid.ckpt")
    assert len(whole) == 12
    assert len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[8:], strict=True))
