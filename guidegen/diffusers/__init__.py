"""guidegen's guidance in the modular pipelines of diffusers: `Guidance`, a guider.

The guiders of diffusers, and what is the same here:

    ClassifierFreeGuidance              cfg; rescale with its guidance_rescale
    AdaptiveProjectedGuidance           apg with space=native
    AdaptiveProjectedMixGuidance        apg-mix
    ClassifierFreeZeroStarGuidance      cfg-zero
    FrequencyDecoupledGuidance          frequency
    MagnitudeAwareGuidance              magnitude
    TangentialClassifierFreeGuidance    tangential
    SkipLayerGuidance, PerturbedAttentionGuidance, SmoothedEnergyGuidance
                                        guide_model, a copy of the network with the same hooks, and w_guide = 1 + their scale
    AutoGuidance                        such a guide_model, w = 1, w_guide = its scale; it asks the copy without the prompt
    LTX2Guidance                        none: it guides video and audio by two guiders, over denoised estimates
"""

from guidegen.diffusers.guider import Guidance

__all__ = ["Guidance"]
