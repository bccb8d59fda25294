// One language at a time: say() remembers what an element says, so that a switch can say it again.
import { STRINGS } from "./strings.js";

export const LANGUAGES = ["en", "zh"];

const values = new WeakMap(); // element → what its string is filled with
const listeners = [];
let language = "en";

/** The text of a key in the current language. Values may be functions, which are called with nothing. */
export function t(key, given = {}) {
  return STRINGS[key][language].replace(/\{(\w+)(?:\|(.*?)\|(.*?))?\}/g, (_, name, one, many) => {
    const value = typeof given[name] === "function" ? given[name]() : given[name];
    const shown = typeof value === "number" ? number(value) : value;
    return one === undefined ? shown : `${shown} ${value === 1 ? one : many}`;
  });
}

export function number(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Let an element show a string, now and after every switch. Unchanged text is left alone, for screen readers. */
export function say(element, key, given = {}) {
  element.dataset.i18n = key;
  values.set(element, given);
  const text = t(key, given);
  if (element.textContent !== text) element.textContent = text;
}

export function onLanguage(listener) {
  listeners.push(listener);
}

export function setLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  document.title = t("page_title");
  for (const element of document.querySelectorAll("[data-i18n]")) {
    say(element, element.dataset.i18n, values.get(element));
  }
  for (const attribute of ["aria-label", "placeholder"]) {
    for (const element of document.querySelectorAll(`[data-i18n-${attribute}]`)) {
      element.setAttribute(attribute, t(element.getAttribute(`data-i18n-${attribute}`)));
    }
  }
  for (const listener of listeners) listener();
}
