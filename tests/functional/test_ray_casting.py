import torch

from lightning_modules.functional.ray_casting import cast_rays, cast_rays_reference


def soup(num_faces: int, num_rays: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    vertices = torch.rand(3 * num_faces, 3, generator=draw)
    faces = torch.arange(3 * num_faces).reshape(-1, 3)
    origins = 3 * torch.rand(num_rays, 3, generator=draw) - 1
    return vertices, faces, origins, torch.randn(num_rays, 3, generator=draw)


def test_rays_meet_what_trying_all_triangles_finds():
    vertices, faces, origins, directions = soup(100, 700)
    found, expected = (cast(vertices, faces, origins, directions) for cast in (cast_rays, cast_rays_reference))
    assert torch.equal(found.face_ids, expected.face_ids)
    assert 0.05 < (found.face_ids >= 0).float().mean() < 0.95
    torch.testing.assert_close(found.distances, expected.distances, atol=1e-5, rtol=1e-4)


def test_distances_count_in_lengths_of_the_direction():
    square = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    directions = torch.tensor([[0.0, 0, 1], [0, 0, 4], [0.4, 0.2, 1], [0, 0, -1], [3, 0, 1]])
    hits = cast_rays(square, faces, torch.zeros(5, 3), directions)
    torch.testing.assert_close(hits.distances, torch.tensor([2, 0.5, 2, torch.inf, torch.inf]))
    assert hits.face_ids.tolist()[2:] == [0, -1, -1]


def test_a_triangle_is_met_from_behind():
    triangle = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [0, 1, 0]])
    origins, directions = torch.tensor([[0.0, 0, 3], [0, 0, -3]]), torch.tensor([[0.0, 0, -1], [0, 0, 1]])
    hits = cast_rays(triangle, torch.tensor([[0, 1, 2]]), origins, directions)
    torch.testing.assert_close(hits.distances, torch.tensor([3.0, 3]))
