"""DyLoRA-MoE: mixtures of LoRA experts as Hugging Face models.

The command line and the demo. Read `cli` first: one function for each command, which calls `hub_export` or,
in `cli_eval`, `eval`. Nothing heavy is imported here: `import dylora_moe.modeling` needs neither peft nor
evalplus.
"""

from pathlib import Path

from .version import __version__


_CLONE = Path(__file__).parents[1]
if (_CLONE / "pyproject.toml").is_file() and (_CLONE / "modeling").is_dir():
    # In a clone the packages lie beside this folder, not inside it. Python prefers the folder where it is
    # started to an installed package, so without this `dylora_moe.eval` would not be found from the clone's
    # root.
    __path__.append(str(_CLONE))

__all__ = ["__version__"]
