// How answers are sampled. A slider that was never moved says nothing: the model's own setting counts.
import { byId } from "./elements.js";
import { number, onLanguage, say } from "./i18n.js";

const SLIDERS = { temperature: 2, top_p: 2, top_k: 0, max_tokens: 0 }; // name → decimals

export function setUpSettings() {
  for (const name of Object.keys(SLIDERS)) {
    byId(name).addEventListener("input", () => {
      byId(name).dataset.chosen = "";
      show(name);
    });
  }
  byId("settings-reset").addEventListener("click", () => {
    for (const name of Object.keys(SLIDERS)) {
      byId(name).value = byId(name).defaultValue;
      delete byId(name).dataset.chosen;
      show(name);
    }
    byId("seed").value = "";
  });
  onLanguage(() => Object.keys(SLIDERS).forEach(show));
}

function show(name) {
  const [slider, output] = [byId(name), byId(`${name}-shown`)];
  if ("chosen" in slider.dataset) {
    delete output.dataset.i18n;
    output.textContent = number(slider.valueAsNumber, SLIDERS[name]);
  } else say(output, "models_own");
  slider.setAttribute("aria-valuetext", output.textContent);
}

/** The sampling fields of a request's body: those that somebody chose. */
export function sampling() {
  const chosen = Object.keys(SLIDERS).filter((name) => "chosen" in byId(name).dataset);
  const fields = Object.fromEntries(chosen.map((name) => [name, byId(name).valueAsNumber]));
  const seed = byId("seed").valueAsNumber;
  return Number.isNaN(seed) ? fields : { ...fields, seed };
}

/** The system prompt as the beginning of a conversation. */
export function systemMessages() {
  const content = byId("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}
