// Puts the parts together: the engine's states go to those who show them, the switches to those who must know.
import { askKeyWith } from "./api.js";
import { expectCanvas } from "./canvas.js";
import { setUpChat, stop } from "./chat.js";
import { colourDemo, setUpDemo, stopDemo } from "./demo.js";
import { byId } from "./elements.js";
import { watch } from "./engine.js";
import { LANGUAGES, say, setLanguage } from "./i18n.js";
import { drawLegend, Picture } from "./picture.js";
import { Queues } from "./queues.js";
import { setUpSettings } from "./settings.js";
import { setUpTools } from "./tools.js";

const picture = new Picture({
  canvas: byId("picture"),
  readout: byId("readout"),
  summary: byId("kv-summary"),
  fold: byId("fold"),
});
const queues = new Queues((requestId) => picture.highlight(requestId));

setUpSettings();
setUpTools();
setUpChat();
setUpDemo();
setUpLanguage();
setUpTheme();
askKeyWith(askForKey);

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("key-dialog").open) stop() || stopDemo();
});

// A browser may keep a page that is left, with its requests, in case somebody comes back to it.
addEventListener("pagehide", () => {
  stop();
  stopDemo();
});

watch(
  (state) => {
    byId("model").textContent = state.model;
    say(byId("explain-blocks"), "explain_blocks", { size: state.block_size });
    expectCanvas(state.has_canvas);
    picture.show(state);
    queues.show(state);
    colourDemo(state);
  },
  (key, values) => {
    byId("connection").dataset.state = key;
    byId("engine").toggleAttribute("data-stale", key !== "connection_live");
    say(byId("connection-text"), key, values);
  },
);

function setUpLanguage() {
  const choose = (language) => {
    remember("mini-infer-language", language);
    for (const button of byId("language").children) {
      button.ariaPressed = String(button.dataset.language === language);
    }
    setLanguage(language);
  };
  for (const button of byId("language").children) {
    button.addEventListener("click", () => choose(button.dataset.language));
  }
  const remembered = recall("mini-infer-language");
  const own = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  choose(LANGUAGES.includes(remembered) ? remembered : own);
}

function setUpTheme() {
  const select = byId("theme");
  const repaint = () => {
    document.documentElement.dataset.theme = select.value;
    picture.repaint();
    drawLegend(document.querySelectorAll("#legend canvas"));
  };
  select.value = recall("mini-infer-theme") ?? "auto";
  if (!select.value) select.value = "auto";
  select.addEventListener("change", () => {
    remember("mini-infer-theme", select.value);
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  repaint();
}

/** The key that a person types into the dialog; null if it is closed without one. */
function askForKey(wasWrong) {
  const [dialog, input] = [byId("key-dialog"), byId("key")];
  byId("key-wrong").hidden = !wasWrong;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "use" && input.value ? input.value : null),
      { once: true },
    );
  });
}

// Where a browser keeps nothing, the switches work all the same.
function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {}
}

function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}
