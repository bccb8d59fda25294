// The canvas of a diffusion model: what each step wrote, live, and again with a slider.
import { make } from "./elements.js";
import { say, t } from "./i18n.js";

let hasCanvas = false;

/** Say whether the model is one that writes on a canvas. */
export function expectCanvas(has) {
  hasCanvas = has;
}

/** The fields of a request that has its answer come with the canvas, where there is one. */
export function canvasOptions() {
  return hasCanvas ? { stream_options: { include_canvas: true } } : {};
}

/** One answer's canvas, hidden until its first step; `element` shows the step that the slider stands at. */
export class CanvasView {
  #steps = []; // the canvas after each step: a text for each token, null for a mask
  #cells = make("p", { className: "cells", ariaHidden: "true", translate: false });
  #slider = make("input", { type: "range", min: 1, max: 1, attributes: { "data-i18n-aria-label": "canvas", "aria-label": t("canvas") } });
  #label = make("output", { ariaLive: "off" });
  element = make("div", { className: "canvas", hidden: true }, this.#cells, this.#slider, this.#label);

  constructor() {
    this.#slider.addEventListener("input", () => this.#show());
  }

  /** Take in a step; it is shown unless somebody looks at an earlier one. */
  add(cells) {
    const follows = this.#slider.value === this.#slider.max;
    this.#steps.push(cells);
    this.element.hidden = false;
    this.#slider.max = this.#steps.length;
    if (follows) this.#slider.value = this.#slider.max;
    this.#show();
  }

  #show() {
    const step = Number(this.#slider.value);
    const before = this.#steps[step - 2] ?? [];
    this.#cells.replaceChildren(
      ...this.#steps[step - 1].map((text, place) => {
        if (text === null) return make("i");
        return make(typeof before[place] === "string" ? "span" : "b", { textContent: text });
      }),
    );
    say(this.#label, "canvas_step", { step, all: this.#steps.length });
    this.#slider.setAttribute("aria-valuetext", this.#label.textContent);
  }
}
