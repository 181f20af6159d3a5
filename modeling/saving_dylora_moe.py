"""Saving a live model: both layouts with the code beside the weights, the Hub, PEFT folders, an expert
merged.

Knows what makes a folder complete. Knows nothing about how tensors lie in files: that is
`layouts_dylora_moe`.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import logging

from .configuration_dylora_moe import REQUIRED_TRANSFORMERS, WEIGHTS_LAYOUTS
from .layouts_dylora_moe import merge_expert, save_adapters, save_router


logger = logging.get_logger(__name__)

CHECKSUMS = "SHA256SUMS"
AUTO_MAP = {
    "AutoConfig": "configuration_dylora_moe.DyloraMoeConfig",
    "AutoModel": "modeling_dylora_moe.DyloraMoeModel",
    "AutoModelForCausalLM": "modeling_dylora_moe.DyloraMoeForCausalLM",
}

REQUIREMENTS = ("torch>=2.7", f"transformers>={REQUIRED_TRANSFORMERS}")
GENERATED_REQUIREMENT = re.compile(r"(torch|transformers)>=[\d.]+")


class SavingMixin:
    """What writes a routed model to a folder or to the Hub."""

    _layout = "full"  # what is written where nobody says: `PreTrainedModel.push_to_hub` saves without saying

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        layout: str | None = None,
        **kwargs,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the code beside the weights: what it writes loads
        anywhere.

        Args:
            layout: `"full"`, everything, or `"adapter"`, the experts and the router alone, with the
                foundation taken from `config.base_model_name_or_path` on loading. `"full"`, if left out,
                whatever the model was loaded from: a checkpoint of layout `adapter` is no checkpoint that the
                Trainer can go back to.

        Raises:
            ValueError: layout `adapter` of a model whose embeddings were resized, whose foundation an adapter
                was merged into, or whose config names no foundation, or, with `push_to_hub`, one on this
                machine alone.
        """
        directory = Path(save_directory)
        layouts = self.config.rank_layouts()
        computed = {name: layer.layout for name, layer in self.expert_layers().items()}
        for name in {**computed, **layouts}:
            if computed.get(name) != layouts.get(name):
                raise ValueError(
                    f"`config.expert_configs` was changed on a live model: layer {name!r} computes with ranks and "
                    f"scales {computed.get(name, 'of no expert')}, and the config says {layouts.get(name, 'none')}."
                )
        names = ("repo_id", "commit_message", "create_pr", "private")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        self.config.auto_map = dict(AUTO_MAP)
        with self._in_layout(layout):
            self._check_foundation(on_hub=push_to_hub)
            directory.mkdir(parents=True, exist_ok=True)
            before = self._get_files_timestamps(directory) if push_to_hub and is_main_process else {}
            if is_main_process:
                save_code(directory)
                (directory / CHECKSUMS).unlink(missing_ok=True)  # of the files that are now replaced
            if self.config.weights_layout == "full":
                super().save_pretrained(directory, is_main_process, state_dict, False, *args, **kwargs)
                if is_main_process and not self.can_generate() and self.generation_config is not None:
                    self.generation_config.save_pretrained(
                        directory
                    )  # the strategy is in it, for every model
            elif is_main_process:
                self._save_adapter_layout(directory, state_dict)
        if push_to_hub and is_main_process:
            self._upload_saved(directory, before, token=kwargs.get("token"), **hub_arguments)

    def push_to_hub(self, repo_id: str, *args, layout: str | None = None, **kwargs):
        """As `PreTrainedModel.push_to_hub`; `layout` and errors as in `save_pretrained`."""
        with self._in_layout(layout):
            self._check_foundation(on_hub=True)
            return super().push_to_hub(repo_id, *args, **kwargs)

    def save_adapters(self, save_directory: str | Path) -> list[Path]:
        """Every expert as a plain PEFT folder `<save_directory>/<name>`, bit for bit; see
        `layouts_dylora_moe`."""
        return save_adapters(self, save_directory)

    def merge_expert(self, expert: int | str) -> PreTrainedModel:
        """One expert folded into a copy of the foundation: an ordinary model, without a line of code of
        ours."""
        return merge_expert(self, expert)

    @contextmanager
    def _in_layout(self, layout: str | None) -> Iterator[None]:
        layout = layout or self._layout
        if layout not in WEIGHTS_LAYOUTS:
            raise ValueError(f"There is no layout {layout!r}: choose 'full' or 'adapter'.")
        before = self.config.weights_layout, self._layout
        self.config.weights_layout = self._layout = layout
        try:
            yield
        finally:
            self.config.weights_layout, self._layout = before

    def _check_foundation(self, on_hub: bool) -> None:
        """Without its foundation a repo of layout `adapter` is of no use."""
        foundation = self.config.base_model_name_or_path
        if self.config.weights_layout != "adapter":
            return
        if foundation is None:
            raise ValueError(
                "Layout `adapter` leaves the foundation where it is, and `config.base_model_name_or_path` does not say "
                "where that is: set it, or choose layout='full'."
            )
        if self._is_resized:
            raise ValueError(
                f"The embeddings were resized, and the foundation at {foundation!r} has others: choose layout='full'."
            )
        layers, merged_now = (
            self.expert_layers().values(),
            (getattr(m, "merged", False) for m in self.modules()),
        )
        if any(layer.has_merged_adapter for layer in layers) or any(merged_now):
            raise ValueError(
                f"An adapter was merged into the foundation, and the one at {foundation!r} is without it: choose "
                "layout='full'."
            )
        if on_hub and Path(foundation).exists():
            raise ValueError(
                f"`config.base_model_name_or_path` is {foundation!r}, a folder of this machine, which nobody else can "
                "load: set it to the foundation's id on the Hub, or choose layout='full'."
            )

    def _save_adapter_layout(self, directory: Path, state_dict: dict | None) -> None:
        if any(p.requires_grad for n, p in self.foundation.named_parameters() if ".lora_" not in n):
            logger.warning(
                "Layout `adapter` does not save the foundation, and some of its parameters are trainable."
            )
        save_adapters(self, directory / "experts", state_dict)
        save_router(self, directory, state_dict)
        config = deepcopy(self.config)
        config.architectures = [type(self).__name__]
        vars(config).pop("quantization_config", None)  # of the foundation, which is not saved here
        config.save_pretrained(directory)
        if getattr(self, "generation_config", None) is not None:
            self.generation_config.save_pretrained(directory)

    def _upload_saved(
        self, directory: Path, before: dict, repo_id=None, private=None, token=None, **of_commit
    ):
        repo = HfApi(token=token).create_repo(repo_id or directory.name, private=private, exist_ok=True)
        self._upload_modified_files(directory, repo.repo_id, before, token=token, **of_commit)

    # transformers' own of these two look one folder deep, and experts lie two deep.

    def _get_files_timestamps(self, working_dir: str | Path) -> dict[str, float]:
        files = (file for file in Path(working_dir).rglob("*") if file.is_file())
        return {file.relative_to(working_dir).as_posix(): file.stat().st_mtime for file in files}

    def _upload_modified_files(
        self, working_dir, repo_id, files_timestamps, commit_message=None, token=None, revision=None, **kwargs
    ):
        hub = HfApi(token=token)
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        times = self._get_files_timestamps(working_dir).items()
        modified = [file for file, time in times if time > files_timestamps.get(file, float("-inf"))]
        operations = [CommitOperationAdd(file, Path(working_dir) / file) for file in sorted(modified)]
        if CHECKSUMS not in modified and hub.file_exists(repo_id, CHECKSUMS, revision=revision):
            operations.append(
                CommitOperationDelete(CHECKSUMS)
            )  # an export's, of the files that are now replaced
        message = commit_message or "Upload model"
        return hub.create_commit(repo_id, operations, commit_message=message, revision=revision, **kwargs)


def save_code(directory: str | Path) -> None:
    """Copy the files of this folder, and say in `requirements.txt` what they need, so that `directory` loads
    anywhere."""
    target, files = Path(directory), list(Path(__file__).parent.glob("*.py"))
    # transformers puts an empty `__init__.py` into its cache of code, where the repo's own is not copied to
    files = [file for file in files if file.name != "__init__.py" or file.stat().st_size > 0]
    for file in files if target.resolve() != Path(__file__).parent.resolve() else ():
        shutil.copyfile(file, target / file.name)
        for name in set(get_relative_imports(file)) - {other.stem for other in files}:
            (target / f"{name}.py").write_text("")  # left out; the Hub's loader wants all that is imported
    write_requirements(target)


def write_requirements(directory: Path) -> None:
    """Write `requirements.txt`: what the code needs, then the lines that a person added to such a file."""
    path = directory / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    added = [line for line in lines if not GENERATED_REQUIREMENT.fullmatch(line.strip())]
    path.write_text("\n".join([*REQUIREMENTS, *added]) + "\n", encoding="utf-8")


__all__ = ["AUTO_MAP", "REQUIREMENTS", "SavingMixin", "save_code"]
