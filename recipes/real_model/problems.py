"""Write the problem set: `python -m recipes.real_model.problems DATA_DIR` makes train.jsonl and eval.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from recipes.real_model.building import building, say
from recipes.real_model.families import problems


def main(
    output: Annotated[Path, typer.Argument(help="Directory to write into. Left alone if it is there.")],
    train: Annotated[int, typer.Option(help="Training problems of each family, at most.")] = 5,
    held_out: Annotated[int, typer.Option(help="Held-out problems of each family, at most.")] = 2,
    seed: Annotated[int, typer.Option(help="Constants and hidden tests.")] = 0,
) -> None:
    if output.exists():
        say(f"{output} is there already")
        return
    with building(output) as new:
        for split, each in (("train", train), ("eval", held_out)):
            rows = list(problems(split, each, seed))
            (new / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            say(f"{len(rows)} problems in {output / split}.jsonl")


if __name__ == "__main__":
    typer.run(main)
