"""The options of ``omniops demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PhotoArgument = Annotated[
    Path | None, typer.Argument(metavar="PHOTO", help="Any picture; a portrait of Grace Hopper without it.")
]
StepsOption = Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps of each network.")]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Of the weights and of the crops.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The picture to write.")]
