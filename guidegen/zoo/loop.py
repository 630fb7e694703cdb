"""The training loop of the recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from guidegen.zoo.cpu import speed_up


def learning_rate(step: int, steps: int, peak: float, fall: float = 0.25, warmup: int = 300) -> float:
    """Linear warm-up, constant, linear to zero over the last `fall` of the steps."""
    left = (steps - step) / (fall * steps) if fall else 1.0
    return peak * min(1.0, (step + 1) / warmup, left)


def accumulate_gradients(
    loss_of: Callable[[nn.Module, int], torch.Tensor], network: Any, draws: Sequence[int], device: str
) -> torch.Tensor:
    """Adds the gradients of the mean loss over some draws, and returns it.

    On a CPU each draw has a thread: they wait for each other once a step, where the threads of an operation do each time.
    Two gradients add up to the same in either order.
    """

    def one(draw: int) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            loss = loss_of(network, draw)
        (loss / len(draws)).backward()
        return loss.detach()

    if device != "cpu" or len(draws) == 1:
        return torch.stack([one(draw) for draw in draws]).mean()
    with ThreadPoolExecutor(len(draws), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        return torch.stack(list(threads.map(one, draws))).mean()


class State:
    """All that a restart needs: weights, optimizer and EMA, and what the training has seen so far."""

    def __init__(self, file: Path, model: nn.Module, peak: float, decay: float):
        from diffusers.training_utils import EMAModel

        self.file = file
        optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
        self.seen: dict[str, Any] = {"step": 0, "seconds": 0.0, "history": []}
        if file.exists():
            state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.seen = {name: state[name] for name in self.seen}

    def save(self, step: int, seconds: float, loss: float | None) -> None:
        """Replaces the file at once."""
        self.seen |= {"step": step, "seconds": self.seen["seconds"] + seconds}
        self.seen["history"].append([step, loss])
        temporary = self.file.with_suffix(".part")
        torch.save({name: part.state_dict() for name, part in self.parts.items()} | self.seen, temporary)
        temporary.replace(self.file)


def train(
    model: Any,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    state_file: Path,
    steps: int,
    batch: int,
    peak: float,
    decay: float,
    compile_model: bool,
    save_seconds: float = 180.0,
    fall: float = 0.25,
    draws: int = 1,
) -> nn.Module:
    """Trains for `steps` in bf16 autocast, resuming from `state_file`; returns the EMA weights in `model`.

    Each step takes `draws` batches of `loss_of`; `fall` as in `learning_rate`.

    Raises:
        typer.BadParameter: the state is of more steps.
    """
    device = next(model.parameters()).device.type
    model = model.to(memory_format=torch.channels_last).train()
    if device == "cpu":
        speed_up(model)
    state = State(state_file, model, peak, decay)
    start, optimizer, ema = state.seen["step"], state.parts["optimizer"], state.parts["ema"]
    if start > steps:
        raise typer.BadParameter(f"{state_file} has seen {start * draws * batch} images: ask for as many or more.")
    network: Any = torch.compile(model) if compile_model else model
    saved, running = time.monotonic(), None
    for step, show in progress(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, fall)
        loss = accumulate_gradients(loss_of, network, range(draws * step, draws * (step + 1)), device)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        if step % 50 == 0:
            value = loss.item()
            running = value if running is None else 0.9 * running + 0.1 * value
            show(running)
        if (passed := time.monotonic() - saved) > save_seconds or step == steps - 1:
            state.save(step + 1, passed, running)
            saved = time.monotonic()
    seconds, (*_, last) = state.seen["seconds"], state.seen["history"] or [[0, None]]
    typer.echo(f"{steps * draws * batch} images, {seconds / 60:.0f} minutes, loss {last[1]}")
    ema.copy_to(model.parameters())
    return model.eval()


def progress(start: int, stop: int) -> Iterator[tuple[int, Callable[[float], None]]]:
    """Steps start..stop-1, each with a function that shows the loss: a bar, or plain lines off a terminal."""
    from rich.progress import Progress, TextColumn

    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]}")) as bar:
        task = bar.add_task("training", total=stop, completed=start, loss="-")
        began = time.monotonic()

        def show(loss: float) -> None:
            bar.update(task, loss=f"{loss:.4f}")
            if not bar.console.is_terminal and step % 200 == 0:
                left = (time.monotonic() - began) / max(1, step - start) * (stop - step) / 60
                bar.console.print(f"step {step}/{stop}  loss {loss:.4f}  {left:.0f} min left")

        for step in range(start, stop):
            yield step, show
            bar.update(task, completed=step + 1)
