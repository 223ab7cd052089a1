"""Constants of the corruptions at severities 1 to 5, as in the published sets.

Source: Hendrycks & Dietterich (2019), "Benchmarking neural network robustness to common corruptions and perturbations", ICLR, and the
authors' scripts `make_cifar_c.py` and `make_imagenet_c.py` (github.com/hendrycks/robustness). A row is one severity; its numbers are the
arguments of the function of that name in `corruptions`. Lengths are in pixels, or shares of the image's side for `elastic_transform`.
"""

from __future__ import annotations

Row = tuple[float, ...]
Rows = tuple[Row, Row, Row, Row, Row]

LARGEST_SMALL = 64  # images with sides up to this use the constants of CIFAR-C, larger ones those of ImageNet-C
OFF = 244 / 224  # ImageNet-C's elastic lengths are shares of 244 pixels, on images of 224

CIFAR_C: dict[str, Rows] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((0.06, 0.01), (0.11, 0.01), (0.15, 0.01), (0.20, 0.01), (0.25, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
}

IMAGENET_C: dict[str, Rows] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((0.11, 0.01), (0.15, 0.01), (0.20, 0.02), (0.24, 0.02), (0.30, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (
        (2 * OFF, 0.7 * OFF, 0.1 * OFF),
        (2 * OFF, 0.08 * OFF, 0.2 * OFF),
        (0.05 * OFF, 0.01 * OFF, 0.02 * OFF),
        (0.07 * OFF, 0.01 * OFF, 0.02 * OFF),
        (0.12 * OFF, 0.01 * OFF, 0.02 * OFF),
    ),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
}


def constants(name: str, *, side: int, severity: int) -> Row:
    """Constants of a corruption for images whose longer side has `side` pixels.

    Raises:
        ValueError: the name is unknown, or the severity is not 1 to 5.
    """
    table = CIFAR_C if side <= LARGEST_SMALL else IMAGENET_C
    if name not in table:
        raise ValueError(f"corruption = {name!r}; choose from {', '.join(table)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity = {severity!r}; choose from 1, 2, 3, 4, 5")
    return table[name][severity - 1]
