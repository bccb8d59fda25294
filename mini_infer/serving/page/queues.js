// Who runs, who waits, and the engine's totals.
import { byId, make } from "./elements.js";
import { isMine } from "./engine.js";
import { number, say, t } from "./i18n.js";
import { colourOf, nameOf } from "./owners.js";

const MOST_ROWS = 24; // of each queue
const WINDOW = 2000; // ms over which the rate is taken

/** Show the queues; `onPoint` gets the request whose row is pointed at, or null. */
export class Queues {
  constructor(onPoint) {
    this.onPoint = onPoint;
    this.samples = []; // [ms, tokens generated so far], of the last WINDOW
    this.rows = new Map([[byId("running"), new Map()], [byId("waiting"), new Map()]]);
    setInterval(() => this.#showRate(), 500);
  }

  show(state) {
    this.#fill(byId("running"), state.running);
    this.#fill(byId("waiting"), state.waiting);
    for (const name of ["running", "waiting"]) {
      byId(`${name}-count`).textContent = number(state[name].length);
      byId(`${name}-none`).hidden = state[name].length > 0;
    }
    byId("engine").dataset.running = state.running.length;
    byId("engine").dataset.waiting = state.waiting.length;
    byId("engine").dataset.swapped = state.stats.num_swapped;
    this.state = state;
    this.samples.push([performance.now(), state.stats.num_generated_tokens]);
    this.#showTotals();
  }

  #showTotals() {
    const { stats, counts, num_blocks } = this.state;
    const shown = {
      usage: `${number((100 * counts.used) / num_blocks, counts.used && counts.used < num_blocks ? 1 : 0)}%`,
      hits: `${number(100 * stats.prefix_hit_rate)}%`,
      preemptions: number(stats.num_swap_preemptions + stats.num_recompute_preemptions),
      generated: number(stats.num_generated_tokens),
      peak: number(stats.peak_used_blocks),
    };
    for (const [name, text] of Object.entries(shown)) byId(`total-${name}`).textContent = text;
    byId("usage").style.setProperty("--share", counts.used / num_blocks);
    this.#showRate();
  }

  #showRate() {
    const now = performance.now();
    while (this.samples.length > 1 && now - this.samples[1][0] > WINDOW) this.samples.shift();
    if (this.samples.length < 2) return;
    const tokens = this.samples.at(-1)[1] - this.samples[0][1];
    const rate = (Math.max(tokens, 0) * 1000) / Math.max(now - this.samples[0][0], WINDOW / 2);
    byId("total-rate").textContent = number(rate);
  }

  /** Bring a list's rows up to date; rows are kept for as long as their sequence is there. */
  #fill(list, sequences) {
    const rows = this.rows.get(list);
    const seen = new Set();
    const ordered = sequences.slice(0, MOST_ROWS).map((sequence, i) => {
      const before = sequences.slice(0, i).filter((other) => other.request_id === sequence.request_id).length;
      const key = `${sequence.request_id} ${before}`; // a request may have several sequences
      seen.add(key);
      if (!rows.has(key)) rows.set(key, this.#makeRow(sequence.request_id));
      fillRow(rows.get(key), sequence);
      return rows.get(key);
    });
    for (const [key, row] of rows) {
      if (seen.has(key)) continue;
      if (row.matches(":hover, :focus")) this.onPoint(null);
      row.remove();
      rows.delete(key);
    }
    ordered.forEach((row, i) => list.children[i] === row || list.insertBefore(row, list.children[i] ?? null));
    const rest = byId(`${list.id}-more`);
    rest.hidden = sequences.length <= MOST_ROWS;
    say(rest, "more", { n: sequences.length - MOST_ROWS });
  }

  #makeRow(requestId) {
    const row = make(
      "li",
      { tabIndex: 0 },
      make("span", { className: "swatch", ariaHidden: "true" }),
      make("span", { className: "name" }),
      make("span", { className: "badge", hidden: true, say: ["swapped"] }),
      make("progress", { max: 1, attributes: { "data-i18n-aria-label": "progress_label", "aria-label": t("progress_label") } }),
      make("span", { className: "numbers" }, make("span"), make("span"), make("span")),
    );
    row.addEventListener("pointerenter", () => this.onPoint(requestId));
    row.addEventListener("pointerleave", () => this.onPoint(null));
    row.addEventListener("focus", () => this.onPoint(requestId));
    row.addEventListener("blur", () => this.onPoint(null));
    return row;
  }
}

function fillRow(row, sequence) {
  const [swatch, name, badge, progress, numbers] = row.children;
  const [prompt, generated, blocks] = numbers.children;
  const done = Math.min(sequence.num_computed_tokens, sequence.num_prompt_tokens);
  row.dataset.requestId = sequence.request_id;
  row.classList.toggle("mine", isMine(sequence));
  swatch.style.setProperty("--swatch", `var(${colourOf(sequence.request_id)})`);
  row.style.setProperty("--swatch", `var(${colourOf(sequence.request_id)})`);
  say(name, ...nameOf(sequence.request_id));
  badge.hidden = !sequence.swapped;
  progress.value = done / sequence.num_prompt_tokens;
  say(prompt, "progress_prompt", { done, all: sequence.num_prompt_tokens });
  const numGenerated = sequence.num_tokens - sequence.num_prompt_tokens;
  say(generated, "progress_generated", { n: numGenerated });
  say(blocks, "progress_blocks", { n: sequence.blocks.length });
  generated.hidden = numGenerated === 0;
  blocks.hidden = sequence.blocks.length === 0;
}
