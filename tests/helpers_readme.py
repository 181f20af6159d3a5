"""The README's four paths as one shell runs them, block by block, as a reader who follows the text."""

import re
import shlex
import subprocess
from pathlib import Path


ROOT = Path(__file__).parents[1]
PROMPTS = "prompts.yaml"
TIMES = "times.tsv"


def paths() -> dict[str, list[tuple[str, str]]]:
    """Each path's blocks by its heading: (language, text)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = text.partition("## Four paths")[2].partition("\n## ")[0].split("\n### ")[1:]
    return {section.partition("\n")[0]: blocks(section) for section in sections}


def blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of a page or a part of it: (language, text)."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def for_organization(wanted: dict[str, list[tuple[str, str]]], name: str) -> dict[str, list[tuple[str, str]]]:
    """Put an organization that the tests' Hub knows in the place of the reader's own."""
    return {
        title: [(language, text.replace("my-org", name)) for language, text in texts]
        for title, texts in wanted.items()
    }


def section(page: Path, heading: str) -> list[tuple[str, str]]:
    """The blocks of one section of a page."""
    return blocks(page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0])


def follow(
    wanted: dict[str, list[tuple[str, str]]], folder: Path, environment: dict[str, str]
) -> dict[str, float]:
    """Run every block in one shell, which stops at the first error; return the seconds that each path took.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    lines = ["set -e"]
    for title, texts in wanted.items():
        lines.append("started=$(date +%s.%N)")
        for language, text in texts:
            if language == "yaml":
                text = f"cat > {PROMPTS} <<'END_OF_BLOCK'\n{text}END_OF_BLOCK"
            if language == "python":
                text = f"python - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK"
            lines.append(text)
        lines.append(f'printf "%s\\t%s\\t%s\\n" "$started" "$(date +%s.%N)" {shlex.quote(title)} >> {TIMES}')
    (folder / TIMES).unlink(missing_ok=True)
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, env=environment, check=True)
    rows = [line.split("\t") for line in (folder / TIMES).read_text(encoding="utf-8").splitlines()]
    return {title: float(end) - float(start) for start, end, title in rows}
