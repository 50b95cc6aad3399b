// Single tokens: a head's top ones with what stands before them, whole prompts as coloured text, and all of one's numbers.

const CONTEXT = 10;
const LISTED = 12;
const PAGE = 700;
/** By which tail of the direct effects a store's share is: how its tokens are ordered first, and in words. */
const FIRST_ORDER = {
  top: { value: "direct_effect", text: "highest direct effect" },
  bottom: { value: "-direct_effect", text: "lowest direct effect" },
  absolute: { value: "|direct_effect", text: "largest direct effect" },
};

/** A piece of text; the end of a line is seen, and in whole texts it ends one. */
function word(text, lines = false) {
  return text.replace(/\n/g, lines ? "⏎\n" : "⏎");
}

/** A piece of text of which no number is told. */
function untold(text) {
  return [text, ""];
}

/** The tokens of a head's share: the direct effects furthest at its tail, or most or least self-repair. */
class Tops {
  constructor(pane) {
    this.pane = pane;
    this.element = make("section", { class: "card tops" });
    this.count = LISTED;
  }

  draw() {
    const { store, state, tokens } = this.pane;
    const orders = [
      FIRST_ORDER[store.data.tail],
      { value: "self_repair", text: "most self-repair" },
      { value: "-self_repair", text: "least self-repair" },
    ];
    const select = choice("ordered by", orders, state.order, (value) => this.pane.set({ order: value }));
    const column = tokens.columns[state.order.replace(/^\W/, "")];
    const by = column.map({ "-": (v) => -v, "|": Math.abs }[state.order[0]] ?? ((v) => v));
    const own = [...tokens.token.keys()].filter((i) => tokens.top[i] && !Number.isNaN(by[i]));
    own.sort((a, b) => by[b] - by[a] || a - b);
    const shown = own.slice(0, this.count);
    const names = ["direct_effect", "logit_change", "self_repair"].filter((name) => name in tokens.columns);
    const fields = names.map((name) => store.fields.find((f) => f.name === name));
    const limits = fields.map(({ name }) => limitOf(shown.map((i) => tokens.columns[name][i]), 1));
    const head = make("tr", {}, make("th", {}, "what it reads → predicts"), fields.map((f) => make("th", {}, f.label)));
    const rows = shown.map((i) => {
      const token = tokens.token[i];
      const numbers = fields.map(({ name, step }, j) => {
        const value = tokens.columns[name][i];
        const cell = make("td", { class: "shade" }, stepped(value, step));
        shade(cell, value, limits[j]);
        return cell;
      });
      const button = make("button", { type: "button", class: "context", onclick: () => this.pane.select(token, true) }, this.context(token));
      return make("tr", { "data-token": token, class: token === state.token ? "chosen" : null }, make("td", {}, button), numbers);
    });
    const more = own.length > this.count && make("button", { type: "button", class: "more", onclick: () => this.more() }, `show more of ${own.length}`);
    const body = own.length
      ? make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)))
      : make("p", { class: "note" }, "None of its tokens is on this page.");
    this.element.replaceChildren(make("h3", {}, `Tokens of ${store.labels[state.site]}: ${store.data.over}`), select, body, more || "");
  }

  more() {
    this.count += 4 * LISTED;
    this.draw();
  }

  context(token) {
    const { store } = this.pane;
    const [prompt, position] = store.split(token);
    const before = [];
    for (let i = Math.max(0, position - CONTEXT); i <= position; i++) before.push(word(store.word(prompt, i)));
    return [make("bdi", { class: "before" }, before.join("")), " → ", make("bdi", { class: "target" }, word(store.target(token)))];
  }
}

/** Whole prompts. What a token is coloured by belongs to its prediction from what stands before it. */
class Prompts {
  constructor(pane) {
    this.pane = pane;
    this.element = make("figure", { class: "card text" });
  }

  get perPage() {
    return Math.max(1, Math.floor(PAGE / (this.pane.store.data.text.positions + 1)));
  }

  draw() {
    const { store, state, tokens } = this.pane;
    const field = store.fields.find((f) => f.name === state.tint) ?? store.fields[0];
    const column = tokens.columns[field.name];
    const limit = neat(limitOf([...column], 0.99));
    const options = store.fields.map((f) => ({ value: f.name, text: f.label }));
    const select = choice("text by", options, field.name, (value) => this.pane.set({ tint: value }));
    this.spans = new Map();
    const text = make("div", { class: "prompts", role: "listbox", tabindex: 0, "aria-label": `text coloured by ${field.label} of ${store.labels[state.site]}` });
    const end = Math.min(state.prompt + this.perPage, store.data.text.prompts);
    for (let prompt = state.prompt; prompt < end; prompt++) text.append(this.prompt(prompt, column, limit));
    text.addEventListener("click", ({ target }) => {
      const chosen = target.closest("[data-token]");
      if (chosen) this.pane.select(Number(chosen.dataset.token));
    });
    text.addEventListener("keydown", (event) => this.move(event));
    hints(text, "[data-token]", (span) => this.tell(Number(span.dataset.token)));
    const marks = make("span", { class: "marks" }, make("u", { class: "share" }, store.data.over), make("u", { class: "minus" }, "below 0"));
    const note = this.note(end);
    this.element.replaceChildren(
      make("h3", {}, `Text, by ${field.label} of ${store.labels[state.site]}`),
      make("div", { class: "tools" }, select, this.pager(end)),
      legend(limit, field.units, [...column], marks),
      make("p", { class: "note" }, "A token’s colour is about predicting it from what stands before it. Click it for all its numbers; ← and → go on."),
      note,
      text,
    );
    this.choose();
  }

  note(end) {
    const { whole, kept } = this.pane.store.data.tokens;
    const parts = [];
    if (end > whole) parts.push(`From prompt ${whole} on, this page holds the numbers of the ${this.pane.store.data.over} alone.`);
    if (!kept) parts.push("The store itself keeps ablated runs of each one’s top share of tokens alone: others have a direct effect and no more.");
    return parts.length ? make("p", { class: "note" }, parts.join(" ")) : "";
  }

  pager(end) {
    const { store, state } = this.pane;
    const { prompts } = store.data.text;
    const go = (prompt) => this.pane.set({ prompt: Math.max(0, Math.min(prompts - 1, Math.trunc(prompt))) });
    const input = make("input", { type: "number", min: 0, max: prompts - 1, value: state.prompt, "aria-label": "first prompt", onchange: () => go(Number(input.value) || 0) });
    return make(
      "span",
      { class: "pager" },
      make("button", { type: "button", "aria-label": "prompts before", disabled: state.prompt === 0, onclick: () => go(state.prompt - this.perPage) }, "‹"),
      make("label", {}, "prompt ", input),
      `– ${end - 1} of 0 – ${prompts - 1}`,
      make("button", { type: "button", "aria-label": "next prompts", disabled: end >= prompts, onclick: () => go(state.prompt + this.perPage) }, "›"),
    );
  }

  prompt(prompt, column, limit) {
    const { store, tokens } = this.pane;
    const { positions, documents, ends } = store.data.text;
    const name = `${prompt}${documents ? ` · document ${documents[prompt]}` : ""}`;
    const line = make("p", { class: "prompt" }, make("span", { class: "number" }, name), make("bdi", {}, word(store.word(prompt, 0), true)));
    for (let position = 0; position < (ends ? ends[prompt] : positions); position++) {
      const token = prompt * positions + position;
      const entry = tokens.place.get(token);
      const value = entry == null ? NaN : column[entry];
      const span = make("bdi", { class: "token shade", role: "option", "data-token": token, id: `${this.pane.id}-${token}` }, word(store.word(prompt, position + 1), true));
      shade(span, value, limit);
      span.classList.toggle("share", entry != null && tokens.top[entry] === 1);
      this.spans.set(token, span);
      line.append(span);
    }
    return line;
  }

  tell(token) {
    const { store, tokens, state } = this.pane;
    const [prompt, position] = store.split(token);
    const title = `${word(store.word(prompt, position))} → ${word(store.target(token))}`;
    const entry = tokens.place.get(token);
    if (entry == null) return [title, [store.counted && !store.counted[token] ? "not asked about" : "no numbers on this page", ""]];
    const names = [...new Set([state.tint, "direct_effect", "logit_change", "self_repair", ...store.data.parts])];
    const rows = names
      .map((name) => store.fields.find((f) => f.name === name))
      .filter((field) => field && !Number.isNaN(tokens.columns[field.name][entry]))
      .map((field) => [field.label, stepped(tokens.columns[field.name][entry], field.step, field.units === "1")]);
    return [title, ...rows];
  }

  move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const every = [...this.spans.keys()];
    const at = every.indexOf(this.pane.state.token);
    const next = every[Math.max(0, Math.min(every.length - 1, at < 0 ? 0 : at + step))];
    this.pane.select(next);
  }

  choose(visible = false) {
    const { token } = this.pane.state;
    const list = this.element.querySelector("[role=listbox]");
    for (const [each, span] of this.spans) span.setAttribute("aria-selected", each === token);
    const chosen = this.spans.get(token);
    list.toggleAttribute("aria-activedescendant", Boolean(chosen));
    if (chosen) list.setAttribute("aria-activedescendant", chosen.id);
    if (chosen && visible) chosen.scrollIntoView({ block: "center", behavior: "instant" });
  }
}

/** All numbers of a token, and what made up for its loss. */
class Details {
  constructor(pane) {
    this.pane = pane;
    this.element = make("aside", { class: "card details", "aria-live": "polite" });
  }

  async draw() {
    const { store, state, tokens } = this.pane;
    const { token, site, variant } = state;
    this.element.classList.toggle("empty", token == null);
    if (token == null) {
      this.element.replaceChildren(make("h3", {}, "Token"), make("p", { class: "note" }, "Choose a token."));
      return;
    }
    const [clean, components, words] = await Promise.all([
      store.clean(),
      store.data.repairs && store.components(variant, site),
      store.data.promoted && store.promoted(variant, site),
    ]);
    if (["token", "site", "variant"].some((name) => state[name] !== this.pane.state[name])) return;
    const [prompt, position] = store.split(token);
    const entry = tokens.place.get(token);
    const title = [make("bdi", {}, word(store.word(prompt, position))), " → ", make("bdi", { class: "target" }, word(store.target(token)))];
    const other = store.other(token);
    const close = make("button", { type: "button", class: "close", "aria-label": "close", onclick: () => this.pane.select(null) }, "×");
    const where = `prompt ${prompt}, position ${position}, ablated: ${store.labels[site]}${this.pane.told}`;
    this.element.replaceChildren(
      close,
      make("h3", {}, title, other != null && [" less ", make("bdi", { class: "target" }, word(other))]),
      make("p", { class: "note" }, where),
      ...(entry == null ? [make("p", { class: "note" }, "This page has no numbers of the ablation here.")] : this.numbers(entry, components?.get(token))),
      ...this.promoted(words?.get(token)),
      this.table(entry, token, clean),
    );
  }

  /** Which words the head's write promotes, and the changes of the components that the ablation changes most. */
  promoted(words) {
    if (!words) return [];
    const told = (rows) => rows.map(([text, effect]) => [text, stepped(effect, words.step)]);
    return [
      make("h4", {}, "What it writes, in words"),
      wordsOf("promotes", told(words.own[0])),
      wordsOf("demotes", told(words.own[1])),
      words.changes.length > 0 && make("h4", {}, "What the changes of components promote"),
      ...words.changes.flatMap(({ component, effect, promoted, demoted }) => [
        make("p", { class: "links" }, this.pane.linkTo(this.pane.store.data.promoted.labels[component]), ` ${stepped(effect, words.step)}`),
        wordsOf("promotes", promoted.map(untold)),
        wordsOf("demotes", demoted.map(untold)),
      ]),
    ].filter(Boolean);
  }

  numbers(entry, components) {
    const { store, tokens } = this.pane;
    const row = (name) => {
      const field = store.fields.find((f) => f.name === name);
      const value = field ? tokens.columns[name][entry] : NaN;
      if (Number.isNaN(value)) return [];
      return [{ label: field.label.replace("self-repair from", "from"), value, text: stepped(value, field.step), title: field.about }];
    };
    const found = [
      make("h4", {}, "What it wrote, and what was lost"),
      bars(["direct_effect", "ablated_direct_effect", "logit_change", "self_repair"].flatMap(row)),
      make("h4", {}, "Who made up for it"),
    ];
    if (!components) return [...found, bars(store.data.parts.flatMap(row))];
    const rows = components.rows.map(([component, value]) => ({ label: this.pane.link(component), value, text: stepped(value, components.step) }));
    if (Math.abs(components.rest) >= components.step / 2) rows.push({ label: "all others", value: components.rest, text: stepped(components.rest, components.step), faint: true, last: true });
    return [...found, bars(largestFirst([...rows, ...row("from_norm")]))];
  }

  table(entry, token, clean) {
    const { store, tokens } = this.pane;
    const rows = [];
    const add = (field, value) => {
      if (value != null && !Number.isNaN(value)) rows.push([field, stepped(value, field.step, field.units === "1")]);
    };
    for (const field of store.fields) add(field, entry == null ? null : tokens.columns[field.name][entry]);
    for (const field of clean) add(field, field.values[token]);
    if (!rows.length) return "";
    const body = rows.map(([f, text]) => make("tr", { title: f.about }, make("th", { scope: "row" }, f.label), make("td", {}, text), make("td", {}, `± ${Number((f.step / 2).toPrecision(2))} ${unit(f.units)}`)));
    return make(
      "details",
      { open: true },
      make("summary", {}, "All numbers"),
      make("table", {}, make("tbody", {}, body)),
      make("p", { class: "note" }, "±: how far each is rounded on this page. The store has all digits."),
    );
  }
}
