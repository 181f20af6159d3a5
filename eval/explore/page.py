"""The page: Gradio's components around `write_sides`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from .shown import style
from .sides import Asked, write_sides
from .strategies import SINGLE, offered, spelled, split


NOTHING = "nothing"  # a side that stays empty
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
FONT_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
HOW_TO_READ = (
    "Every token has the colour and the line of the expert that leads where it was predicted, stronger where "
    "the router is surer; a small number says where the expert changes."
)


def build_page(model: Any, tokenizer: Any, label: str) -> gr.Blocks:
    """Lay out the page.

    Args:
        model: a `DyloraMoeForCausalLM` in evaluation mode.
        label: what the page calls it.
    """
    config = model.config
    default = str(model.routing_strategy())
    stops: dict[str, threading.Event] = {}  # by the browser's session
    with gr.Blocks(title=label, analytics_enabled=False) as page:
        gr.HTML(_heading(label, model), elem_classes="dm", js_on_load=None, apply_default_css=False)
        prompt = gr.Textbox(label="Prompt", lines=4, max_lines=20, elem_id="dm-prompt")
        with gr.Row():
            run = gr.Button("Run", variant="primary", elem_id="dm-run", scale=3, min_width=120)
            stop = gr.Button("Stop", elem_id="dm-stop", scale=1, min_width=90)
        with gr.Accordion("Options", open=False):
            with gr.Row():
                max_new_tokens = gr.Slider(1, 2048, 128, step=1, label="New tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            has_template = tokenizer.chat_template is not None
            chat = gr.Checkbox(has_template, label="Prompt in the chat template", interactive=has_template)
        with gr.Row(equal_height=False):
            left, right = (
                _side(config, *chosen, name)
                for chosen, name in (((default, False), "left"), (("base", True), "right"))
            )
        options = [prompt, chat, max_new_tokens, temperature, seed, *left[:2], *right[:2]]

        def write(
            request: gr.Request, prompt, chat, max_new_tokens, temperature, seed, *choices
        ) -> Iterator[list[str]]:
            strategies = tuple(
                None if name == NOTHING else spelled(name, expert or 0)
                for name, expert in zip(choices[::2], choices[1::2], strict=True)
            )
            asked = Asked(prompt, strategies, chat, temperature, int(max_new_tokens), int(seed or 0))
            stops[request.session_hash] = stop_this = threading.Event()
            try:
                yield from write_sides(model, tokenizer, asked, stop_this)
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise gr.Error(escape(lines[0]), print_exception=False) from error

        def end(request: gr.Request) -> None:
            if request.session_hash in stops:
                stops[request.session_hash].set()

        def leave(request: gr.Request) -> None:
            if request.session_hash in stops:
                stops.pop(request.session_hash).set()

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on([run.click, prompt.submit], write, options, [left[2], right[2]], **quiet)
        stop.click(end, queue=False, **quiet)
        page.unload(leave)
    return page


def _heading(label: str, model: Any) -> str:
    config = model.config
    router = "a router in every layer" if config.has_router and model.router is None else "a router"
    router = router if config.has_router else "no router"
    dtype = str(model.dtype).removeprefix("torch.")
    facts = f"{config.num_experts} experts, {router}; {dtype} on {model.device.type}"
    return f'<div class="dm-heading"><h1>{escape(label)}</h1><p>{escape(facts)}</p><p>{HOW_TO_READ}</p></div>'


def _side(config: Any, strategy: str, may_be_empty: bool, name: str) -> tuple[Any, Any, Any]:
    """Lay out one side: the picker of a strategy, that of an expert where it takes one, and the completion."""
    chosen, expert = split(strategy)
    names = offered(config)
    with gr.Column(min_width=300):
        with gr.Row():
            strategies = [*names, NOTHING] if may_be_empty else names
            picker = gr.Dropdown(
                strategies, value=chosen, label="Strategy", elem_id=f"dm-{name}-strategy", min_width=130
            )
            experts = gr.Dropdown(
                [(f"{index} {expert}", index) for index, expert in enumerate(config.expert_names)],
                value=expert,
                label="Expert",
                visible=chosen == SINGLE,
                elem_id=f"dm-{name}-expert",
                min_width=130,
            )
        shown = gr.HTML(
            elem_id=f"dm-{name}", elem_classes="dm", js_on_load=None, apply_default_css=False, min_height=80
        )
    picker.change(
        lambda strategy: gr.Dropdown(visible=strategy == SINGLE),
        picker,
        experts,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return picker, experts, shown


def launch(page: gr.Blocks, *, port: int | None = None, host: str | None = None, share: bool = False) -> str:
    """Serve the page in threads of this process, and return its address.

    Args:
        port: the first free one from 7860 on, or what `GRADIO_SERVER_PORT` says, if left out.
        host: an address to listen on; 127.0.0.1, or what `GRADIO_SERVER_NAME` says, if left out.
        share: whether Gradio's servers pass on what strangers ask, at an address of theirs.
    """
    theme = gr.themes.Base(font=FONT, font_mono=FONT_MONO, primary_hue="blue").set(
        button_primary_background_fill="*primary_600",  # Gradio's own is too light below white text
        button_primary_background_fill_hover="*primary_700",
    )
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=style() + PAGE_RULES,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    return public or local


PAGE_RULES = """
.block.dm .html-container { padding: 0; }
.dm-heading h1 { font-size: 22px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.dm-heading p { margin: 2px 0; color: var(--muted); font-size: 14px; }
"""


__all__ = ["build_page", "launch"]
