// The heads, or cases, as a grid: each coloured by one number of it, chosen by click or by the arrow keys.

/** Heads of a layer that have no room beside other things. */
const MANY = 24;

class Grid {
  constructor(pane) {
    this.pane = pane;
    this.element = make("figure", { class: "card heads" });
    this.cells = new Map();
  }

  draw() {
    const { store, state } = this.pane;
    const { fields } = store.data.summary;
    const field = fields[state.field];
    const summary = this.pane.summary;
    const means = summary.means[state.field];
    const limit = neat(limitOf(means, 0.98));
    const options = fields.map((f, i) => ({ value: i, text: f.label, group: f.over }));
    const cases = Boolean(store.data.sites.case);
    const select = choice(cases ? "cases by" : "heads by", options, state.field, (value) => this.pane.set({ field: Number(value) }));
    this.cells.clear();
    this.element.classList.toggle("wide", store.data.sites.head?.length > MANY);
    const table = make("div", { class: cases ? "grid cases" : "grid", role: "grid", "aria-label": `${field.label} of each head` });
    if (!cases) table.append(this.header());
    for (const { layer, cases: row } of store.rows) {
      const cells = row.map((site) => this.cell(site, means[site], limit));
      table.append(make("div", { class: "row", role: "row" }, make("span", { class: "side", role: "rowheader" }, `L${layer}`), cells));
    }
    table.addEventListener("keydown", (event) => this.move(event));
    hints(table, "[data-site]", (cell) => this.tell(Number(cell.dataset.site)));
    table.addEventListener("focusin", ({ target }) => {
      if (target.matches(":focus-visible")) hint.show(target, this.tell(Number(target.dataset.site)));
    });
    table.addEventListener("focusout", () => hint.hide());
    const marks = summary.verdict.some((v) => v) && make("span", { class: "marks" }, make("span", {}, "• surely repaired"), make("span", {}, "× surely broken"));
    const about = make("p", { class: "note" }, `Mean over ${field.over.startsWith("top") ? `each one’s ${field.over} by direct effect` : field.over}. Hover, or go with the arrow keys, for more.`);
    this.element.replaceChildren(select, make("div", { class: "scroll" }, table), legend(limit, field.units, means, marks), about);
    this.choose();
  }

  header() {
    const { head } = this.pane.store.data.sites;
    const every = head.length > 16 ? 4 : 1;
    const cells = head.map((h, i) => make("span", { class: "top", role: "columnheader" }, i % every ? "" : `H${h}`));
    return make("div", { class: "row", role: "row" }, make("span", { class: "side" }), cells);
  }

  cell(site, value, limit) {
    const label = this.pane.store.labels[site];
    const verdict = this.pane.summary.verdict[site];
    const named = this.pane.store.data.sites.case ? label : "";
    const known = this.pane.summary.tokens[site] > 0;
    const cell = make(
      "button",
      {
        class: "cell shade",
        type: "button",
        role: "gridcell",
        tabindex: -1,
        "data-site": site,
        "aria-label": `${label} ${signed(value)}${verdict > 0 ? ", repaired" : verdict < 0 ? ", broken" : ""}`,
        disabled: !known,
        onclick: () => this.pane.choose(site),
      },
      named,
      verdict ? make("i", { "aria-hidden": "true" }, verdict > 0 ? "•" : "×") : null,
    );
    shade(cell, value, limit);
    this.cells.set(site, cell);
    return cell;
  }

  /** The numbers of a head. */
  tell(site) {
    const { store, summary, state } = this.pane;
    const chosen = [...new Set([state.field, 0, 1, 2, 3, 4, 5])];
    const rows = chosen
      .filter((i) => store.data.summary.fields[i])
      .map((i) => {
        const { label, units } = store.data.summary.fields[i];
        return [label, `${withReach(summary.means[i][site], summary.reach[i][site])} ${unit(units)}`];
      });
    const verdict = summary.verdict[site];
    const q = summary.q[site];
    if (q != null) rows.push([verdict > 0 ? "repaired" : verdict < 0 ? "broken" : "neither for sure", `q ${q.toPrecision(2)}`]);
    rows.push(["tokens", `${summary.tokens[site].toLocaleString("en")} (${store.data.over})`]);
    return [store.labels[site], ...rows];
  }

  move(event) {
    const { rows } = this.pane.store;
    const at = rows.findIndex(({ cases }) => cases.includes(this.pane.state.site));
    const column = rows[at].cases.indexOf(this.pane.state.site);
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const ends = { Home: 0, End: rows[at].cases.length - 1 };
    let [row, next] = [at, ends[event.key] ?? column];
    if (event.key in steps) {
      const [down, right] = steps[event.key];
      do {
        row += down;
        next = Math.min(next + right, (rows[row]?.cases.length ?? 1) - 1);
      } while (rows[row]?.cases[next] != null && !this.pane.known(rows[row].cases[next]));
    } else if (!(event.key in ends)) return;
    event.preventDefault();
    const site = rows[row]?.cases[next];
    if (site == null || !this.pane.known(site)) return;
    this.pane.choose(site);
    this.cells.get(site).focus();
  }

  choose() {
    for (const [site, cell] of this.cells) {
      const chosen = site === this.pane.state.site;
      cell.setAttribute("aria-selected", chosen);
      cell.tabIndex = chosen ? 0 : -1;
      if (chosen) this.reveal(cell);
    }
  }

  /** Move a grid that is too wide, and not the page, to where a cell is seen. */
  reveal(cell) {
    const view = cell.closest(".scroll");
    const [at, seen] = [cell, view].map((each) => each.getBoundingClientRect());
    if (at.left < seen.left) view.scrollLeft -= seen.left - at.left + at.width;
    if (at.right > seen.right) view.scrollLeft += at.right - seen.right + at.width;
  }
}

/** What is known of the chosen head, who makes up for it, and whom it makes up for. */
class Head {
  constructor(pane) {
    this.pane = pane;
    this.element = make("section", { class: "card head" });
  }

  draw() {
    const { store, state, summary } = this.pane;
    const { fields } = store.data.summary;
    const verdict = summary.verdict[state.site];
    const badge = verdict ? make("span", { class: "badge" }, verdict > 0 ? "repaired" : "broken") : null;
    const facts = fields.slice(0, 6).map((field, i) =>
      make(
        "div",
        {},
        make("b", {}, withReach(summary.means[i][state.site], summary.reach[i][state.site])),
        make("span", {}, `${field.label}${unit(field.units) && `, ${unit(field.units)}`}`),
      ),
    );
    const count = summary.tokens[state.site];
    const note = `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}: ${store.data.over}. ± is half of the 95% interval${summary.reach[0][state.site] == null ? "; too few prompts or documents for one" : ""}.`;
    this.element.replaceChildren(
      make("h3", {}, store.labels[state.site], badge),
      make("div", { class: "facts" }, facts),
      make("p", { class: "note" }, note),
      ...this.repairs(),
      ...this.words(),
    );
  }

  /** What it promotes and demotes most often on its top tokens. */
  words() {
    const { store, state } = this.pane;
    const often = store.data.promoted?.often[state.variant]?.[state.site];
    if (!often?.[0].length) return [];
    const { vocabulary } = store.data.promoted;
    const rows = often.map((end, i) => wordsOf(["promotes", "demotes"][i], end.map(([w, share]) => [vocabulary[w], `${Math.round(100 * share)}%`])));
    return [make("h4", {}, "What it promotes, most often"), ...rows];
  }

  repairs() {
    const { store, state, summary } = this.pane;
    const means = store.data.repairs?.means[state.variant]?.[state.site];
    const title = make("h4", {}, "Who makes up for it, on average");
    const index = new Map(store.data.summary.fields.map((f, i) => [f.name, i]));
    const sum = (name) => {
      const i = index.get(`top_${name}`);
      const field = store.data.summary.fields[i];
      const [value, reach] = [summary.means[i][state.site], summary.reach[i][state.site]];
      return { label: field.label.replace("self-repair ", ""), value, reach, text: withReach(value, reach) };
    };
    if (!means?.rows.length) {
      const sums = store.data.parts.filter((name) => index.has(`top_${name}`)).map(sum);
      return [title, bars(sums)];
    }
    const rows = means.rows.map(([component, value, reach, sure]) => ({
      label: this.pane.link(component),
      value,
      reach,
      text: withReach(value, reach),
      faint: !sure,
      title: sure ? "differs from 0, surely" : "may be 0",
    }));
    if (means.others) rows.push({ label: `${means.others} others`, value: means.rest, text: signed(means.rest), faint: true, last: true });
    if (index.has("top_from_norm")) rows.push(sum("from_norm"));
    return [title, bars(largestFirst(rows)), ...this.reverse()];
  }

  reverse() {
    const { store, state } = this.pane;
    const { labels, means } = store.data.repairs;
    const own = labels.indexOf(store.labels[state.site]);
    const found = means[state.variant].flatMap(({ rows }, site) =>
      rows.filter(([component, value, , sure]) => component === own && sure && value > 0).map(([, value]) => [site, value]),
    );
    if (!found.length) return [];
    const links = found.sort((a, b) => b[1] - a[1]).slice(0, 12);
    return [
      make("h4", {}, "Makes up for"),
      make("p", { class: "links" }, links.flatMap(([site, value]) => [this.pane.siteLink(site), ` ${signed(value)}  `])),
    ];
  }
}
