// The KV cache as a picture: one cell per block, in the order of their ids. Long stretches of free blocks fold away.
import { filledSlots, isMine } from "./engine.js";
import { onLanguage, say, t } from "./i18n.js";
import { colourOf, nameOf, NUM_COLOURS } from "./owners.js";

const COLUMNS = [16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384];
const LARGEST_CELL = 46; // pixels, as everything below
const SMALLEST_CELL = 3;
const DETAILED_CELL = 9; // below this a cell is a plain dot
const HEIGHT = 330;
const GUTTER = 44; // for the number of each row's first block
const FOLD_HEIGHT = 22;
const UNFOLDED_FOR = 20_000; // ms after a row's last block was freed, so that the picture does not jump

/**
 * Draw one cell at (x, y).
 *
 * @param look kind: "free", "cached" or "used"; faded: stands back. Of a used one also colours: of its owners;
 * filled: the share of its slots, 0 to 1; mine, shared: how it is marked.
 */
function drawCell(pen, palette, x, y, size, look) {
  pen.globalAlpha = look.faded ? 0.22 : 1;
  (size < DETAILED_CELL ? drawDot : drawBlock)(pen, palette, x, y, size, look);
  pen.globalAlpha = 1;
}

function drawDot(pen, palette, x, y, size, look) {
  const side = size - (size > 4 ? 1 : 0.5);
  pen.fillStyle = look.kind === "used" ? look.colours[0] : palette[look.kind === "cached" ? "--cached-line" : "--cached"];
  pen.fillRect(x, y, side, side);
  if (look.mine && size >= 5) {
    pen.strokeStyle = palette["--ink"];
    pen.lineWidth = 1;
    pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  }
  if (look.shared) {
    pen.fillStyle = palette["--surface"];
    pen.fillRect(x + side / 2 - side / 6, y + side / 2 - side / 6, side / 3, side / 3);
  }
}

function drawBlock(pen, palette, x, y, size, look) {
  const gap = Math.max(1.5, size * 0.07);
  const [left, top, side] = [x + gap, y + gap, size - 2 * gap];
  const radius = Math.min(5, side * 0.2);
  pen.lineWidth = 1;
  pen.save();
  pen.beginPath();
  pen.roundRect(left, top, side, side, radius);
  if (look.kind === "free") {
    pen.fillStyle = palette["--cell"];
    pen.fill();
    pen.strokeStyle = palette["--cell-line"];
    pen.stroke();
  } else if (look.kind === "cached") {
    pen.fillStyle = palette["--cached"];
    pen.fill();
    pen.clip();
    pen.beginPath();
    for (let at = -side; at < side; at += Math.max(4, side / 4)) {
      pen.moveTo(left + at, top + side);
      pen.lineTo(left + at + side, top);
    }
    pen.strokeStyle = palette["--cached-line"];
    pen.lineWidth = 1.5;
    pen.stroke();
  } else {
    const alpha = pen.globalAlpha;
    pen.clip();
    look.colours.forEach((colour, i) => {
      const [from, width] = [left + (side * i) / look.colours.length, side / look.colours.length];
      pen.fillStyle = colour;
      pen.globalAlpha = alpha * 0.28;
      pen.fillRect(from, top, width, side);
      pen.globalAlpha = alpha;
      pen.fillRect(from, top + side * (1 - look.filled), width, side * look.filled);
    });
  }
  pen.restore();
  if (look.mine) {
    pen.beginPath();
    pen.roundRect(left + 1, top + 1, side - 2, side - 2, radius);
    pen.strokeStyle = palette["--ink"];
    pen.lineWidth = 2;
    pen.stroke();
  }
  if (look.shared) {
    const [middleX, middleY, reach] = [x + size / 2, y + size / 2, side * 0.26];
    pen.beginPath();
    pen.moveTo(middleX, middleY - reach);
    pen.lineTo(middleX + reach, middleY);
    pen.lineTo(middleX, middleY + reach);
    pen.lineTo(middleX - reach, middleY);
    pen.closePath();
    pen.fillStyle = palette["--surface"];
    pen.fill();
    pen.strokeStyle = palette["--ink"];
    pen.lineWidth = 1.25;
    pen.stroke();
  }
}

const PALETTE = ["--cell", "--cell-line", "--cached", "--cached-line", "--surface", "--ink", "--muted", "--focus", "--mine"];
for (let i = 0; i < NUM_COLOURS; i++) PALETTE.push(`--owner-${i}`);

// As registered colours they are read as light or dark already, and not as the light-dark() that the style sheet says.
for (const name of PALETTE) {
  CSS.registerProperty({ name, syntax: "<color>", inherits: true, initialValue: "gray" });
}

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(PALETTE.map((name) => [name, style.getPropertyValue(name)]));
}

/** Give a canvas as many pixels as the screen shows of it. */
function sharpen(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== columns || canvas.height !== rows) {
    canvas.width = columns;
    canvas.height = rows;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

/**
 * Where every block goes: the largest cells for which the picture is not too high.
 *
 * @param isOpen whether the row of blocks first … last (excluded) must be shown.
 * @returns { columns, cell, height, rows: [{ first, top }], folds: [{ count, top }] }
 */
function lay(width, numBlocks, isOpen) {
  let layout;
  for (const columns of COLUMNS) {
    const cell = Math.min(LARGEST_CELL, Math.floor(((width - GUTTER) / columns) * 2) / 2);
    if (layout && cell < SMALLEST_CELL) break;
    layout = { columns, cell, rows: [], folds: [], height: 0 };
    for (let first = 0; first < numBlocks; first += columns) {
      const last = Math.min(first + columns, numBlocks);
      if (isOpen(first, last)) {
        layout.rows.push({ first, top: layout.height });
        layout.height += cell;
      } else {
        const fold = layout.folds.at(-1);
        if (fold?.last === first) {
          fold.last = last;
          fold.count += last - first;
        } else {
          layout.folds.push({ count: last - first, last, top: layout.height });
          layout.height += FOLD_HEIGHT;
        }
      }
    }
    if (layout.height <= HEIGHT) break;
  }
  return layout;
}

export class Picture {
  /**
   * @param canvas the picture, which can be focused; @param readout where a block is put into words;
   * @param summary where all of them are; @param fold the checkbox that folds free blocks away.
   */
  constructor({ canvas, readout, summary, fold }) {
    Object.assign(this, { canvas, readout, summary, fold });
    this.state = null;
    this.cursor = null; // the block that is pointed at
    this.spotlight = null; // the request whose blocks stand out
    this.touched = new Map(); // block → when it was last not free
    this.layout = null;
    this.palette = readPalette();
    this.pending = false;

    new ResizeObserver(() => this.refresh()).observe(canvas.parentElement);
    fold.addEventListener("change", () => this.refresh());
    canvas.addEventListener("pointermove", (event) => this.#point(this.#blockAt(event)));
    canvas.addEventListener("pointerdown", (event) => this.#point(this.#blockAt(event)));
    canvas.addEventListener("pointerleave", () => document.activeElement === canvas || this.#point(null));
    canvas.addEventListener("focus", () => this.#point(this.cursor ?? 0));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#move(event));
    onLanguage(() => {
      this.refresh();
      this.#describe();
    });
  }

  /** The colours have changed. */
  repaint() {
    this.palette = readPalette();
    this.refresh();
  }

  show(state) {
    if (this.state?.num_blocks !== state.num_blocks) {
      this.cursor = null;
      this.touched.clear();
      this.fold.checked = state.num_blocks > 1024;
    }
    this.state = state;
    const now = performance.now();
    for (const block of [...state.holders.keys(), ...state.cached]) this.touched.set(block, now);
    for (const [block, when] of this.touched) if (now - when > UNFOLDED_FOR) this.touched.delete(block);

    const { counts } = state;
    say(this.summary, "kv_summary", { total: state.num_blocks, size: state.block_size, ...counts });
    Object.assign(this.canvas.dataset, counts, { total: state.num_blocks });
    this.canvas.setAttribute("aria-valuemax", state.num_blocks - 1);
    this.#describe();
    this.refresh();
  }

  /** Let one request's blocks stand out; null for none. */
  highlight(requestId) {
    this.spotlight = requestId;
    this.refresh();
  }

  refresh() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      if (this.state) this.#draw();
    });
  }

  #draw() {
    const { state, palette } = this;
    const width = this.canvas.parentElement.clientWidth;
    if (width === 0) return;
    const occupied = [...this.touched.keys()].sort((a, b) => a - b);
    let next = 0; // rows are laid from the top, so one pass over the occupied blocks will do
    const isOpen = (first, last) => {
      if (first === 0) next = 0;
      while (occupied[next] < first) next++;
      const pointed = this.cursor !== null && first <= this.cursor && this.cursor < last;
      return !this.fold.checked || first < 64 || pointed || occupied[next] < last;
    };
    this.layout = lay(width, state.num_blocks, isOpen);
    const { columns, cell, rows, folds, height } = this.layout;
    const pen = sharpen(this.canvas, width, height);

    pen.font = "10.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    let labelledAt = -Infinity;
    for (const { first, top } of rows) {
      if (top - labelledAt >= 14 && top + 12 <= height) {
        pen.fillStyle = palette["--muted"];
        pen.fillText(String(first), GUTTER - 8, top + Math.max(cell, 12) / 2);
        labelledAt = top;
      }
      for (let block = first; block < Math.min(first + columns, state.num_blocks); block++) {
        drawCell(pen, palette, GUTTER + (block - first) * cell, top, cell, this.#look(block));
      }
    }
    pen.textAlign = "left";
    pen.font = "11.5px system-ui, sans-serif";
    for (const { count, top } of folds) {
      const middle = top + FOLD_HEIGHT / 2;
      const text = t("kv_folded", { n: count });
      pen.fillStyle = palette["--muted"];
      pen.fillText(text, GUTTER + 2, middle);
      pen.strokeStyle = palette["--cell-line"];
      pen.lineWidth = 1;
      pen.setLineDash([2, 4]);
      pen.beginPath();
      pen.moveTo(GUTTER + 12 + pen.measureText(text).width, middle + 0.5);
      pen.lineTo(GUTTER + columns * cell, middle + 0.5);
      pen.stroke();
      pen.setLineDash([]);
    }
    this.#drawCursor(pen);
  }

  #look(block) {
    const holders = this.state.holders.get(block);
    const spotlit = this.spotlight !== null;
    if (!holders) return { kind: this.state.cached.has(block) ? "cached" : "free", faded: spotlit };
    return {
      kind: "used",
      colours: [...new Set(holders.map((sequence) => colourOf(sequence.request_id)))]
        .slice(0, 3)
        .map((name) => this.palette[name]),
      filled: Math.max(...holders.map((s) => filledSlots(s, block, this.state.block_size))) / this.state.block_size,
      mine: holders.some(isMine),
      shared: holders.length > 1,
      faded: spotlit && !holders.some((sequence) => sequence.request_id === this.spotlight),
    };
  }

  #drawCursor(pen) {
    if (this.cursor === null) return;
    const { columns, cell, rows } = this.layout;
    const row = rows.find(({ first }) => first <= this.cursor && this.cursor < first + columns);
    if (!row) return;
    pen.strokeStyle = this.palette["--focus"];
    pen.lineWidth = 2.5;
    const reach = Math.max(cell - 2.5, 7);
    const middle = (cell - reach) / 2;
    pen.strokeRect(GUTTER + (this.cursor - row.first) * cell + middle, row.top + middle, reach, reach);
  }

  #blockAt(event) {
    if (!this.layout) return null;
    const { columns, cell, rows } = this.layout;
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left - GUTTER, event.clientY - bounds.top];
    const row = rows.find(({ top }) => top <= y && y < top + cell);
    const column = Math.floor(x / cell);
    if (!row || column < 0 || column >= columns) return null;
    return row.first + column < this.state.num_blocks ? row.first + column : null;
  }

  #move(event) {
    if (!this.layout || event.ctrlKey || event.metaKey || event.altKey) return;
    const { columns } = this.layout;
    const last = this.state.num_blocks - 1;
    const now = this.cursor ?? 0;
    const target = {
      ArrowRight: now + 1,
      ArrowLeft: now - 1,
      ArrowDown: now + columns,
      ArrowUp: now - columns,
      PageDown: this.#nextOccupied(now, 1),
      PageUp: this.#nextOccupied(now, -1),
      Home: 0,
      End: last,
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    if (target >= 0 && target <= last) this.#point(target);
  }

  #nextOccupied(from, step) {
    const { holders, cached, num_blocks } = this.state;
    for (let block = from + step; block >= 0 && block < num_blocks; block += step) {
      if (holders.has(block) || cached.has(block)) return block;
    }
    return from;
  }

  #point(block) {
    if (block === this.cursor) return;
    this.cursor = block;
    this.#describe();
    this.refresh();
  }

  #describe() {
    const [key, values] = this.#words(this.cursor);
    say(this.readout, key, values);
    this.canvas.setAttribute("aria-valuenow", this.cursor ?? 0);
    this.canvas.setAttribute("aria-valuetext", t(key, values));
  }

  #words(block) {
    if (block === null || !this.state) return ["kv_hint"];
    const shown = { block: String(block), size: this.state.block_size };
    const holders = this.state.holders.get(block);
    if (!holders) return [this.state.cached.has(block) ? "block_cached" : "block_free", shown];
    const filled = filledSlots(holders[0], block, this.state.block_size);
    if (holders.length === 1) return ["block_used", { ...shown, filled, owner: () => t(...nameOf(holders[0].request_id)) }];
    const owners = () => holders.map((sequence) => t(...nameOf(sequence.request_id))).join(t("owner_separator"));
    return ["block_shared", { ...shown, n: holders.length, owners }];
  }
}

/** Draw the legend's samples just as the picture draws its cells. */
export function drawLegend(samples) {
  const palette = readPalette();
  const [mine, other, another] = [palette["--mine"], palette["--owner-0"], palette["--owner-1"]];
  const looks = {
    mine: { kind: "used", colours: [mine], filled: 0.7, mine: true },
    other: { kind: "used", colours: [other], filled: 1 },
    shared: { kind: "used", colours: [other, another], filled: 1, shared: true },
    cached: { kind: "cached" },
    free: { kind: "free" },
  };
  for (const sample of samples) drawCell(sharpen(sample, 20, 20), palette, 0, 0, 20, looks[sample.dataset.look]);
}
