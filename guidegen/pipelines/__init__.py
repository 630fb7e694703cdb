"""Drawing in the loops of diffusers' own pipelines, with the guidance of guidegen."""
