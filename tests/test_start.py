"""How the command line starts: what it leaves unimported, and how many threads it takes."""

from __future__ import annotations

import subprocess
import sys

_LAZY = """
import sys
from guidegen.cli import main
sys.argv = ["guidegen", "sample", "--label", "207", "--steps", "1", "-q", "-o", "run"]
try:
    main()
except SystemExit:
    pass
print(sorted({"torch._dynamo", "transformers", "scipy.stats"} & set(sys.modules)))
import diffusers.hooks, diffusers.models.transformers
from diffusers.models.transformers import DiTTransformer2DModel
from diffusers.models.unets import *
print(DiTTransformer2DModel is diffusers.DiTTransformer2DModel, UNet1DModel is diffusers.UNet1DModel)
print(diffusers.hooks.layer_skip.LayerSkipConfig is diffusers.hooks.LayerSkipConfig, hasattr(diffusers.hooks, "nothing"))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def test_the_main_job_loads_no_compiler_and_no_transformers(tmp_path: object) -> None:
    done = subprocess.run([sys.executable, "-c", _LAZY], cwd=str(tmp_path), capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["[]", "True True", "True False", "2.0"], done.stderr
