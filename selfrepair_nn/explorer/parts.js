// Small parts that all of the page is made of: elements, numbers, colours, bars, the box that follows the pointer.

/** An element. Texts become text, never markup: whoever wrote the tokens. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** "+0.57", with a true minus; null and NaN are a dash. */
function signed(value, digits = 3) {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const shown = size >= 1e4 ? size.toExponential(1) : size.toFixed(digits);
  const small = size > 0 && Number(shown) === 0 ? size.toExponential(0) : shown;
  const sign = value < 0 ? "−" : value > 0 ? "+" : "";
  return sign + small;
}

/** A number of a token, in as many digits as it was rounded to; what has no sign by itself gets none. */
function stepped(value, step, plain = false) {
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  if (Math.abs(value) < step / 2) return (0).toFixed(digits);
  const text = signed(value, digits);
  return plain ? text.replace("+", "") : text;
}

/** A line of tokens, each with what is told of it. */
function wordsOf(title, words) {
  const found = words.flatMap(([text, told]) => [make("bdi", { class: "target" }, word(text)), told ? ` ${told}  ` : "  "]);
  return make("p", { class: "links words" }, make("b", {}, `${title}  `), found);
}

function withReach(value, reach) {
  return reach == null || value == null ? signed(value) : `${signed(value)} ± ${signed(reach).replace("+", "")}`;
}

function unit(units) {
  return units === "1" || !units ? "" : units === "logit" ? "logits" : units;
}

/** Colour an element by a number: blue above 0, orange below, full at `limit`. */
function shade(element, value, limit) {
  const none = value == null || Number.isNaN(value);
  const depth = none || !limit ? 0 : Math.min(1, Math.abs(value) / limit);
  element.classList.toggle("none", none);
  element.classList.toggle("below", !none && value < 0);
  element.classList.toggle("marked", !none && value < 0 && depth > 0.12);
  element.style.setProperty("--depth", `${Math.round(depth * 100)}%`);
}

/** What full colour stands for: all but the largest few are told apart. */
function limitOf(values, part) {
  const sizes = values.filter((v) => v != null && !Number.isNaN(v)).map(Math.abs).sort((a, b) => a - b);
  if (!sizes.length) return 0;
  return sizes[Math.min(sizes.length - 1, Math.floor(part * sizes.length))] || sizes[sizes.length - 1];
}

/** Two digits, rounded up: the end of a scale. */
function neat(size) {
  if (!size) return 0;
  const power = 10 ** (Math.floor(Math.log10(size)) - 1);
  return Number((Math.ceil(size / power - 1e-9) * power).toPrecision(2));
}

/** The scale of a colour. Where `values` go beyond its ends, the ends say so. */
function legend(limit, units, values, more) {
  const end = Number(limit.toPrecision(2));
  const [less, above] = [values.some((v) => v < -limit), values.some((v) => v > limit)];
  return make(
    "figcaption",
    { class: "legend" },
    make("span", {}, `−${end}${less ? " or less" : ""}`),
    make("span", { class: "ramp", role: "img", "aria-label": "orange below 0, blue above" }),
    make("span", {}, `+${end} ${unit(units)}${above ? " or more" : ""}`),
    more,
  );
}

/** Signed bars from a common zero. Each row: label (text or element), value, reach, text, whether it is faint. */
function bars(rows) {
  const reaches = rows.map((r) => Math.abs(r.value || 0) + (r.reach || 0));
  const most = Math.max(...reaches, 1e-12);
  const low = Math.min(0, ...rows.map((r) => (r.value || 0) - (r.reach || 0)));
  const high = Math.max(0, ...rows.map((r) => (r.value || 0) + (r.reach || 0)));
  const width = high - low || most;
  const at = (value) => `${(100 * (value - low)) / width}%`;
  const list = make("ul", { class: "bars" });
  for (const { label, value, reach, text, faint, title } of rows) {
    const bar = make("span", { class: value < 0 ? "bar below" : "bar" });
    const from = Math.min(0, value || 0);
    bar.style.left = at(from);
    bar.style.width = `${(100 * Math.abs(value || 0)) / width}%`;
    const zero = make("span", { class: "zero" });
    zero.style.left = at(0);
    const track = make("span", { class: "track", "aria-hidden": "true" }, bar, zero);
    if (reach) {
      const whisker = make("span", { class: "whisker" });
      whisker.style.left = at(value - reach);
      whisker.style.width = `${(200 * reach) / width}%`;
      track.append(whisker);
    }
    const attributes = { class: faint ? "faint" : null, title };
    list.append(make("li", attributes, make("span", { class: "label" }, label), track, make("span", { class: "value" }, text)));
  }
  return list;
}

/** Bars by size; what sums up the smallest comes last. */
function largestFirst(rows) {
  return rows.sort((a, b) => Boolean(a.last) - Boolean(b.last) || Math.abs(b.value) - Math.abs(a.value));
}

function choice(label, options, chosen, onchange) {
  const select = make("select", { onchange: () => onchange(select.value) });
  const groups = new Map();
  for (const { value, text, group } of options) {
    if (group && !groups.has(group)) {
      groups.set(group, make("optgroup", { label: group }));
      select.append(groups.get(group));
    }
    const option = make("option", { value }, text);
    option.selected = String(value) === String(chosen);
    (group ? groups.get(group) : select).append(option);
  }
  return make("label", { class: "choice" }, make("span", {}, label), select);
}

/** The box that tells the numbers of what the pointer or the keyboard is at. */
const hint = {
  box: null,

  show(element, lines) {
    this.box ??= document.body.appendChild(make("div", { class: "explorer-hint", role: "tooltip" }));
    const [head, ...rest] = lines;
    const rows = rest.map(([name, value]) => make("tr", {}, make("th", {}, name), make("td", {}, value)));
    this.box.replaceChildren(make("b", {}, head), make("table", {}, make("tbody", {}, rows)));
    this.box.hidden = false;
    const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), innerWidth - width - 8);
    const above = at.top - height - 8;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${above > 4 ? above : at.bottom + 8}px`;
  },

  hide() {
    if (this.box) this.box.hidden = true;
  },
};

/** Whatever of `selector` the pointer is over inside `element` is told of by `tell`. */
function hints(element, selector, tell) {
  element.addEventListener("pointerover", (event) => {
    const found = event.pointerType !== "touch" && event.target.closest(selector);
    if (found) hint.show(found, tell(found));
    else hint.hide();
  });
  element.addEventListener("pointerleave", () => hint.hide());
}
