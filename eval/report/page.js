// What moves in the report: the theme, wide tables, the filters, the heatmap of tasks and the panel of one task.
// All text from data is set as text, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 200; // rows that are shown at once

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Theme: what the system says, until the reader chooses.
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : window.matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// Tooltip: for everything with `data-tip`, under the pointer and under the keyboard's focus.
const tip = byId("tip");
function showTip(target, x, y) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, window.innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
}
const tipped = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
document.addEventListener("pointermove", (event) => {
  const target = tipped(event);
  if (target) showTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const target = tipped(event);
  if (!target || !target.matches(":focus-visible")) return;
  const box = target.getBoundingClientRect();
  showTip(target, box.left, box.bottom - 12);
});
document.addEventListener("focusout", () => (tip.hidden = true));
document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));

// A table that is wider than its place says so, and can be reached and scrolled by keys.
for (const box of document.querySelectorAll(".scroll, .list")) {
  const hint = element("p", { class: "hint" }, "Wider than its place: scroll sideways for more columns →");
  box.closest(".scroll, .tasks").before(hint);
  const sizes = new ResizeObserver(() => {
    const overflows = box.scrollWidth > box.clientWidth + 1;
    hint.hidden = !overflows;
    if (overflows) box.tabIndex = 0;
    else if (box.matches(".scroll")) box.removeAttribute("tabindex");
  });
  sizes.observe(box);
  sizes.observe(box.querySelector("table"));
}

// On paper everything is open.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const closed of opened) closed.open = true;
});
window.addEventListener("afterprint", () => {
  for (const closed of opened) closed.open = false;
});

if (data.routing) startTasks(data.routing);

function startTasks(routing) {
  const { experts, tasks } = routing;
  const panels = new Map(Object.entries(routing.panels)); // no name of a task is a name of the language
  const controls = Object.fromEntries(
    ["category", "expert", "verdict", "order", "search"].map((name) => [name, byId(`filter-${name}`)]),
  );
  const rows = byId("task-rows");
  const panel = byId("panel");
  let shown = [];
  let limit = PAGE;
  let current = null;
  let lit = null;

  const label = (index) => `${index} ${experts[index]}`;
  // What is not seen, or turns the text around, by its number.
  const spelt = (text) =>
    JSON.stringify(text).replace(/\p{Cf}/gu, (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);
  const percent = (share) => `${Math.round(100 * share)}%`;
  const verdict = (passed) => {
    if (passed === null) return "not scored";
    if (passed === 1) return "solves it";
    return passed === 0 ? "fails" : `solves it in ${percent(passed)} of its samples`;
  };

  const VERDICTS = {
    "": () => true,
    solved: (task) => task.passed > 0,
    failed: (task) => task.passed === 0,
    missed: (task) => task.passed === 0 && task.experts_passed !== null && Math.max(...task.experts_passed) > 0,
    rescued: (task) => task.passed > 0 && task.experts_passed !== null && Math.max(...task.experts_passed) === 0,
    misled: (task) =>
      task.experts_passed !== null &&
      task.chosen !== null &&
      task.experts_passed[task.chosen] < Math.max(...task.experts_passed),
  };
  const ORDERS = {
    "": () => 0,
    unsure: (a, b) => (a.gate_confidence ?? 2) - (b.gate_confidence ?? 2),
    sure: (a, b) => (b.gate_confidence ?? -1) - (a.gate_confidence ?? -1),
    switches: (a, b) => (b.switches ?? -1) - (a.switches ?? -1),
  };

  function filter() {
    const words = controls.search.value.trim().toLowerCase();
    const passes = VERDICTS[controls.verdict ? controls.verdict.value : ""];
    shown = tasks.filter(
      (task) =>
        (controls.category.value === "" || task.categories.includes(Number(controls.category.value))) &&
        (controls.expert.value === "" || task.chosen === Number(controls.expert.value)) &&
        passes(task) &&
        task.id.toLowerCase().includes(words),
    );
    shown.sort(ORDERS[controls.order.value]);
    limit = PAGE;
    draw();
    // The panel is of a task that the filters leave, with its neighbours among these.
    if (shown.length === 0) close();
    else select(shown.includes(current) ? current : shown[0]);
  }

  function draw() {
    rows.replaceChildren(...shown.slice(0, limit).map(row));
    const cells = rows.querySelectorAll("td[data-tip]");
    if (cells.length) cells[0].tabIndex = 0;
    byId("count").textContent = `${shown.length} of ${tasks.length} tasks`;
    byId("more").hidden = shown.length <= limit;
    byId("more").textContent = `Show more (${shown.length - limit} left)`;
  }

  function row(task) {
    const open = element("a", { class: "link", href: address(task) }, task.id);
    open.addEventListener("click", () => choose(task, true));
    const made = element("tr", { class: task === current ? "current" : "" }, element("th", { scope: "row" }, open));
    made.dataset.task = task.id;
    experts.forEach((_, index) => made.append(cell(task, index)));
    const sure = task.gate_confidence === null ? "-" : percent(task.gate_confidence);
    made.append(element("td", {}, sure), element("td", {}, task.switches === null ? "-" : task.switches.toFixed(0)));
    if (routing.tests) {
      const passed = task.passed;
      const mark = passed === null ? "-" : passed === 1 ? "✓" : passed === 0 ? "✗" : percent(passed);
      const kind = passed === null ? "" : passed > 0 ? "pass" : "fail";
      made.append(element("td", { class: `pinned pin-0 router ${kind}`, "aria-label": `router ${verdict(passed)}` }, mark));
    }
    return made;
  }

  function cell(task, index) {
    if (task.shares === null) return element("td", { class: "shade" }, "-");
    const share = task.shares[index];
    const alone = task.experts_passed === null ? null : task.experts_passed[index];
    const made = element("td", { class: `shade heat-${Math.round(20 * share)}`, tabIndex: -1 }, percent(share));
    if (alone > 0) made.append(element("span", { class: "solves", "aria-hidden": "true" }, "✓"));
    const lines = [`${task.id}, expert ${label(index)}`, `mean weight ${(100 * share).toFixed(1)}%`];
    if (task.chosen === index) lines.push("leads this task");
    lines.push(`alone: ${verdict(alone)}`, `router: ${verdict(task.passed)}`);
    made.dataset.tip = lines.join("\n");
    made.setAttribute("aria-label", lines.join(", "));
    made.addEventListener("click", () => choose(task, false));
    return made;
  }

  // Arrow keys walk over the cells, of which one at a time can be reached by Tab; Enter opens the task.
  rows.addEventListener("keydown", (event) => {
    const here = event.target.closest("td[data-tip]");
    if (!here) return;
    const line = here.parentElement;
    if (event.key === "Enter") {
      choose(tasks.find((task) => task.id === line.dataset.task), false);
      return;
    }
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    const to = rows.children[[...rows.children].indexOf(line) + step[0]];
    const next = to && to.children[here.cellIndex + step[1]];
    if (!next || !next.dataset.tip) return;
    event.preventDefault();
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  function select(task) {
    current = task;
    const place = shown.indexOf(task);
    if (place >= limit) {
      limit = PAGE * Math.ceil((place + 1) / PAGE);
      draw();
    }
    for (const line of rows.children) line.classList.toggle("current", line.dataset.task === task.id);
    panel.replaceChildren(...content(task));
    panel.scrollTop = 0;
  }

  // As a reader does: the address then leads to the task.
  function choose(task, focus) {
    select(task);
    reveal(task);
    history.replaceState(null, "", address(task));
    if (focus) panel.focus({ preventScroll: isWide() });
  }

  // Scroll the list alone, where the task's row is not in view.
  function reveal(task) {
    const list = byId("task-list");
    const outer = list.getBoundingClientRect();
    const inner = rows.children[shown.indexOf(task)].getBoundingClientRect();
    const heading = list.querySelector("thead").offsetHeight;
    if (inner.top < outer.top + heading || inner.bottom > outer.bottom) {
      list.scrollTop += inner.top - outer.top - outer.height / 2;
    }
  }

  function close() {
    current = null;
    panel.replaceChildren(element("p", { class: "muted" }, "No task fits these filters."));
  }

  // Of a link to a task: `#` and its id. The sections' names have neither slash nor capital.
  const address = (task) => `#${encodeURI(task.id).replaceAll("#", "%23")}`;
  const isWide = () => window.innerWidth > 1000;

  function follow() {
    const task = tasks.find((other) => address(other) === location.hash);
    if (!task || task === current) return;
    if (!shown.includes(task)) reset();
    select(task);
    reveal(task);
    (isWide() ? byId("tasks") : panel).scrollIntoView({ behavior: "instant" });
  }

  function content(task) {
    const place = shown.indexOf(task);
    const step = (by, text) => {
      const button = element("button", { type: "button", disabled: !shown[place + by] }, text);
      button.addEventListener("click", () => choose(shown[place + by], false));
      return button;
    };
    const heading = element("h3", {}, element("a", { class: "link", href: address(task), title: "A link to this task" }, task.id));
    const facts = element("dl");
    const fact = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
    fact("categories", task.categories.map((index) => routing.categories[index]).join(", "));
    fact("led by", task.chosen === null ? "no expert: the completion is empty" : label(task.chosen));
    if (routing.tests) {
      fact("router", verdict(task.passed));
      if (task.experts_passed !== null) {
        const able = experts.map((_, index) => index).filter((index) => task.experts_passed[index] > 0);
        fact("experts that solve it alone", able.map(label).join(", ") || "none");
      }
    }
    if (task.gate_confidence !== null) fact("gate's largest probability", `${percent(task.gate_confidence)} on average`);
    if (task.switches !== null) fact("switches", `${task.switches.toFixed(1)} per 100 tokens`);
    const top = element("header", {}, heading, element("div", {}, step(-1, "← previous"), " ", step(1, "next →")));
    const tokens = panels.get(task.id);
    if (!tokens) return [top, facts, element("p", { class: "note" }, routing.cut_note)];
    return [top, facts, legend(tokens), code(task, tokens)];
  }

  // A click on an expert leaves its tokens alone in colour.
  function legend(tokens) {
    const used = [...new Set(tokens.experts)].sort((a, b) => a - b);
    if (!used.includes(lit)) lit = null;
    const list = element("ul", { class: "legend", "aria-label": "Experts" });
    for (const index of used) {
      const chip = element("button", { class: `chip ${look(index)}`, type: "button" }, element("span", {}, label(index)));
      chip.setAttribute("aria-pressed", String(lit === index));
      chip.addEventListener("click", () => {
        lit = lit === index ? null : index;
        for (const other of list.querySelectorAll(".chip")) other.setAttribute("aria-pressed", "false");
        chip.setAttribute("aria-pressed", String(lit === index));
        light(panel.querySelector("pre"));
      });
      list.append(element("li", {}, chip));
    }
    return list;
  }

  function light(pre) {
    pre.classList.toggle("dim", lit !== null);
    for (const token of pre.querySelectorAll(".token")) token.classList.toggle("lit", Number(token.dataset.expert) === lit);
  }

  const look = (index) => `expert-${index % routing.num_colors} line-${index % routing.num_lines}`;

  function code(task, tokens) {
    const pre = element("pre", { class: "code numbers", tabIndex: 0, "aria-label": `Code of ${task.id}` });
    let before = null;
    tokens.texts.forEach((text, place) => {
      if (place === tokens.num_prompt_tokens) {
        pre.append(element("span", { class: "boundary", role: "separator" }, "prompt above, completion below"));
        before = null;
      }
      if (text === "") return;
      const expert = tokens.experts[place];
      const strength = (routing.shows_gate ? tokens.gate : tokens.weights)[place];
      const inPrompt = place < tokens.num_prompt_tokens;
      const span = element("span", {
        class: `token ${look(expert)} strength-${Math.round(strength / 10)}${inPrompt ? " in-prompt" : ""}`,
      });
      span.dataset.expert = expert;
      text.split(/(?<=\n)/).forEach((part) => {
        if (!part.endsWith("\n")) span.append(part);
        else span.append(part.slice(0, -1), element("span", { class: "end", "aria-hidden": "true" }, "↵"), "\n");
      });
      if (expert !== before) span.dataset.switch = expert;
      before = expert;
      span.dataset.tip = [
        `${spelt(text)}, token ${place} (${inPrompt ? "prompt" : "completion"})`,
        `expert ${label(expert)}`,
        `weight ${tokens.weights[place]}%, gate's probability ${tokens.gate[place]}%`,
      ].join("\n");
      pre.append(span);
    });
    light(pre);
    return pre;
  }

  for (const control of Object.values(controls)) {
    if (control) control.addEventListener(control.type === "search" ? "input" : "change", filter);
  }
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  function reset() {
    for (const control of Object.values(controls)) if (control) control.value = "";
    filter();
  }
  byId("reset").addEventListener("click", reset);
  // The heatmaps of categories lead here.
  for (const link of document.querySelectorAll("a[data-category]")) {
    link.addEventListener("click", () => {
      const index = routing.categories.indexOf(link.dataset.category);
      controls.category.value = index < 0 ? "" : String(index);
      filter();
      controls.category.focus({ preventScroll: true });
    });
  }
  window.addEventListener("beforeprint", () => {
    limit = Infinity;
    draw();
  });
  filter();
  follow();
  window.addEventListener("hashchange", follow);
}
