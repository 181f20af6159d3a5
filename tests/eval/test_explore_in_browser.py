"""The page served on the loopback address and opened in Chromium: what is typed, chosen and stopped there."""

import json
import socket
import time

import pytest
import torch
from helpers_browser import CHROMIUM, SECONDS, Browser


pytest.importorskip("gradio", reason="the page is optional")

from dylora_moe.eval.explore.serving import serve_page


pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)

PROMPT = "def add(a, b): <script>document.title = 'broken'</script> ${1 + 1} {{2}}"
TEXT = "document.querySelector('#dm-{} .dm-code').textContent"
NOTE = "[...document.querySelectorAll('#dm-{} .dm-note')].map((note) => note.textContent).join()"


@pytest.fixture(scope="module")
def own_machine_alone():
    """This process asks for no name but its own machine's, and connects to nothing else."""
    asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

    def connecting(self, address):
        asked.append(address[0])
        return connect(self, address)

    def looking_up(host, *arguments, **named):
        asked.append(host)
        return look_up(host, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", looking_up)
        yield
    assert asked and set(asked) <= {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="module")
def served(repo, own_machine_alone):
    """With a gate under which every expert has tokens."""
    page = serve_page(repo, dtype="float32")
    gate = page.model.router.gate
    with torch.no_grad():
        gate.weight.mul_(50)
        ids = page.tokenizer(PROMPT + expected((page.model, page.tokenizer), "base"), return_tensors="pt")
        logits = page.model(**ids, routing_strategy="router", output_router_logits=True).router_logits[0]
        gate.bias -= logits[-15:].median(dim=0).values
    yield page
    page.close()


@pytest.fixture(scope="module")
def model(served):
    """The one on the page, which nothing else may use meanwhile."""
    return served.model, served.tokenizer


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile") / "chromium") as browser:
        yield browser


def wait(page, expression: str):
    end = time.monotonic() + SECONDS
    while not (found := page.evaluate(expression)):
        assert time.monotonic() < end, f"never so: {expression}; {page.complaints()}"
        time.sleep(0.05)
    return found


def click(page, selector: str) -> None:
    wait(page, f"!!document.querySelector({json.dumps(selector)})")
    page.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def choose(page, name: str, value: str) -> None:
    """Open a dropdown, and press the mouse on one of its options."""
    field = f"document.querySelector('#dm-{name} input')"
    wait(page, f"!!{field}")
    page.evaluate(f"{field}.focus()")
    options = f"document.getElementById({field}.getAttribute('aria-controls'))"
    option = f"{options}?.querySelector('li[aria-label={json.dumps(value)}]')"
    wait(page, f"!!{option}")
    page.evaluate(
        f"{option}.dispatchEvent(new MouseEvent('mousedown', {{ bubbles: true, cancelable: true }}))"
    )
    wait(page, f"{field}.value == {json.dumps(value)}")


@pytest.fixture
def page(browser, served):
    browser.open(served.address)
    wait(browser, "!!document.querySelector('#dm-run') && !!document.querySelector('#dm-prompt textarea')")
    yield browser
    assert [place for place in browser.requests() if not place.startswith((served.address, "data:"))] == []
    assert browser.complaints() == [] and browser.evaluate("document.title") == "repo"


def ask(page, prompt: str = PROMPT) -> None:
    page.evaluate("document.querySelector('#dm-prompt textarea').focus()")
    page.call("Input.insertText", text=prompt)
    click(page, "#dm-run")


def expected(model, strategy: str) -> str:
    model, tokenizer = model
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, routing_strategy=strategy, do_sample=False, max_new_tokens=128)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_prompt_is_completed_under_the_routers_weights_and_the_base_model(page, model):
    ask(page)
    wait(page, f"{NOTE.format('right')}.includes('ended by the model')")
    texts = [page.evaluate(TEXT.format(side)) for side in ("left", "right")]
    assert texts == [expected(model, "router"), expected(model, "base")] and texts[0] != texts[1]
    tokens = page.evaluate("[...document.querySelectorAll('#dm-left .dm-token')].map((t) => t.className)")
    assert len(set(tokens)) > 1 and not page.evaluate("document.querySelector('#dm-right .dm-token')")
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('.dm-token')].map((token) =>"
        " getComputedStyle(token).textDecorationColor.split('/')[0]))]"
    )
    assert len(colours) >= len(set(tokens))


def test_two_strategies_and_an_expert_are_chosen(page, model):
    choose(page, "left-strategy", "single")
    choose(page, "left-expert", "2 expert_2")
    choose(page, "right-strategy", "uniform")
    ask(page)
    wait(page, f"{NOTE.format('right')}.includes('ended by the model')")
    texts = [page.evaluate(TEXT.format(side)) for side in ("left", "right")]
    assert texts == [expected(model, "single:2"), expected(model, "uniform")]
    assert page.evaluate("document.querySelector('#dm-left .dm-chip').textContent") == "2 expert_2 100%"


def test_an_error_is_shown_as_text(page):
    click(page, "#dm-run")
    assert "type a prompt first" in wait(page, "document.querySelector('.toast-body')?.innerText")


@pytest.fixture
def slow(served):
    """A model that takes a while for every token, so that there is time to press a button."""
    hook = served.model.register_forward_pre_hook(lambda *_: time.sleep(0.15))
    yield hook
    hook.remove()


def test_stop_ends_the_text_and_leaves_what_is_there(page, model, slow):
    ask(page)
    wait(page, f"{NOTE.format('left')}.includes('writing')")
    click(page, "#dm-stop")
    wait(page, f"{NOTE.format('left')}.includes('stopped')")
    slow.remove()
    text, whole = page.evaluate(TEXT.format("left")), expected(model, "router")
    assert text and whole.startswith(text) and text != whole
    assert not page.evaluate("document.querySelector('#dm-right .dm-side')")


def test_a_page_that_is_left_does_not_hold_up_the_next(page, served, slow):
    ask(page)
    wait(page, f"{NOTE.format('left')}.includes('writing')")
    page.open(served.address)
    wait(page, "!!document.querySelector('#dm-run') && !!document.querySelector('#dm-prompt textarea')")
    page.events.clear()  # the browser's own, of a stream that it broke off
    ask(page)
    wait(page, f"{NOTE.format('left')}.includes('writing')")
    click(page, "#dm-stop")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone_and_axe_finds_nothing_wrong(page, theme):
    page.emulate(prefers_color_scheme=theme)
    page.resize(390)
    page.open(page.evaluate("location.href"))
    wait(page, "!!document.querySelector('#dm-run') && !!document.querySelector('#dm-prompt textarea')")
    ask(page)
    wait(page, f"{NOTE.format('right')}.includes('ended by the model')")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.violations() == []
    ink = page.evaluate("getComputedStyle(document.querySelector('.dm-side')).color")
    assert ink == {"light": "rgb(26, 28, 31)", "dark": "rgb(236, 238, 241)"}[theme]
