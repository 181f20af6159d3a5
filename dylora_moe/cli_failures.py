"""What a command that fails late still shows: nothing that was computed is lost with what came after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from dylora_moe.cli_progress import is_main_process
from dylora_moe.hub_export.errors import DyloraMoeError, FailureError, InputError, one_line


class LateFailures:
    """What could not be done with results that are there, kept until these are printed."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._errors: list[Exception] = []
        self._said: list[str] = []

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Keep an error of this block; `what` says what it leaves undone."""
        try:
            yield
        except Exception as error:  # drawing and the SDK of W&B fail in many ways
            self._errors.append(error)
            self._said.append(f"{what} ({_said(error)})")

    def tell(self) -> None:
        """Raise FailureError for what was kept, and say that the results are there."""
        if self._errors:
            raise FailureError(_kept("; ".join(self._said), "results", self._folder)) from self._errors[0]


@contextmanager
def scores_are_shown(folder: Path, console: Console) -> Iterator[None]:
    """Where the block fails after it scored runs of a folder, print their table.

    Raises:
        FailureError: it did; says what failed, and that the scores are kept.
    """
    before = _scored(folder)
    try:
        yield
    except Exception as error:
        scored = {samples for samples, _ in _scored(folder) - before}
        if not scored or not is_main_process():
            raise
        from dylora_moe.eval.report.tables import scores
        from dylora_moe.eval.sampling.run_record import read_runs

        runs = read_runs(folder)
        scores([run for run in runs if run.samples in scored], runs).print(console)
        raise FailureError(_kept(_said(error), "scores", folder)) from error


def _scored(folder: Path) -> set[tuple[str, str | None]]:
    """Name every scored run of a folder by its samples, with the hash of its results."""
    from dylora_moe.eval.sampling.run_record import read_runs

    with suppress(InputError):  # which the command itself says
        return {(run.samples, run.results_sha256) for run in read_runs(folder) if run.has_results}
    return set()


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, DyloraMoeError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error, 600)}"


def _kept(said: str, what: str, folder: Path | None) -> str:
    return f"{said}; the {what} are kept in {folder}, and the same command takes them from there"


__all__ = ["LateFailures", "scores_are_shown"]
