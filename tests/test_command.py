"""Commands are rendered from the options that run.json keeps: parsed again, they are the same options."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields
from typing import Any

import pytest
import typer
from setups import options_of

from guidegen.cli import app
from guidegen.cli.afterwards import Afterwards
from guidegen.cli.command import command_of
from guidegen.cli.flags import SampleOptions
from guidegen.spec.command import Command, read_command

CASES: list[dict[str, Any]] = [
    {},
    {"w": "-1.5", "label": ["207", "-", "-3:2", "a 'quoted' \"name\""], "num": 3, "quiet": True},
    {"prompt": ["--looks like a flag", "line\nbreak", "€ \\ $HOME"], "negative_prompt": "", "seeds": "0-3,9"},
    {"mode": "both", "w_classifier": "0.5", "classifier": ["a:2", "b"], "classifier_gradient": "detached"},
    {"steps": 20, "scheduler": "ddim", "eta": 0.5, "dtype": "bf16", "batch_size": "4", "timestep_spacing": "leading"},
    {"guidance": "apg", "guidance_opt": ["eta=0.5", "norm=-1"], "interval": "0.3:5", "w_schedule": "inverse-cosine"},
    {"scheduler_opt": ["use_karras_sigmas=true", "solver_order=3"]},
    {"json_rows": True, "compile_networks": True, "deterministic": True, "shard": "0/4", "overwrite": True},
    {"sweep": True, "by": ["guidance=cfg,apg", "steps=5:20:5"], "columns": "steps", "rows": "w,label", "out": "-"},
]


def parsed(command: Command) -> dict[str, Any]:
    words = shlex.split(str(command))
    group: Any = typer.main.get_command(app)
    return dict(group.commands[words[1]].make_context(words[1], words[2:]).params)


@pytest.mark.parametrize("given", CASES)
def test_options_come_back_from_the_line(given: dict[str, Any]) -> None:
    options = options_of(**({"quiet": False, "device": "auto", "offload": "none"} | given))
    command = command_of(options.command, options, Afterwards(preview=True))
    found = parsed(command)
    assert found.pop("preview") is True
    for name, value in asdict(options).items():
        assert (found[name] or None) == (value or None) or (found[name], value) == (False, None), name


def test_every_option_has_its_flag() -> None:
    """Those whose flag is not their name too."""
    given = {"json_rows": True, "compile_networks": True, "w_guide": "2", "offline": True}
    assert command_of("sample", options_of(quiet=None, device="auto", **given)).options == {
        "w-guide": "2",
        "offline": True,
        "compile": True,
        "json": True,
    }
    assert {field.name for field in fields(SampleOptions)} <= set(parsed(Command("sample", {})))


def test_a_command_is_read_from_run_json_and_parts_of_it_left_out() -> None:
    command = Command("sweep", {"w": "0,1", "label": ["1", "2"], "overwrite": True, "shard": "1/2"})
    again = read_command(json.loads(json.dumps(command.as_json())))
    assert again == command
    assert str(command.without("overwrite", "shard")) == "guidegen sweep --w 0,1 --label 1 --label 2"
    assert read_command({"settings": {}}) is None
