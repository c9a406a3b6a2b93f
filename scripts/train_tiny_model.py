"""Make the bundled tiny model: corpus, tokenizer, training, evaluation, model card.

    python scripts/train_tiny_model.py [--output DIR] [--minutes N] [--seed N] [--resume] [--evaluate-only]

It needs no download and no GPU. Ctrl-C ends the training early; what was learned so far is saved and evaluated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import card, corpus, evaluation, network, tokenizer, training

BUNDLED = Path(__file__).parents[1] / "shared" / "baton" / "models" / "tiny"
WANTED = 0.95
"""Share of the held-out questions that must be answered right."""
EVALUATION_SEED = 1_000_003


def main(
    output: Annotated[Path, typer.Option(help="Model directory to write.")] = BUNDLED,
    minutes: Annotated[float, typer.Option(min=0.1, help="Most minutes the training may take.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = training.Recipe().steps,
    seed: Annotated[int, typer.Option(help="Seed of corpus and weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on training the model in --output.")] = False,
    evaluate_only: Annotated[bool, typer.Option("--evaluate-only", help="Only measure the model in --output.")] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Print every wrong answer.")] = False,
) -> None:
    """Train the bundled tiny model, measure it on held-out questions and write its model card."""
    console = Console()
    torch.set_num_threads(threads)
    recipe = training.Recipe(steps=steps, minutes=minutes, seed=seed)
    if resume:
        recipe = training.resumed(recipe)
    if not evaluate_only:
        _train(console, output, recipe, resume=resume)
    by_topic = _evaluate(console, output, wrong=wrong)
    share = evaluation.total(by_topic).share
    if not evaluate_only:
        card.write(output, by_topic, recipe)
    if share < WANTED:
        console.print(f"[red]{share:.1%} is less than the {WANTED:.0%} wanted")
        raise typer.Exit(1)


def _train(console: Console, output: Path, recipe: training.Recipe, *, resume: bool) -> None:
    if resume:
        words = Tokenizer.from_file(str(output / "tokenizer.json"))
        model = network.load_network(output)
        before = network.trainings(model)
    else:
        words = tokenizer.train_tokenizer(recipe.seed)
        tokenizer.save_tokenizer(words, output)
        model = network.new_network(words, recipe.seed)
        before = []
    console.print(f"{model.num_parameters():,} parameters, vocabulary of {words.get_vocab_size()}")

    def save(outcome: training.Outcome) -> None:
        network.save_network(model, output, [*before, outcome])

    outcome = training.train(model, words, recipe, save)
    console.print(f"{outcome.steps} steps, {outcome.tokens:,} tokens in {outcome.minutes:.1f} minutes")


def _evaluate(console: Console, output: Path, *, wrong: bool) -> dict[str, evaluation.Score]:
    """Ask the saved model, not the one in memory."""
    words = Tokenizer.from_file(str(output / "tokenizer.json"))
    asked = corpus.questions(EVALUATION_SEED)
    with Progress(console=console) as bar:
        task = bar.add_task("evaluation", total=len(asked))
        answered = evaluation.answer_all(
            network.load_network(output), words, asked, done=lambda count: bar.advance(task, count)
        )
    for one in answered if wrong else ():
        if not one.right:
            console.print(
                f"{one.question.topic}: {one.question.prompt!r} -> {one.said!r}, not {one.question.answer!r}",
                markup=False,
            )
    by_topic = evaluation.scores(answered)
    console.print(evaluation.table(by_topic))
    return by_topic


if __name__ == "__main__":
    typer.run(main)
