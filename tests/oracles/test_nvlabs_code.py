"""EDM, EDM2 and SiT against their original code, where GUIDEGEN_EDM, GUIDEGEN_EDM2 and GUIDEGEN_SIT name clones of it.

Each runs in a process of its own, since their modules have the same names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_NVLABS = """
import pickle, sys
from pathlib import Path
import torch
clone, which, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.path.insert(0, clone)
import dnnlib
from guidegen.models.convert.nvlabs import Nvlabs, Options
torch.manual_seed(0)
fourier = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
cases = {
    "edm": [
        ("networks.EDMPrecond", dict(model_type="SongUNet", augment_dim=9, channel_mult=[2, 2, 2], attn_resolutions=[16])),
        ("networks.EDMPrecond", dict(model_type="SongUNet", label_dim=10, channel_mult=[1, 2], **fourier)),
        ("networks.VPPrecond", dict(channel_mult=[1, 2])),
        ("networks.VEPrecond", dict(channel_mult=[1, 2], **fourier)),
        ("networks.EDMPrecond", dict(label_dim=10, channel_mult=[1, 2, 3, 4])),
        ("networks.iDDPMPrecond", dict(label_dim=10, channel_mult=[1, 2])),
    ],
    "edm2": [
        ("networks_edm2.Precond", dict(label_dim=10, channel_mult=[1, 2, 3, 4])),
        ("networks_edm2.Precond", dict(label_dim=10, channel_mult=[1, 2], channel_mult_emb=2, label_balance=0.3)),
        ("networks_edm2.Precond", dict(label_dim=0, channel_mult=[1, 2], concat_balance=0.4)),
    ],
}[which]
for name, arguments in cases:
    arguments = dict(img_resolution=32, img_channels=3, model_channels=64, num_blocks=1) | arguments
    net = dnnlib.util.construct_class_by_name(class_name="training." + name, **arguments).eval().requires_grad_(False)
    for value in net.parameters():
        if not value.ndim:
            value.data = torch.rand([]) + 0.5
        elif value.abs().max() < 1e-3:
            value.data = 0.05 * torch.randn_like(value)
    net = net.half() if which == "edm2" else net
    with (folder / "n.pkl").open("wb") as file:
        pickle.dump(dict(ema=net, dataset_kwargs={}), file)
    ours = Nvlabs.convert(folder / "n.pkl", Options()).network
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    one_hot = torch.eye(10)[labels] if arguments.get("label_dim") else None
    for sigma in (60.0, 1.0, 0.05):
        wanted = net(sigma * x, torch.full((2,), sigma), one_hot)
        found = ours(sigma * x, torch.tensor(sigma), labels if one_hot is not None else None)[0]
        error = float((found - wanted).norm() / wanted.norm())
        assert error < 1e-5, (name, sigma, error)
"""
_SIT = """
import sys
from pathlib import Path
import torch
clone, folder = sys.argv[1], Path(sys.argv[3])
sys.path.insert(0, clone)
import models
from guidegen.models.convert.sit import Options, SiT
torch.manual_seed(0)
net = models.SiT(input_size=16, hidden_size=384, depth=2, num_heads=6, num_classes=10).eval().requires_grad_(False)
for value in net.parameters():
    value.data = 0.05 * torch.randn_like(value)
torch.save(net.state_dict(), folder / "SiT.pt")
ours = SiT.convert(folder / "SiT.pt", Options()).network
x, labels = torch.randn(3, 4, 16, 16), torch.tensor([1, 5, 10])
for time in (0.0, 0.3, 1.0):
    wanted = -net(x, torch.full((3,), time), labels)
    found = ours(x, torch.full((3,), 1000 * (1 - time)), labels)[0]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
"""


@pytest.mark.parametrize(("which", "script"), [("edm", _NVLABS), ("edm2", _NVLABS), ("sit", _SIT)])
def test_networks_are_those_of_the_original_code(which: str, script: str, tmp_path: Path) -> None:
    clone = os.environ.get(f"GUIDEGEN_{which.upper()}")
    if not clone:
        pytest.skip(f"GUIDEGEN_{which.upper()} names no clone")
    command = [sys.executable, "-c", script, clone, which, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "No module named" in done.stderr and "guidegen" not in done.stderr.splitlines()[-1]:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
