"""Views against their oracles: torchvision image by image, scipy's interpolation, and the statistics of the draws."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as F
from scipy.ndimage import map_coordinates
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import InterpolationMode

from advml.config import View
from advml.data.augment import draw, resample, turn_hue, view

SIMCLR = View(resized_crop=(0.2, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2)
SUPERVISED = View(pad=4, flip=0.5)
DIGITS = View(rotation=20, scale=(0.8, 1.2), shift=0.15, brightness=0.4)
EVERYTHING = View(**(SIMCLR.model_dump() | DIGITS.model_dump(exclude_defaults=True) | {"pad": 2}))
SPECS = {"simclr": SIMCLR, "supervised": SUPERVISED, "digits": DIGITS, "everything": EVERYTHING}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 16, channels: int = 3, height: int = 20, width: int = 28) -> torch.Tensor:
    """Noise, with black, white and grey pixels among it, where hue has no answer."""
    images = torch.rand(count, channels, height, width, generator=seeded(1))
    images[:, :, 0], images[:, :, 1], images[:, :, 2] = 0, 1, 0.5
    return images


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# Geometry


@pytest.mark.parametrize(
    "parts", [{"rotation": 40}, {"scale": (0.6, 1.5)}, {"shift": 0.3}, {"rotation": 40, "scale": (0.6, 1.5), "shift": 0.3}]
)
def test_rotation_scale_and_shift_equal_torchvision_affine_per_image(parts):
    spec, images = View(**parts), pictures()
    draws = draw(spec, images.shape, generator=seeded())
    sides = torch.tensor([[28], [20]])
    expected = [
        F.affine(image, float(angle), (shift * sides[:, 0]).tolist(), float(scale), [0.0, 0.0], InterpolationMode.BILINEAR)
        for image, angle, shift, scale in zip(images, draws.rotation, draws.shift.T, draws.scale, strict=True)
    ]
    assert_close(view(images, spec, generator=seeded()), torch.stack(expected), atol=2e-5)


def test_all_geometry_together_equals_a_pixel_by_pixel_transcription():
    """Forward in pixels: crop to full size, rotate and zoom about the centre, shift, flip; each undone in turn."""
    spec = View(rotation=30, scale=(0.7, 1.4), shift=0.2, pad=3, resized_crop=(0.3, 0.9), flip=0.5)
    images = pictures(count=12)
    height, width = images.shape[-2:]
    draws = draw(spec, images.shape, generator=seeded())
    result = view(images, spec, generator=seeded())
    for n in range(len(images)):
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        if draws.flip[n]:
            x = width - x
        x, y = x - float(draws.shift[0, n]) * width - width / 2, y - float(draws.shift[1, n]) * height - height / 2
        angle, scale = math.radians(draws.rotation[n]), float(draws.scale[n])
        x, y = (math.cos(angle) * x + math.sin(angle) * y) / scale, (-math.sin(angle) * x + math.cos(angle) * y) / scale
        x, y = x * float(draws.crop_size[0, n]), y * float(draws.crop_size[1, n])
        x = x + (1 + float(draws.crop_centre[0, n])) * width / 2 + float(draws.offset[0, n])
        y = y + (1 + float(draws.crop_centre[1, n])) * height / 2 + float(draws.offset[1, n])
        for channel, found in zip(images[n], result[n], strict=True):
            expected = map_coordinates(channel.double().numpy(), [y - 0.5, x - 0.5], order=1, mode="grid-constant")
            assert_close(found.double(), torch.from_numpy(expected), atol=2e-5)


@pytest.mark.parametrize("size", [(20, 28), (32, 32), (7, 224)])
@pytest.mark.parametrize("spec", [SUPERVISED, View(pad=3), View(flip=0.5)])
def test_pad_crop_and_flip_move_pixels_exactly_as_torchvision_does(spec, size):
    images = pictures(32, 3, *size)
    draws = draw(spec, images.shape, generator=seeded())
    expected = []
    for n, image in enumerate(images):
        left, top = (int(offset) + spec.pad for offset in draws.offset[:, n])
        image = F.crop(F.pad(image, [spec.pad] * 4), top, left, *size)
        expected.append(F.horizontal_flip(image) if draws.flip[n] else image)
    assert torch.equal(view(images, spec, generator=seeded()), torch.stack(expected))


def test_pad_and_crop_reach_every_place_of_torchvisions_random_crop():
    marker = torch.zeros(1, 1, 5, 5)
    marker[..., 2, 2] = 1
    ours = view(marker.expand(2000, 1, 5, 5), View(pad=2), generator=seeded())
    counts = ours.sum(0).flatten()  # one of 25 places each
    assert counts.sum() == 2000
    assert counts.min() > 40 and counts.max() < 125  # 80 expected, +- 5 standard deviations


@pytest.mark.parametrize("box", [(3, 5, 12, 14), (0, 0, 16, 12), (8, 16, 12, 12), (0, 0, 20, 28)])
def test_a_resized_crop_equals_torchvisions_inside_the_rim_and_at_the_edge_of_the_image(box):
    top, left, height, width = box
    images = pictures(1)
    spec = View(resized_crop=(0.1, 1))
    draws = replace(
        draw(spec, images.shape, generator=seeded()),
        crop_size=torch.tensor([[width / 28], [height / 20]]),
        crop_centre=torch.tensor([[(2 * left + width) / 28 - 1], [(2 * top + height) / 20 - 1]]),
    )
    expected = F.resized_crop(images, top, left, height, width, [20, 28], antialias=True)
    rows, columns = ((torch.arange(full) + 0.5) * part / full for full, part in ((20, height), (28, width)))
    # Half a pixel around the box torchvision repeats the rim; at the edge of the image we do, too.
    rows = ((rows > 0.5) | (top == 0)) & ((rows < height - 0.5) | (top + height == 20))
    columns = ((columns > 0.5) | (left == 0)) & ((columns < width - 0.5) | (left + width == 28))
    same = rows[:, None] & columns
    assert same.float().mean() > 0.6
    assert_close(resample(images, spec, draws)[..., same], expected[..., same], atol=2e-5)


def test_a_white_image_stays_white_under_a_resized_crop():
    white = torch.ones(64, 3, 12, 12)
    assert_close(view(white, View(resized_crop=(0.2, 1), flip=0.5), generator=seeded()), white, atol=1e-6)


def test_boxes_of_resized_crops_are_drawn_as_torchvision_draws_them():
    area, size = (0.2, 1.0), (300, 300)  # large, so that torchvision's rounding to pixels is small
    torch.manual_seed(0)
    theirs = [transforms.RandomResizedCrop(8, scale=area).make_params([torch.empty(3, *size)]) for _ in range(1500)]
    draws = draw(View(resized_crop=area), torch.Size((3000, 3, *size)), generator=seeded())
    width, height = draws.crop_size
    left, top = (draws.crop_centre - draws.crop_size + 1) / 2
    ours = {"width": width, "height": height, "left": left, "top": top}
    for name, values in ours.items():
        assert ks_2samp(values.numpy(), [box[name] / 300 for box in theirs]).pvalue > 0.01, name


def test_crops_keep_area_aspect_and_place_within_their_limits():
    draws = draw(View(resized_crop=(0.2, 0.8)), torch.Size((4096, 3, 20, 28)), generator=seeded())
    share, aspect = draws.crop_size.prod(0), draws.crop_size[0] * 28 / (draws.crop_size[1] * 20)
    assert 0.2 - 1e-6 <= share.min() < 0.21 and share.max() <= 0.8 + 1e-6
    assert 3 / 4 - 1e-6 <= aspect.min() < 0.76 and 1.32 < aspect.max() <= 4 / 3 + 1e-6
    assert ((draws.crop_centre.abs() + draws.crop_size) <= 1 + 1e-6).all()


def test_a_crop_that_never_fits_shows_the_whole_image():
    images = pictures()
    assert_close(view(images, View(resized_crop=(1, 1)), generator=seeded()), images, atol=2e-5)


# Colour


def oracle_colour(image: torch.Tensor, spec: View, draws, n: int) -> torch.Tensor:
    if draws.jitter[n]:
        brightness, contrast, saturation, hue = draws.factors[:, n].tolist()
        image = F.adjust_brightness(image, brightness)
        image = F.adjust_contrast(image, contrast)
        image = F.adjust_saturation(image, saturation)
        image = F.adjust_hue(image, hue)
    return F.rgb_to_grayscale(image, num_output_channels=len(image)) if draws.grey[n] and len(image) == 3 else image


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_equals_torchvisions_functions_with_each_images_own_factors(channels):
    spec = View(brightness=0.8, contrast=0.9, saturation=1.0, hue=0.5, jitter=0.7, grey=0.3)
    images = pictures(40, channels)
    draws = draw(spec, images.shape, generator=seeded())
    assert 0 < draws.jitter.sum() < 40 and 0 < draws.grey.sum() < 40
    expected = torch.stack([oracle_colour(image, spec, draws, n) for n, image in enumerate(images)])
    assert_close(view(images, spec, generator=seeded()), expected, atol=2e-3)  # torchvision weighs red .2989, kornia .299


@pytest.mark.parametrize(
    ("part", "index", "function", "atol"),
    [
        ("brightness", 0, F.adjust_brightness, 1e-6),
        ("contrast", 1, F.adjust_contrast, 2e-4),
        ("saturation", 2, F.adjust_saturation, 2e-4),
        ("hue", 3, F.adjust_hue, 1e-5),
    ],
)
def test_each_colour_part_alone_equals_its_torchvision_function(part, index, function, atol):
    spec, images = View(**{part: 0.5}), pictures()
    factors = draw(spec, images.shape, generator=seeded()).factors[index].tolist()
    assert len(set(factors)) == len(images)
    expected = torch.stack([function(image, factor) for image, factor in zip(images, factors, strict=True)])
    assert_close(view(images, spec, generator=seeded()), expected, atol=atol)


def test_a_whole_turn_of_hue_and_none_give_the_colours_back():
    images = pictures()
    for turns in (-1.0, 0.0, 1.0):
        assert_close(turn_hue(images, torch.full((16,), turns)), images, atol=2e-6)


def test_a_third_of_a_turn_carries_red_to_green_to_blue():
    red, green, blue = torch.eye(3).view(3, 3, 1, 1)
    assert_close(turn_hue(torch.stack([red, green, blue]), torch.full((3,), 1 / 3)), torch.stack([green, blue, red]), atol=1e-6)


def test_saturation_hue_and_grey_leave_grey_images_alone():
    images = pictures(channels=1)
    assert torch.equal(view(images, View(saturation=0.9, hue=0.5, grey=1), generator=seeded()), images)


def test_images_not_drawn_for_jitter_stay_bitwise_the_same():
    spec, images = View(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.5), pictures(64)
    changed = (view(images, spec, generator=seeded()) != images).flatten(1).any(1)
    assert torch.equal(changed, draw(spec, images.shape, generator=seeded()).jitter)
    assert 15 < changed.sum() < 49


def test_a_grey_image_has_equal_channels():
    images = pictures()
    result = view(images, View(grey=1), generator=seeded())
    assert torch.equal(result, result[:, :1].expand_as(result))


# Draws


def test_every_parameter_is_uniform_in_its_range():
    colour = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.3, "hue": 0.1}
    spec = View(rotation=20, scale=(0.8, 1.3), shift=0.15, resized_crop=(0.5, 0.5), flip=0.5, jitter=0.5, grey=0.5, **colour)
    draws = draw(spec, torch.Size((4096, 3, 8, 8)), generator=seeded())
    limits = [(-20, 20), (0.8, 1.3), (-0.15, 0.15), (-0.15, 0.15), (0.6, 1.4), (0, 2.5), (0.7, 1.3), (-0.1, 0.1)]
    values = torch.stack([draws.rotation, draws.scale, *draws.shift, *draws.factors])
    for row, (low, high) in zip(values, limits, strict=True):
        assert kstest(row.numpy(), "uniform", (low, high - low)).pvalue > 0.001
    masks = [mask[None].float() for mask in (draws.flip, draws.jitter, draws.grey)]
    correlations = torch.corrcoef(torch.cat([values, draws.crop_centre, *masks])) - torch.eye(13)
    assert correlations.abs().max() < 0.07  # no draw is used twice


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.8, 1.0])
def test_flip_jitter_and_grey_come_up_with_their_probability(probability):
    spec = View(flip=probability, jitter=probability, grey=probability)
    draws = draw(spec, torch.Size((4000, 3, 8, 8)), generator=seeded())
    for mask in (draws.flip, draws.jitter, draws.grey):
        assert abs(mask.float().mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_generator_alone_decides_and_the_global_generators_stay_untouched(spec):
    images = pictures()
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = view(images, spec, generator=seeded(7))
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    torch.manual_seed(2)
    generator = seeded(7)
    assert torch.equal(view(images, spec, generator=generator), first)
    assert not torch.equal(view(images, spec, generator=generator), first)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_number_of_draws_does_not_depend_on_the_images(spec):
    states = []
    for images in (pictures(), torch.zeros(16, 1, 8, 8), torch.ones(16, 3, 5, 30, dtype=torch.bfloat16)):
        generator = seeded(0)
        view(images, spec, generator=generator)
        states.append(generator.get_state())
    assert not torch.equal(states[0], seeded(0).get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_image_neither_sees_its_neighbours_nor_shares_their_view(spec):
    images = pictures(1).repeat(12, 1, 1, 1)
    result = view(images, spec, generator=seeded())
    assert len({tuple(image.flatten().tolist()) for image in result}) >= 11
    images[5] = 1 - images[5]
    changed = (view(images, spec, generator=seeded()) != result).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [5]


# The contract


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("spec", "channels"), [(SIMCLR, 3), (DIGITS, 1), (EVERYTHING, 1), (EVERYTHING, 3), (EVERYTHING, 4)])
def test_shape_dtype_and_range_hold_and_the_input_is_left_alone(spec, channels, dtype):
    spec = View(**(spec.model_dump() | {"brightness": 1.0}))
    images = pictures(8, channels).to(dtype)
    copy = images.clone()
    result = view(images, spec, generator=seeded())
    assert torch.equal(images, copy)
    assert result.shape == images.shape and result.dtype == dtype and result.device == images.device
    assert result.min() >= 0 and result.max() <= 1
    exact = view(images.double(), spec, generator=seeded())
    assert_close(result.double(), exact, atol={torch.bfloat16: 4e-3, torch.float16: 6e-4}.get(dtype, 1e-4))


@pytest.mark.parametrize("spec", [View(), View(jitter=1, grey=0), View(brightness=0.5, hue=0.2, jitter=0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_spec_without_parts_gives_the_same_bits_in_new_memory(spec, dtype):
    images = pictures().to(dtype)
    result = view(images, spec, generator=seeded())
    assert torch.equal(result, images) and result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_views_are_computed_on_the_images_device(spec):
    """Tensors on the meta device hold no values, and refuse to meet tensors of the CPU."""
    images = torch.empty(8, 3, 16, 16, device="meta")
    assert view(images, spec, generator=seeded()).device.type == "meta"


def test_autocast_changes_nothing():
    images = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        inside = view(images, EVERYTHING, generator=seeded())
    assert torch.equal(inside, view(images, EVERYTHING, generator=seeded()))


def test_no_gradient_flows_through_a_view():
    images = pictures().requires_grad_()
    assert not view(images, EVERYTHING, generator=seeded()).requires_grad


def test_whole_numbers_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"uint8; divide them by 255"):
        view(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), SUPERVISED, generator=seeded())


def test_one_image_of_one_pixel_is_no_special_case():
    assert view(torch.full((1, 3, 1, 1), 0.5), EVERYTHING, generator=seeded()).shape == (1, 3, 1, 1)
