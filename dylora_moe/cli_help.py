"""How `--help` looks: options in groups, a line for each routing strategy, an example, and no word cut in two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dylora_moe.hub_export.repo.choices import STRATEGIES
from dylora_moe.hub_export.shown_text import NO_BREAK, wrapped


OTHERS = "General"
# In the order in which they are shown. An option of any command is looked up here by its name, unless it says a
# group itself (`rich_help_panel`).
GROUPS = {
    "Model": (
        "model wandb_artifact adapter_path against expert base_model base_revision revision subfolder expert_names "
        "lora_alpha subtract tokenizer backend dtype device_map tensor_parallel_size attn_implementation "
        "trust_remote_code"
    ),
    "Strategy and router": (
        "routing_strategy router_mode router_input router router_prompts num_experts_per_tok router_temperature "
        "router_aux_loss_coef"
    ),
    "Texts": "texts old_texts reservoir reservoir_size novelty force validation max_texts max_length",
    "Training": (
        "expert_name r objective targets init learning_rate weight_decay warmup_ratio lr_scheduler_type epochs "
        "num_train_epochs max_steps per_device_train_batch_size batch_tokens patience mixed_precision"
    ),
    "Sampling": (
        "benchmarks id_range limit mini n_samples temperature greedy seed batch_size max_new_tokens force_base_prompt"
    ),
    "Scoring": "base_only parallel sandbox",
    "Output": (
        "output_dir space port share layout max_shard_size results private aliases wandb_project record_format "
        "overwrite no_verify as_json"
    ),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
LONGEST_NAME = 30  # with its value; the help of a longer one begins in the next line


class Formatter(typer.Context.formatter_class):
    """Wraps at spaces: neither a long word nor one with a hyphen or two is cut."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        start = f"{prefix or 'Usage: '}{prog} "
        self.write("\n".join(wrapped(args, self.width, start, " " * len(start))) + "\n")

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        paragraphs = text.split("\n\n")
        self.write("\n\n".join("\n".join(wrapped(part, self.width, indent, indent)) for part in paragraphs))
        self.write("\n")

    def write_dl(self, rows: Any, col_max: int = LONGEST_NAME, col_spacing: int = 2) -> None:
        rows = list(rows)
        self.write_columns(rows, min(max(len(first) for first, _ in rows), col_max) + col_spacing)

    def write_columns(self, rows: list[tuple[str, str]], width: int) -> None:
        """Write names, and what they mean in a column that begins `width` behind them."""
        margin = " " * self.current_indent
        for first, second in rows:
            lines = wrapped(second, self.width - len(margin) - width) or [""]
            if len(first) > width - 2:
                self.write(f"{margin}{first}\n")
                first = ""
            for line in lines:
                self.write(f"{margin}{first:<{width}}{line}".rstrip() + "\n")
                first = ""


class Context(typer.Context):
    """A context whose help is wrapped between words alone."""

    formatter_class = Formatter


class Command(TyperCommand):
    """A command whose help shows its options in groups. Its epilog is an example, printed as it is written."""

    context_class = Context

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the whole summary: the list of commands wraps it, and cuts nothing off."""
        return self.help or ""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        sections |= {name: [] for name in (*GROUPS, OTHERS)}
        for param in sorted(self.get_params(ctx), key=_place):
            is_argument = param.param_type_name == "argument"
            record = param.get_help_record(ctx)
            if record is not None:
                sections["Arguments" if is_argument else group_of(param)].append(_readable(record))
        if any(param.name == "routing_strategy" for param in self.params):
            sections["Routing strategies"] = list(STRATEGIES.items())
        _write_sections(formatter, sections)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_example(formatter, self.epilog)


class Group(TyperGroup):
    """A group of commands, whose summaries are shown whole."""

    context_class = Context

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the whole summary."""
        return self.help or ""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command; `fit_router` is `fit-router`, as with options."""
        return super().get_command(ctx, cmd_name.replace("_", "-"))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the help where no command is named."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_example(formatter, self.epilog)


def command(app: typer.Typer, name: str | None = None, *, example: str) -> Callable[[Callable], Callable]:
    """Return the decorator that registers a function as a command, with an example in its help."""
    return app.command(name, cls=Command, epilog=example)


def group_of(param: Any) -> str:
    """Return the group that an option is shown in."""
    return param.rich_help_panel or GROUP_OF.get(param.name, OTHERS)


def _place(param: Any) -> int:
    """Return where in its group an option stands."""
    return list(GROUP_OF).index(param.name) if param.name in GROUP_OF else len(GROUP_OF)


def _readable(record: tuple[str, str]) -> tuple[str, str]:
    name, text = record
    text = " ".join(text.split()).replace("default: ", f"default:{NO_BREAK}")
    return name.replace("<list[str]>", "<str>..."), text


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    """Write the sections that hold something, with the texts of all in one column."""
    names = [len(first) for rows in sections.values() for first, _ in rows]
    width = max((length for length in names if length <= LONGEST_NAME), default=0) + 2
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_columns(rows, width)


def _write_example(formatter: Any, example: str | None) -> None:
    if example:
        with formatter.section("Example"):
            formatter.write(f"{' ' * formatter.current_indent}{example}\n")


__all__ = ["GROUPS", "OTHERS", "Command", "Group", "command", "group_of"]
