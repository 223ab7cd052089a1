"""The shared operations equal slow ones: scipy's zoom and interpolation, and loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.ndimage import zoom as scipy_zoom

from advml.core.device import generator_for
from advml.data.corruptions.corruptions import _disc, _inverse_affine, _sources, defocus_blur, zoom_blur
from advml.data.corruptions.noise_fields import bilinear, plasma, smear, zoom


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def spot(side: int) -> np.ndarray:
    field = np.zeros((side, side), dtype=np.float32)
    field[side // 2, side // 2] = 1
    return field


@pytest.mark.parametrize("side", [32, 33, 64, 100])
@pytest.mark.parametrize("factor", [1, 1.01, 1.03, 1.06, 1.11, 1.25, 1.75, 2.25, 4.5])
def test_zoom_is_a_rounded_crop_enlarged_by_scipy_and_trimmed(side, factor):
    image = noise(side, side)
    crop = int(np.ceil(side / factor))
    top = (side - crop) // 2
    large = scipy_zoom(image[top : top + crop, top : top + crop], factor, order=1)
    trim = (len(large) - side) // 2
    assert np.allclose(zoom(image, factor), large[trim : trim + side, trim : trim + side], atol=1e-5)


def test_a_small_zoom_of_a_small_image_is_centred_and_not_rounded_away():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (8, 8))
    assert np.allclose(zoom(ramp, 1.1)[0], (np.arange(8) - 3.5) / 1.1 + 3.5, atol=1e-6)


def test_zoom_blur_is_a_mean_so_a_flat_image_stays_flat():
    assert np.allclose(zoom_blur(np.full((1, 1, 32, 32), 0.3, np.float32), [], 0.25, 0.01), 0.3, atol=1e-6)


def test_bilinear_looks_up_as_scipy_does():
    images, points = noise(2, 3, 7, 9), 3 * (noise(2, 2, 7, 9) - 0.5) * np.array([7, 9]).reshape(1, 2, 1, 1)
    ours = bilinear(images, points[:, 0] + 3, points[:, 1] + 4)
    for image, result, (rows, columns) in zip(images, ours, points, strict=True):
        for plane, looked in zip(image, result, strict=True):
            assert np.allclose(looked, map_coordinates(plane, [rows + 3, columns + 4], order=1, mode="mirror"), atol=1e-5)


@pytest.mark.parametrize(("angle", "line"), [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0)), (45, (-1, -1)), (-45, (1, -1))])
def test_smearing_a_spot_leaves_half_a_normal_curve_on_one_side(angle, line):
    (trail,) = smear(spot(33)[None], np.array([angle]), radius=4, sigma=2)
    weights = np.exp(-(np.arange(9) ** 2) / 8)
    weights /= weights.sum()
    reach = 7 if abs(angle) == 45 else 9
    shown = [trail[16 + step * line[0], 16 + step * line[1]] for step in range(reach)]
    if abs(angle) == 45:  # eight pixels along a diagonal are six steps, so several weights fall on one pixel
        assert trail[16, 16] >= weights[0] - 1e-4
    else:
        assert np.allclose(shown, weights, atol=1e-3)
    assert sum(shown) == pytest.approx(1, abs=1e-5) == trail.sum()


def test_smearing_repeats_the_border():
    assert np.allclose(smear(np.full((3, 8, 8), 0.7, np.float32), np.array([-100, 10, 75]), radius=14, sigma=12), 0.7, atol=1e-6)


@pytest.mark.parametrize(("radius", "pixels"), [(0.5, 1), (1, 5), (1.5, 9), (3, 29), (10, 317)])
def test_the_disc_of_defocus_blur_holds_the_pixels_within_its_radius(radius, pixels):
    disc = _disc(radius, 0.05)  # as good as sharp
    assert (disc > 1e-3).sum() == pixels
    assert disc.sum() == pytest.approx(1, abs=1e-6)
    assert np.allclose(disc, disc.T) and np.allclose(disc, disc[::-1])


def test_defocus_blur_is_a_convolution_with_mirrored_borders():
    images = noise(2, 3, 12, 10)
    disc = _disc(1.5, 0.1)
    reach = len(disc) // 2
    padded = np.pad(images, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, disc.shape, axis=(2, 3))
    assert np.allclose(defocus_blur(images, [], 1.5, 0.1), np.einsum("nchwij,ij->nchw", windows, disc), atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_copies_one_pixel_after_another_from_the_last_to_the_first(reach):
    height, width = 14, 17
    offsets = np.random.default_rng(reach).integers(-reach, reach, (3, 2, height, width))
    for sources, (down, right) in zip(_sources(offsets, reach), offsets, strict=True):
        shown = np.arange(height * width).reshape(height, width)
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                shown[row, column] = shown[row + down[row, column], column + right[row, column]]
        assert np.array_equal(sources, shown.ravel())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (33, 70), (4, 5)])
def test_plasma_spans_0_to_1_on_its_square(height, width):
    field = plasma([generator_for(number) for number in range(3)], height=height, width=width, decay=2)
    assert field.shape == (3, height, width)
    assert field.min() >= 0 and field.max() <= 1
    if height == width and height & (height - 1) == 0:
        assert (field.min((1, 2)) == 0).all() and (field.max((1, 2)) == 1).all()


def test_a_small_decay_makes_rough_clouds():
    rough, smooth = (plasma([generator_for(number) for number in range(30)], height=32, width=32, decay=decay) for decay in (1.5, 3))
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()


def test_plasma_is_a_mean_of_neighbours_once_the_noise_has_died_down():
    field = plasma([generator_for(0)], height=16, width=16, decay=1e4)[0]
    around = [np.roll(field, (down, right), (0, 1)) for down in (-1, 1) for right in (-1, 1)]
    assert np.allclose(field[1::2, 1::2], np.mean(around, 0)[1::2, 1::2], atol=1e-4)
    beside = [np.roll(field, 1, axis) for axis in (0, 1)] + [np.roll(field, -1, axis) for axis in (0, 1)]
    assert np.allclose(field[::2, 1::2], np.mean(beside, 0)[::2, 1::2], atol=1e-4)
    assert np.allclose(field[1::2, ::2], np.mean(beside, 0)[1::2, ::2], atol=1e-4)


@pytest.mark.parametrize("decay", [1.5, 3.0])
def test_the_noise_of_plasma_falls_by_the_square_of_its_decay_per_level(decay):
    field = plasma([generator_for(number) for number in range(40)], height=32, width=32, decay=decay)

    def detail(step: int) -> float:
        """Of the middles of squares of this side: what their corners do not explain."""
        corners = field[:, ::step, ::step]
        mean = sum(np.roll(corners, (-down, -right), (1, 2)) for down in (0, 1) for right in (0, 1)) / 4
        scale = np.sqrt(field.var((1, 2)).mean())
        return float((field[:, step // 2 :: step, step // 2 :: step] - mean).std() / scale)

    assert detail(4) / detail(2) == pytest.approx(decay**2, rel=0.1)


@pytest.mark.parametrize("tilt", [0.0, 2.5])
def test_the_affine_map_moves_its_three_points_by_at_most_the_tilt(tilt):
    generators = [generator_for(number) for number in range(200)]
    inverse = _inverse_affine(generators, np.array([32, 40]), tilt)
    points = np.array([[26, 30], [26, 10], [6, 10]])  # a third of the shorter side away from the middle
    forward = np.linalg.inv(np.concatenate([inverse, np.broadcast_to([[0.0], [0.0], [1.0]], (200, 3, 1))], 2))
    moves = (np.concatenate([points, np.ones((3, 1))], 1) @ forward)[..., :2] - points
    assert np.abs(moves).max() == pytest.approx(tilt, rel=0.02, abs=1e-9)
    assert np.abs(moves).mean() == pytest.approx(tilt / 2, rel=0.1, abs=1e-9)
