// What a page holds of a store: packed numbers unpacked when they are asked for, each head's when it is looked at.

const MISSING = 0xffff;

/** The bytes of a text that was made by zlib and base64. */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Reads columns one after the other; a number's lowest bytes come first, then the next. */
class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  whole(count, width) {
    const found = new Uint32Array(count);
    for (let byte = 0; byte < width; byte++) {
      const start = this.at + byte * count;
      for (let i = 0; i < count; i++) found[i] += this.bytes[start + i] * 256 ** byte;
    }
    this.at += count * width;
    return found;
  }

  /** Numbers that grow, told by how much each is above the one before. */
  growing(count) {
    const found = this.whole(count, 4);
    for (let i = 1; i < count; i++) found[i] += found[i - 1];
    return found;
  }

  /** Numbers in steps, NaN where there is none. */
  rounded(count, step) {
    return Float64Array.from(this.whole(count, 2), (n) => {
      if (n === MISSING) return NaN;
      return (n % 2 ? -(n + 1) / 2 : n / 2) * step;
    });
  }
}

class Store {
  constructor(data) {
    this.data = data;
    this.kept = new Map();
    const { sites } = data;
    const { layer, head } = sites;
    this.labels = sites.case ?? layer.flatMap((l) => head.map((h) => `L${l}H${h}`));
    this.places = new Map(this.labels.map((label, i) => [label, i]));
    /** Rows of the grid: a layer and its heads, or a layer's cases. */
    this.rows = sites.case
      ? [...new Set(layer)].sort((a, b) => a - b).map((l) => ({
          layer: l,
          cases: sites.case.flatMap((_, i) => (layer[i] === l ? [i] : [])),
        }))
      : layer.map((l, i) => ({ layer: l, cases: head.map((_, j) => i * head.length + j) }));
  }

  /** The text, and which tokens count. */
  async open() {
    const { text, tokens } = this.data;
    const [places, targets, others, counted] = await Promise.all(
      [text.places, text.targets, text.others, text.counted].map((part) => part && unpacked(part)),
    );
    const words = (bytes, width) => bytes && new Reader(bytes).whole(text.prompts * width, 4);
    this.words = words(places, text.positions + 1);
    this.targets = words(targets, text.positions);
    this.others = words(others, text.positions);
    this.counted = counted;
    this.fields = tokens.fields;
    const within = tokens.whole * text.positions;
    this.dense = Uint32Array.from({ length: within }, (_, i) => i).filter((i) => !counted || counted[i]);
  }

  /** A word of the text: place 0 is the first token of a prompt, 1 the target of position 0. */
  word(prompt, place) {
    return this.data.text.vocabulary[this.words[prompt * (this.data.text.positions + 1) + place]];
  }

  target(token) {
    const { text } = this.data;
    const [prompt, position] = this.split(token);
    return this.targets ? text.vocabulary[this.targets[token]] : this.word(prompt, position + 1);
  }

  other(token) {
    return this.others && this.data.text.vocabulary[this.others[token]];
  }

  split(token) {
    const { positions } = this.data.text;
    return [Math.floor(token / positions), token % positions];
  }

  once(key, find) {
    if (!this.kept.has(key)) {
      if (this.kept.size > 40) this.kept.delete(this.kept.keys().next().value);
      this.kept.set(key, find());
    }
    return this.kept.get(key);
  }

  /** A head's tokens: `token` where each is in the text, `top` whether it is in the share, `columns` the numbers. */
  tokens(variant, site) {
    return this.once(`tokens ${variant} ${site}`, () => this.readTokens(variant, site));
  }

  async readTokens(variant, site) {
    const [extra, text] = this.data.tokens.variants[variant][site];
    const reader = new Reader(await unpacked(text));
    const empty = reader.bytes.length === 0;
    const beyond = reader.growing(extra);
    const count = empty ? 0 : this.dense.length + extra;
    const token = new Uint32Array(count);
    if (!empty) token.set(this.dense);
    token.set(beyond, count - extra);
    const top = reader.whole(count, 1);
    const columns = Object.fromEntries(this.fields.map((f) => [f.name, reader.rounded(count, f.step)]));
    return { token, top, columns, place: new Map(Array.from(token, (t, i) => [t, i])) };
  }

  /** The clean run's numbers: name → one for each token of the first prompts. */
  clean() {
    return this.once("clean", async () => {
      const { clean } = this.data.tokens;
      const reader = new Reader(await unpacked(clean.values));
      const count = clean.prompts * this.data.text.positions;
      return clean.fields.map((field, i) => ({
        ...field,
        step: clean.steps[i],
        values: reader.rounded(count, clean.steps[i]),
      }));
    });
  }

  /** What is promoted and demoted on each token of a head: token → words of its write, and of the changes. */
  promoted(variant, site) {
    return this.once(`promoted ${variant} ${site}`, async () => {
      const found = new Map();
      const { vocabulary, count, changed, step, tokens } = this.data.promoted;
      const [size, text] = tokens[variant][site];
      const reader = new Reader(await unpacked(text));
      const token = reader.growing(size);
      const words = [count, count, changed * count, changed * count].map((n) => reader.whole(size * n, 4));
      const effects = [count, count, changed].map((n) => reader.rounded(size * n, step));
      const component = reader.whole(size * changed, 2);
      const row = (i, j, n) => Array.from(words[j].subarray(i * n, (i + 1) * n), (w) => vocabulary[w]);
      const parts = (list) => Array.from({ length: changed }, (_, k) => list.slice(k * count, (k + 1) * count));
      token.forEach((t, i) => {
        const own = [0, 1].map((j) => row(i, j, count).map((w, k) => [w, effects[j][i * count + k]]));
        const [up, down] = [2, 3].map((j) => parts(row(i, j, changed * count)));
        const changes = up.map((promoted, k) => ({ component: component[i * changed + k], effect: effects[2][i * changed + k], promoted, demoted: down[k] }));
        found.set(t, { own, changes: changes.filter(({ effect }) => effect !== 0), step });
      });
      return found;
    });
  }

  /** Which components changed most on each token of a head: token → rows of [component, change], and the others' sum. */
  components(variant, site) {
    return this.once(`components ${variant} ${site}`, async () => {
      const found = new Map();
      const { step, shown, cases } = this.data.repairs.tokens[variant];
      const [count, text] = cases[site];
      const reader = new Reader(await unpacked(text));
      const token = reader.growing(count);
      const index = reader.whole(count * shown, 2);
      const change = reader.rounded(count * shown, step);
      const rest = reader.rounded(count, step);
      token.forEach((t, i) => {
        const rows = Array.from({ length: shown }, (_, j) => [index[i * shown + j], change[i * shown + j]]);
        found.set(t, { rows: rows.filter(([, value]) => value !== 0), rest: rest[i], step });
      });
      return found;
    });
  }
}
