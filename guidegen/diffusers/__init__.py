"""guidegen's guidance in the modular pipelines of diffusers: `Guidance`, a guider."""

from guidegen.diffusers.guider import Guidance

__all__ = ["Guidance"]
