"""Published checkpoints by their file names: what they were sampled with, and the figure that came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_EDM2_SOURCE = "NVlabs/edm2 generate_images.py"
_EDM_SOURCE = "arXiv 2206.00364, abstract and table 2; settings of NVlabs/edm README.md"
_CHURN = "S_churn=40 S_tmin=0.05 S_tmax=50 S_noise=1.003"


@dataclass(frozen=True)
class Preset:
    """Published settings of a checkpoint.

    Attributes:
        name: of the settings.
        file: of the checkpoint.
        w: guidance weight; 1 without guidance.
        steps: steps of the sampler.
        source: where these are published.
        guide: file of the guiding network; None without one.
        scheduler_opt: options of the sampler.
        figure: metric and number, smaller is better; None where none is published.
    """

    name: str
    file: str
    w: float
    steps: int
    source: str
    guide: str | None = None
    scheduler_opt: str | None = None
    figure: str | None = None

    def line(self) -> str:
        """All of it but the name, for people."""
        guided = f" guided by {self.guide}" if self.guide else ""
        options = f", {self.scheduler_opt}" if self.scheduler_opt else ""
        figure = f": {self.figure}" if self.figure else ""
        return f"{self.file}{guided}, w {self.w:g}, {self.steps} steps{options}{figure} ({self.source})"


def presets_of(file: str) -> list[Preset]:
    """The presets that a file of this name takes part in, those that it draws first."""
    own = [preset for preset in PRESETS if preset.file == file]
    return own + [preset for preset in PRESETS if preset.guide == file]


def published(presets: Iterable[Preset]) -> dict[str, Any]:
    """Presets as model_index.json has them."""
    return {preset.name: asdict(preset) for preset in presets}


def _edm2(row: str) -> Preset:
    name, file, guide, w, metric, number = row.split()
    guiding = None if guide == "-" else f"edm2-{guide}.pkl"
    return Preset(f"edm2-{name}", f"edm2-{file}.pkl", float(w), 32, _EDM2_SOURCE, guiding, None, f"{metric} {number}")


def _edm(row: str) -> Preset:
    name, steps, fid = row.split()
    churn = _CHURN.replace("40", "80" if name.startswith("base") else "40") if "imagenet" in name else None
    figure = None if fid == "-" else f"FID {fid}"
    return Preset(name, f"{name}.pkl", 1.0, int(steps), _EDM_SOURCE, None, churn, figure)


_EDM_ROWS = """
edm-cifar10-32x32-cond-vp        18   1.79
edm-cifar10-32x32-cond-ve        18   1.79
edm-cifar10-32x32-uncond-vp      18   1.97
edm-cifar10-32x32-uncond-ve      18   1.98
edm-ffhq-64x64-uncond-vp         40   2.39
edm-ffhq-64x64-uncond-ve         40   2.53
edm-afhqv2-64x64-uncond-vp       40   1.96
edm-afhqv2-64x64-uncond-ve       40   2.16
edm-imagenet-64x64-cond-adm      256  1.36
baseline-cifar10-32x32-uncond-vp 18   -
baseline-cifar10-32x32-uncond-ve 18   -
baseline-imagenet-64x64-cond-adm 256  1.55
"""
_EDM2_ROWS = """
img512-xs-fid             img512-xs-2147483-0.135       -                               1    FID 3.53
img512-xs-dino            img512-xs-2147483-0.200       -                               1    FD-DINOv2 103.39
img512-s-fid              img512-s-2147483-0.130        -                               1    FID 2.56
img512-s-dino             img512-s-2147483-0.190        -                               1    FD-DINOv2 68.64
img512-m-fid              img512-m-2147483-0.100        -                               1    FID 2.25
img512-m-dino             img512-m-2147483-0.155        -                               1    FD-DINOv2 58.44
img512-l-fid              img512-l-1879048-0.085        -                               1    FID 2.06
img512-l-dino             img512-l-1879048-0.155        -                               1    FD-DINOv2 52.25
img512-xl-fid             img512-xl-1342177-0.085       -                               1    FID 1.96
img512-xl-dino            img512-xl-1342177-0.155       -                               1    FD-DINOv2 45.96
img512-xxl-fid            img512-xxl-0939524-0.070      -                               1    FID 1.91
img512-xxl-dino           img512-xxl-0939524-0.150      -                               1    FD-DINOv2 42.84
img64-s-fid               img64-s-1073741-0.075         -                               1    FID 1.58
img64-m-fid               img64-m-2147483-0.060         -                               1    FID 1.43
img64-l-fid               img64-l-1073741-0.040         -                               1    FID 1.33
img64-xl-fid              img64-xl-0671088-0.040        -                               1    FID 1.33
img512-xs-guid-fid        img512-xs-2147483-0.045       img512-xs-uncond-2147483-0.045  1.40 FID 2.91
img512-xs-guid-dino       img512-xs-2147483-0.150       img512-xs-uncond-2147483-0.150  1.70 FD-DINOv2 79.94
img512-s-guid-fid         img512-s-2147483-0.025        img512-xs-uncond-2147483-0.025  1.40 FID 2.23
img512-s-guid-dino        img512-s-2147483-0.085        img512-xs-uncond-2147483-0.085  1.90 FD-DINOv2 52.32
img512-m-guid-fid         img512-m-2147483-0.030        img512-xs-uncond-2147483-0.030  1.20 FID 2.01
img512-m-guid-dino        img512-m-2147483-0.015        img512-xs-uncond-2147483-0.015  2.00 FD-DINOv2 41.98
img512-l-guid-fid         img512-l-1879048-0.015        img512-xs-uncond-2147483-0.015  1.20 FID 1.88
img512-l-guid-dino        img512-l-1879048-0.035        img512-xs-uncond-2147483-0.035  1.70 FD-DINOv2 38.20
img512-xl-guid-fid        img512-xl-1342177-0.020       img512-xs-uncond-2147483-0.020  1.20 FID 1.85
img512-xl-guid-dino       img512-xl-1342177-0.030       img512-xs-uncond-2147483-0.030  1.70 FD-DINOv2 35.67
img512-xxl-guid-fid       img512-xxl-0939524-0.015      img512-xs-uncond-2147483-0.015  1.20 FID 1.81
img512-xxl-guid-dino      img512-xxl-0939524-0.015      img512-xs-uncond-2147483-0.015  1.70 FD-DINOv2 33.09
img512-s-autog-fid        img512-s-2147483-0.070        img512-xs-0134217-0.125         2.10 FID 1.34
img512-s-autog-dino       img512-s-2147483-0.120        img512-xs-0134217-0.165         2.45 FD-DINOv2 36.67
img512-xxl-autog-fid      img512-xxl-0939524-0.075      img512-m-0268435-0.155          2.05 FID 1.25
img512-xxl-autog-dino     img512-xxl-0939524-0.130      img512-m-0268435-0.205          2.30 FD-DINOv2 24.18
img512-s-uncond-autog-fid img512-s-uncond-2147483-0.070 img512-xs-uncond-0134217-0.110  2.85 FID 3.86
img512-s-uncond-autog-dino img512-s-uncond-2147483-0.090 img512-xs-uncond-0134217-0.125  2.90 FD-DINOv2 90.39
img64-s-autog-fid         img64-s-1073741-0.045         img64-xs-0134217-0.110          1.70 FID 1.01
img64-s-autog-dino        img64-s-1073741-0.105         img64-xs-0134217-0.175          2.20 FD-DINOv2 31.85
"""
_SIT = (
    Preset(
        name="SiT-XL/2",
        file="SiT-XL-2-256x256.pt",
        w=1.5,
        steps=250,
        source="willisma/SiT README.md, by its SDE sampler; w of arXiv 2401.08740",
        figure="FID 2.06",
    ),
    Preset(
        name="REPA SiT-XL/2",
        file="last.pt",
        w=1.8,
        steps=250,
        source="sihyun-yu/REPA README.md, by its SDE sampler, guided where sigma is at most 0.7",
        figure="FID 1.42",
    ),
)
PRESETS: tuple[Preset, ...] = (
    *map(_edm, _EDM_ROWS.strip().splitlines()),
    *map(_edm2, _EDM2_ROWS.strip().splitlines()),
    *_SIT,
)
