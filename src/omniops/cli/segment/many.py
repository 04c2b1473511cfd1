"""``omniops segment`` of many sources: what can be done is done, and what failed is named at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omniops.cli.common import CommandError
from omniops.cli.errors import cause, exit_status, say
from omniops.cli.segment.picture import Everything, Outcomes, segment_pictures
from omniops.cli.segment.request import Request
from omniops.cli.segment.sources import Kind, Source

_SIGNALS = 128
"""An exit status above is a signal's."""


def segment_many(
    requests: Sequence[Request], everything: Everything | None, folder: Path, sources: Sequence[Source]
) -> None:
    """Segment the pictures, then the videos, with a model that is loaded once.

    ``sources`` are all that were named, those too that an earlier run has done.
    """
    names = [source.name for source in sources if source.kind is Kind.PICTURE]
    pictures = [request for request in requests if request.source.kind is Kind.PICTURE]
    outcomes = Outcomes()
    stopped: BaseException | None = None
    try:
        if pictures:
            segment_pictures(pictures, everything, folder, names, outcomes)
        for request in requests:
            if request.source.kind is Kind.VIDEO:
                _segment_video(request, outcomes)
    except (KeyboardInterrupt, OSError, CommandError) as error:
        stopped = error
    for failure in outcomes.failed.values():
        say(f"error: {failure}", "error")
    if isinstance(stopped, OSError):  # of the output, which nobody reads or nothing takes
        raise stopped
    if stopped is not None:
        status = stopped.status if isinstance(stopped, CommandError) else exit_status(stopped)
        raise CommandError(f"{cause(stopped)}: {outcomes.num_done} of {len(requests)} were done", status)
    if outcomes.failed:
        raise CommandError(f"{len(outcomes.failed)} of {len(requests)} failed", status=1)


def _segment_video(request: Request, outcomes: Outcomes) -> None:
    from omniops.cli.segment.video import segment_video

    try:
        segment_video(request)
        outcomes.num_done += 1
    except CommandError as error:
        if error.status > _SIGNALS:
            raise
        outcomes.failed[request.source.name] = f"{request.source.name}: {error}"
