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
    """
    from diffusers.training_utils import EMAModel

    device = next(model.parameters()).device.type
    model = model.to(memory_format=torch.channels_last).train()
    if device == "cpu":
        speed_up(model)
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    start, seconds, history = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds, history = state["step"], state["seconds"], state["history"]
    network: Any = torch.compile(model) if compile_model else model

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        temporary = state_file.with_suffix(".part")
        torch.save(state | {"step": step, "seconds": seconds, "history": history}, temporary)
        temporary.replace(state_file)

    saved = clock = time.monotonic()
    running: float | None = None
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
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        if now - saved > save_seconds:
            history.append([step + 1, running])
            save(step + 1)
            saved = time.monotonic()
    history.append([steps, running])
    save(steps)
    typer.echo(f"{steps * draws * batch} images, {seconds / 60:.0f} minutes, loss {running}")
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
