// A store's part of the page, and the page: what is chosen, and where it is kept (in the address, to be sent to others).

class Pane {
  constructor(page, store, id) {
    Object.assign(this, { page, store, id });
    const { axes, summary } = store.data;
    this.state = { at: axes.map(() => 0), variant: 0, field: 0, site: this.first(summary.variants[0]), order: FIRST_ORDER[store.data.tail].value, tint: store.fields[0].name, prompt: 0, token: null };
    this.grid = new Grid(this);
    this.head = new Head(this);
    this.tops = new Tops(this);
    this.text = new Prompts(this);
    this.details = new Details(this);
    this.axes = make("div", { class: "tools axes" });
    const { name, basis, notes } = store.data;
    this.element = make(
      "section",
      { class: "pane", "aria-label": name },
      make("header", {}, make("h2", {}, name), make("p", { class: "note" }, basis), notes.map((n) => make("p", { class: n.loud ? "banner loud" : "banner" }, n.text)), this.axes),
      make("div", { class: "parts" }, this.grid.element, this.head.element, this.tops.element, this.text.element, this.details.element),
    );
  }

  /** The head of most self-repair. */
  first({ means, tokens }) {
    const known = [...tokens.keys()].filter((i) => tokens[i] > 0);
    return known.reduce((best, i) => ((means[0][i] ?? -Infinity) > (means[0][best] ?? -Infinity) ? i : best), known[0]);
  }

  /** Begin with the head that another store begins with. */
  follow(other) {
    const site = this.store.places.get(other.store.labels[other.state.site]);
    if (site != null && this.known(site)) this.state.site = site;
  }

  get summary() {
    return this.store.data.summary.variants[this.state.variant];
  }

  /** The variant, in words. */
  get told() {
    return this.store.data.axes.map(({ name, labels }, i) => `, ${name} ${labels[this.state.at[i]]}`).join("");
  }

  known(site) {
    return this.summary.tokens[site] > 0;
  }

  /** Take what is chosen, and draw what depends on it: the grid says so at once, the rest when the tokens are read. */
  async set(changes) {
    const { site } = this.state;
    this.state = { ...this.state, ...changes };
    const { axes } = this.store.data;
    this.state.variant = axes.reduce((sum, { labels }, i) => sum * labels.length + this.state.at[i], 0);
    if (!this.known(this.state.site)) this.state.site = this.first(this.summary);
    const now = this.state;
    this.element.setAttribute("aria-busy", true);
    if (now.site !== site) this.grid.choose();
    const tokens = await this.store.tokens(now.variant, now.site);
    if (this.state !== now) return;
    const before = this.drawn;
    const changed = (...names) => !before || names.some((name) => before[name] !== now[name]);
    this.tokens = tokens;
    this.drawn = now;
    hint.hide();
    const heads = changed("variant", "field");
    const head = changed("variant", "site");
    if (changed("variant")) this.drawAxes();
    if (heads) this.grid.draw();
    if (head) this.head.draw();
    if (head || changed("order")) this.tops.draw();
    if (head || changed("tint", "prompt")) this.text.draw();
    else if (changed("token")) this.text.choose();
    if (changed("token")) this.mark();
    if (head || changed("token")) this.drawing = this.details.draw();
    await this.drawing;
    this.page.keep();
    if (this.state === now) this.element.removeAttribute("aria-busy");
  }

  drawAxes() {
    const { axes } = this.store.data;
    const every = axes.map(({ name, labels }, i) => {
      const options = labels.map((text, value) => ({ value, text }));
      return choice(name, options, this.state.at[i], (value) => this.page.each(this, { axis: name, label: labels[value] }));
    });
    this.axes.replaceChildren(...every);
  }

  mark() {
    for (const row of this.tops.element.querySelectorAll("tr[data-token]")) row.classList.toggle("chosen", Number(row.dataset.token) === this.state.token);
  }

  choose(site) {
    return this.page.each(this, { site: this.store.labels[site] });
  }

  /** What is chosen in this store or beside it, by name; a name that this store does not have changes nothing. */
  take({ site, axis, label }) {
    const at = this.store.data.axes.map(({ name, labels }, i) => (name === axis && labels.includes(label) ? labels.indexOf(label) : this.state.at[i]));
    const place = this.store.places.get(site);
    const known = place != null && this.known(place);
    return this.set({ at: at.some((v, i) => v !== this.state.at[i]) ? at : this.state.at, ...(known ? { site: place } : {}) });
  }

  /** A token is looked at, or none. `visible` turns to its page. */
  async select(token, visible = false) {
    const changes = { token };
    if (token != null) {
      const [prompt] = this.store.split(token);
      const { perPage } = this.text;
      if (prompt < this.state.prompt || prompt >= this.state.prompt + perPage) changes.prompt = Math.floor(prompt / perPage) * perPage;
    }
    await this.set(changes);
    if (visible) this.text.choose(true);
  }

  /** A component by its name: a way to that head, where it is one of this store's. */
  link(component) {
    return this.linkTo(this.store.data.repairs.labels[component]);
  }

  linkTo(label) {
    const site = this.store.places.get(label);
    return site == null || !this.known(site) ? label : this.siteLink(site);
  }

  siteLink(site) {
    const follow = () => {
      this.page.leave();
      return this.choose(site);
    };
    return make("button", { type: "button", class: "link", onclick: follow }, this.store.labels[site]);
  }
}

/** So many stores are seen at first. */
const BESIDE = 2;

class Page {
  constructor(stores, element) {
    this.panes = stores.map((store, i) => new Pane(this, store, `store${i}`));
    this.element = element;
    for (const pane of this.panes.slice(1)) pane.follow(this.panes[0]);
    this.together = make("input", { type: "checkbox", checked: true });
    const all = stores.length > 1 && make("label", { class: "together" }, this.together, ` the same head in ${stores.length > 2 ? "all" : "both"}`);
    element.replaceChildren(this.choice(), all || "", make("div", { class: stores.length > 1 ? "panes two" : "panes" }, this.panes.map((pane) => pane.element)));
    addEventListener("scroll", () => hint.hide(), { passive: true, capture: true });
    addEventListener("keydown", ({ key }) => key === "Escape" && hint.hide());
    addEventListener("hashchange", () => this.restore());
  }

  /** Which stores are seen, where there are more than stand side by side. */
  choice() {
    if (this.panes.length <= BESIDE) return "";
    const boxes = this.panes.map(({ element, store }, i) => {
      element.hidden = i >= BESIDE;
      const shown = make("input", { type: "checkbox", checked: i < BESIDE, onchange: () => (element.hidden = !shown.checked) });
      return make("label", {}, shown, ` ${store.data.name}`);
    });
    return make("div", { class: "tools together", role: "group", "aria-label": "stores that are shown" }, "shown: ", boxes);
  }

  /** A choice in one store, taken by the others as well if they are to follow. */
  each(pane, chosen) {
    const following = this.together.checked ? this.panes : [pane];
    return Promise.all(following.map((each) => each.take(chosen)));
  }

  /** What follows is another place: the browser's way back leads here. */
  leave() {
    if (location.protocol !== "about:") history.pushState(null, "", this.kept);
  }

  keep() {
    const parts = this.panes.map(({ state, store }) => [store.labels[state.site], state.at.join("."), state.tint, state.token ?? ""].map(encodeURIComponent).join("~"));
    this.kept = `#${parts.join("&")}`;
    if (location.protocol !== "about:" && location.hash !== this.kept) history.replaceState(null, "", this.kept);
  }

  /** Show what the address says, as far as these stores have it. */
  async restore() {
    if (location.hash === this.kept) return;
    const parts = location.hash.slice(1).split("&");
    for (const [i, pane] of this.panes.entries()) {
      const [site, at, tint, token] = (parts[i] ?? "").split("~").map(decodedOr);
      const { axes, text } = pane.store.data;
      const places = (at ?? "").split(".").map(Number);
      const changes = {};
      if (axes.every(({ labels }, j) => places[j] in labels)) changes.at = axes.map((_, j) => places[j]);
      if (pane.store.places.has(site)) changes.site = pane.store.places.get(site);
      if (pane.store.fields.some((f) => f.name === tint)) changes.tint = tint;
      const wanted = token ? Number(token) : NaN;
      const there = Number.isInteger(wanted) && wanted >= 0 && wanted < text.prompts * text.positions;
      changes.token = there ? wanted : null;
      await pane.set(changes);
      if (changes.token != null) await pane.select(changes.token);
    }
  }
}

function decodedOr(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

async function main() {
  const element = document.getElementById("explorer");
  try {
    const stores = JSON.parse(document.getElementById("explorer-stores").textContent).map((data) => new Store(data));
    await Promise.all(stores.map((store) => store.open()));
    const page = new Page(stores, element);
    await page.restore();
    element.dataset.ready = Math.round(performance.now());
  } catch (error) {
    element.replaceChildren(make("p", { class: "banner loud" }, `This page cannot be shown (${error.message}). It needs a browser of 2023 or later.`));
    throw error;
  }
}

main();
