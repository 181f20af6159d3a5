"""An export that is killed leaves nothing, the old repo or a whole new one, and the next run cleans up after
it.

One process imports everything and forks for each run: at moments spread over the whole run, half of them in
time and half of them at its calls that change the file system, the run is killed.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest
from helpers_checkpoints import snapshot
from helpers_slow import slow_but


# asks for {"arguments", "after": seconds or null, "at": number of a call or null}; answers {"status",
# "calls", "seconds"}
RUNNER = r"""
import json, os, signal, sys, time, traceback
import peft, torch, transformers.models.llama.modeling_llama
from dylora_moe import cli, hub_export
from dylora_moe.hub_export import export
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from dylora_moe.modeling import DyloraMoeForCausalLM

try:
    cli.main(["export", "nowhere", "-o", "nothing"])  # imports what only a command needs
except SystemExit:
    pass

CHANGES = {"os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.chmod", "os.symlink", "os.link", "ctypes.dlsym"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def run(request):
    calls = [0]
    def count(event, details):
        if event in CHANGES or (event == "open" and details[2] & WRITES):
            calls[0] += 1
            if calls[0] == request["at"]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.addaudithook(count)
    try:
        cli.main(request["arguments"])
    except SystemExit as end:
        os.write(report, str(calls[0]).encode())
        os._exit(end.code)

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    reading, report = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            run(request)
        finally:
            os._exit(99)
    os.close(report)
    if request["after"] is not None:
        time.sleep(request["after"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    seconds = time.monotonic() - started
    calls = int(os.read(reading, 100) or 0)
    os.close(reading)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), "calls": calls, "seconds": seconds}), flush=True)
"""

KILLED = -9


@pytest.fixture(scope="module")
def run():
    """Runs a command in a forked process, to its end or until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"

        def ask(*arguments, after: float | None = None, at: int | None = None) -> dict:
            request = {"arguments": [str(argument) for argument in arguments], "after": after, "at": at}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs fork, and the exchange of two folders is Linux's"
)
@pytest.mark.parametrize("layout", slow_but("adapter", of=["full", "adapter"]))
@pytest.mark.parametrize("overwrite", slow_but(True, of=[False, True]))
@pytest.mark.parametrize("part", slow_but("late", of=["early", "late"]))
def test_killed_at_any_moment(run, checkpoint, tmp_path, layout, overwrite, part):
    """Six moments for each layout, with and without an old repo, of which half are late. The check against the source
    is left out, which writes nothing beside the repo and takes seconds; one moment of it is below."""
    chance = random.Random(f"{layout} {overwrite} {part}")
    old, output = tmp_path / "old", tmp_path / "place" / "repo"
    command = ["export", checkpoint, "--layout", layout, "--no_verify", "--overwrite"]
    first = run(*command, "-o", old, "--routing_strategy", "uniform")
    (old / "added_tokens.json").write_text("{}")  # so that a mixture of old and new would show
    whole = run(*command, "-o", output)
    new, before = snapshot(output), snapshot(old) if overwrite else {}
    assert first["status"] == whole["status"] == 0 and whole["calls"] > 30 and new != before
    seconds = min(first["seconds"], whole["seconds"])
    is_late = part == "late"
    moments = [{"after": seconds * (is_late + chance.random()) / 2}]
    # calls in thirds, the last of which publishes the folder
    thirds = (2,) if is_late else (0, 1)
    moments += [{"at": 1 + int(whole["calls"] * (third + chance.random()) / 3)} for third in thirds]
    moments += [{"at": whole["calls"] - chance.randrange(6)}] if is_late else []
    killed = 0
    for moment in moments:
        shutil.rmtree(output.parent)
        if overwrite:
            shutil.copytree(old, output)
        found = run(*command, "-o", output, **moment)
        assert found["status"] == KILLED or "after" in moment, found
        killed += found["status"] == KILLED
        left = snapshot(output) if output.exists() else {}
        assert left in (before, new), moment
        assert run(*command, "-o", output)["status"] == 0
        assert snapshot(output) == new
        assert [path.name for path in output.parent.iterdir()] == ["repo"]
    assert killed >= 2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork")
def test_killed_while_the_repo_is_checked(run, checkpoint, tmp_path):
    output = tmp_path / "repo"
    unchecked = run("export", checkpoint, "-o", tmp_path / "unchecked", "--no_verify")["seconds"]
    assert run("export", checkpoint, "-o", output, after=unchecked + 1)["status"] == KILLED
    assert not output.exists() and len(list(tmp_path.iterdir())) == 2
    assert run("export", checkpoint, "-o", output, "--no_verify")["status"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo", "unchecked"]
