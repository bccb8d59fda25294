// A short way to make elements. Text goes in as text, never as HTML: what a model writes is not trusted.
import { say } from "./i18n.js";

/**
 * Make an element.
 *
 * @param properties set on it; besides, `say` is [key, values] for its text, `attributes` are set as such.
 */
export function make(tag, { say: said, attributes = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (said) say(element, ...said);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);
