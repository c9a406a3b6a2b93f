"""Training: AdamW with warm-up and a cosine to zero, in bfloat16 arithmetic over float32 weights."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM

from tiny_model.batches import IGNORED, Batch, batches


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the network is trained.

    Attributes:
        steps: updates of the weights.
        minutes: wall-clock limit; where it comes first, the schedule is shortened to fit.
        tokens: of a batch, padding included.
        peak_rate: learning rate after the warm-up.
        warm_up: share of the training that warms up.
        weight_decay: of the matrices.
        clip: norm gradients are cut to.
        seed: of weights and corpus.
        early: documents at the beginning of which most are drills.
    """

    steps: int = 4400
    minutes: float = 30.0
    tokens: int = 1536
    peak_rate: float = 2.5e-3
    warm_up: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    early: int = 6_000

    def rate(self, progress: float) -> float:
        """Learning rate after a share of the training, 0 to 1."""
        if progress < self.warm_up:
            return self.peak_rate * max(progress / self.warm_up, 0.01)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warm_up) / (1 - self.warm_up)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training was: updates made, tokens read, wall-clock time."""

    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0

    def __add__(self, other: Outcome) -> Outcome:
        """Both trainings, one after the other."""
        return Outcome(self.steps + other.steps, self.tokens + other.tokens, round(self.minutes + other.minutes, 1))


def resumed(recipe: Recipe) -> Recipe:
    """The recipe for going on with a trained network: other documents, gentler steps, drills only as later on."""
    return dataclasses.replace(recipe, seed=recipe.seed + 1, peak_rate=1.5e-3, early=0)


def train(
    network: LlamaForCausalLM,
    tokenizer: Tokenizer,
    recipe: Recipe,
    save: Callable[[Outcome], None],
    save_every: int = 200,
) -> Outcome:
    """Train the network in place; Ctrl-C ends the training early, with what was learned so far.

    Args:
        network: with fresh weights.
        tokenizer: of the corpus.
        recipe: how.
        save: called every `save_every` steps with what the training was so far.
        save_every: steps between two checkpoints.
    """
    optimizer = _optimizer(network, recipe)
    stream = batches(tokenizer, recipe.seed, recipe.tokens, recipe.early)
    start = time.monotonic()
    step = tokens = 0

    def so_far() -> Outcome:
        return Outcome(step, tokens, round((time.monotonic() - start) / 60, 1))

    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    network.train()
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=1.0, loss=math.nan)
            loss = math.nan
            while (progress := max(step / recipe.steps, (time.monotonic() - start) / 60 / recipe.minutes)) < 1:
                batch = next(stream)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(progress)
                value = _update(network, optimizer, batch, recipe.clip)
                loss = value if math.isnan(loss) else 0.98 * loss + 0.02 * value
                step, tokens = step + 1, tokens + batch.ids.numel()
                bar.update(task, completed=progress, loss=loss)
                if step % save_every == 0:
                    bar.console.print(
                        f"step {step}: loss {loss:.4f}, {tokens / (time.monotonic() - start):.0f} tokens/s"
                    )
                    save(so_far())
            bar.update(task, completed=1.0)
    except KeyboardInterrupt:
        print("stopped early")
    save(so_far())
    return so_far()


def _optimizer(network: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=True)


def _update(network: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, clip: float) -> float:
    """One step; the loss in nats per learned token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Padding is at the right, where causal attention never looks, so there is no mask.
        hidden = network.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        logits = network.lm_head(hidden.flatten(0, 1)[batch.positions])
    loss = functional.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
