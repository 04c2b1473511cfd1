"""The commands together. Each is imported when it is called, so that help is there at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import rich  # noqa: F401  # which every command needs, and Typer's help would do without
import typer
from typer.core import TyperGroup

from omniops.cli import errors, options

_BENCH_SAM2 = "bench sam2"
_OPTIONS = "options"


class Command(NamedTuple):
    """Where a command is, and the first line of its help."""

    module: str
    function: str
    summary: str
    hidden: bool = False


COMMANDS = {
    "doctor": Command(
        "doctor", "doctor", "Show versions, devices, and the kernel that serves each operator on each device."
    ),
    "selftest": Command(
        "selftest.command",
        "selftest",
        "Check operators and models, in every dtype, against the CPU in float64 or exact integers.",
    ),
    "bench": Command(
        "bench.command",
        "bench",
        "Time every operator beside what you would call instead, and beside the time that moving its bytes takes.",
    ),
    "demo": Command(
        "demo.command",
        "demo",
        "Train one small network three times on a photo, upsampling with nearest, bilinear and CARAFE, and compare.",
    ),
    "detect": Command(
        "detect.command",
        "detect",
        "Find COCO's 80 kinds of objects in pictures: draw their boxes, masks, classes and scores, and write them "
        "down.",
    ),
    "detect-eval": Command(
        "detect.evaluate",
        "detect_eval",
        "Compute COCO's average precision and recall of boxes, and of masks where model and annotations have them.",
    ),
    "detect-train": Command(
        "detect.train",
        "detect_train",
        "Fine-tune a detector on pictures with COCO annotations, of any categories.",
    ),
    "segment": Command(
        "segment.command",
        "segment",
        "Cut objects out of pictures, or follow them through videos and live video, with SAM 2.",
    ),
    "export": Command(
        "export.command",
        "export",
        "Write a model to a file for ONNX, OpenVINO, ExecuTorch, TorchScript, AOTInductor or Core ML.",
    ),
    "serve": Command(
        "serve.command",
        "serve",
        "Serve SAM 2 in the browser: the API of its demo, a page, and sessions for several people at once.",
    ),
    # omniops bench --help names it
    _BENCH_SAM2: Command(
        "bench.sam2",
        "bench_sam2",
        "Time SAM 2 on one device beside another: set_image, predict of one click, and the two together.",
        hidden=True,
    ),
}


@contextmanager
def _report_errors() -> Iterator[None]:
    try:
        yield
    except (errors.CommandError, KeyboardInterrupt, OSError) as error:
        raise SystemExit(errors.report(error)) from None


class _Commands(TyperGroup):
    """Commands that are imported when they are called, one of them of two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Which command the arguments name, and what is left of them."""
        if " ".join(args[:2]) == _BENCH_SAM2:
            args = [_BENCH_SAM2, *args[2:]]
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _import_command(name), rest

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse; end here what Typer would end in its own ways."""
        with _report_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; end here what Typer would end in its own ways."""
        with _report_errors():
            return super().invoke(ctx)


def _make_app(add_completion: bool = False) -> typer.Typer:
    return typer.Typer(
        name="omniops",
        cls=_Commands,
        help="Vision operators on every device: what serves them here, whether they are right, how fast they are.",
        no_args_is_help=True,
        epilog=options.EXIT_STATUS,
        context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
        add_completion=add_completion,
        pretty_exceptions_enable=False,
    )


def _import_command(name: str) -> Any:
    command = COMMANDS[name]
    function = getattr(import_module(f"omniops.cli.{command.module}"), command.function)
    errors.raise_received()
    alone = _make_app()
    alone.command(name)(function)
    alone.command(_OPTIONS)(options.of_every_command)
    commands = typer.main.get_group(alone).commands
    commands[name].params += commands[_OPTIONS].params
    return commands[name]


def _placeholder() -> None:
    """In the place of a command until it is called."""


def run_app(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the command and exit."""
    app = _make_app(add_completion=True)
    app.callback()(options.of_the_command)
    for name, command in COMMANDS.items():
        app.command(name, help=command.summary, hidden=command.hidden)(_placeholder)
    app(args=None if arguments is None else list(arguments), prog_name="omniops")
