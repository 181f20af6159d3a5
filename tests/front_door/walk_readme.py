"""Follow the README in a fresh clone, against a Hub on the loopback address, and say how long each path took.

    make walk        or  python tests/front_door/walk_readme.py FOLDER

The sections on GPUs are followed as well, as far as this machine goes. Clones this repository's last commit into FOLDER,
where `make demo` installs what it needs. A FOLDER that is a clone already is used as it is.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_readme import ROOT, follow, for_organization, paths, section
from hub_server import Hub


def main(folder: Path) -> None:
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    started = time.monotonic()
    subprocess.run(["make", "demo"], cwd=folder, check=True)
    seconds = {"make demo": time.monotonic() - started}
    docs = ROOT / "docs"
    wanted = paths()
    wanted["On a GPU"] = section(docs / "performance.md", "On a GPU")
    # "Without a GPU, add --multi_gpu", the page says.
    several = "--num_processes 2" if torch.cuda.is_available() else "--num_processes 2 --multi_gpu"
    wanted["Several GPUs or machines"] = [
        (language, text.replace("--num_processes 8", several))
        for language, text in section(docs / "evaluation.md", "Several GPUs or machines")
    ]
    with Hub() as hub:
        environment = {
            **os.environ,
            **hub.environment(folder / ".home", "hf_write"),
            "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",  # as `source .venv/bin/activate` does
            "DYLORA_MOE_CACHE": str(folder / ".home" / "exports"),
        }
        seconds |= follow(for_organization(wanted, "guild"), folder, environment)
        published = {name: sorted(repo.branches["main"].files) for name, repo in hub.repos.items()}
    for name, files in published.items():
        print(f"on the Hub: {name}, {len(files)} files")
    for title, value in seconds.items():
        print(f"{value:7.1f} s  {title}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
