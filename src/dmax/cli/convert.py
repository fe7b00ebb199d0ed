"""`dmax convert`: what it takes, and what it says is next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dmax.cli import options
from dmax.cli.terminal import doing, print_json, say

RECIPE = "recipes/convert_1_warmup.yaml"


def convert(
    model: Annotated[str, typer.Argument(help="autoregressive model: folder or hub id")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the result")],
    block_length: Annotated[int, typer.Option(help="tokens that will be decoded together")] = 32,
    shift: Annotated[
        bool,
        typer.Option(
            "--shift/--no-shift", help="read a prediction one position before its place, or at it"
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make an autoregressive model a block-diffusion model, which is then to be trained.

    It gets a mask token and a block length; its other weights keep their values, in the widest
    dtype of its files.

    Example: dmax convert Qwen/Qwen3-0.6B -o runs/converted
    """
    with doing(f"converting {model}"):
        from dmax.chat_template import has_template
        from dmax.convert import convert_checkpoint

        made = convert_checkpoint(model, output, block_length=block_length, shift=shift)
    ids = made.special_ids
    if as_json:
        print_json(
            {
                "checkpoint": str(output),
                "mask_token_id": ids.mask_token_id,
                "block_length": ids.block_length,
                "shift": shift,
            }
        )
        return
    place = "one position before its place" if shift else "at its place"
    made_of = f"mask token {ids.mask_token_id}, blocks of {ids.block_length}"
    say(f"{made_of}; a prediction is read {place}")
    if not has_template(made.tokenizer):
        say("it has no chat template: a prompt is one text, which is continued as it is")
    say(Text(f"next: dmax train {RECIPE}, with `model.path: {output}`"))
    sys.stdout.write(f"{output}\n")
