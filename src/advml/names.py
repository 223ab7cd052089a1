"""The names that params.yaml and the command line choose from."""

from __future__ import annotations

from typing import Literal

SchemeName = Literal["SL", "CL", "SCL"]
RegimeName = Literal["ST", "AT", "Partial-AT", "Full-AT"]
PhaseName = Literal["st", "at"]
CorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
