"""Commands that run in this process, for tests of what they say and how they end."""

import contextlib
import io
from pathlib import Path

from helpers_checkpoints import snapshot

from dylora_moe import cli


# Options of Python that start a program in two processes. The flag for several is named after GPUs; there are none.
IN_TWO_PROCESSES = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def run(*arguments, errors_alone: bool = False) -> tuple[int, str]:
    """Run a command in this process; its exit code and all that it says, or what it says on stderr."""
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO() if errors_alone else said),
    ):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code, said.getvalue()
    raise AssertionError("a command ends with an exit code")


def refused(folder: Path, source: Path, *options, expected: str = "") -> str:
    """`export` to `folder` ends with one line and exit code 2, and leaves nothing; what it said."""
    before = snapshot(folder)
    code, said = run("export", source, "-o", folder / "out", "--no_verify", *options)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert snapshot(folder) == before and expected in lines[0], said
    return lines[0]
