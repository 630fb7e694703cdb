"""Score SDEs that explode the variance (Song et al. 2021, arXiv 2011.13456): diffusers' `ScoreSdeVePipeline`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from guidegen.models.kinds.unet import UNet

if TYPE_CHECKING:
    from torch import Tensor

    from guidegen.models.networks import LoadOptions


class ScoreSdeVe(UNet):
    """An NCSN++ of the score of images in [0, 1], without classes."""

    kind = "score SDE (variance exploding)"
    pipeline = "ScoreSdeVePipeline"
    scheduler_class = "ScoreSdeVeScheduler"
    recommended = (
        "2000 steps of predictor and corrector (diffusers' ScoreSdeVePipeline); 1000 for CIFAR-10 (Song et al. 2021, arXiv "
        "2011.13456). --scheduler edm takes fewer"
    )
    default_steps = 2000
    asked_last = False

    def load_decoder(self, options: LoadOptions) -> Callable[[Tensor], Tensor] | None:
        return lambda images: 2 * images - 1
