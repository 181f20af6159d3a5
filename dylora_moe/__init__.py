"""DyLoRA-MoE: mixtures of LoRA experts as Hugging Face models.

The front door. It imports nothing heavy by itself: `import dylora_moe.modeling` needs neither peft nor
evalplus.
"""

from .version import __version__


__all__ = ["__version__"]
