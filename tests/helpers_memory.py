"""How much an export's memory peaks above what its imports take, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path


# VmHWM and not `resource`, whose ru_maxrss starts at the peak of the process that started this one.
SCRIPT = """
import sys
from pathlib import Path
from dylora_moe.hub_export import export
import transformers, dylora_moe.modeling.modeling_dylora_moe
source, foundation, output, layout, module = sys.argv[1:]
__import__(f"transformers.models.{module}.modeling_{module}")
transformers.AutoTokenizer.from_pretrained(foundation)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

before = peak()
export(source, output, verify=False, layout=layout, max_shard_size="100MB")
print(peak() - before)
"""


def rise_of_peak_memory(source: Path, foundation: Path, output: Path, layout: str, module: str) -> int:
    """Bytes, for an export in shards of 100 MB. `module` is the foundation's folder in
    `transformers.models`."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(foundation), str(output), layout, module]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
