// Functions that the model may call, and the form of its answers: what a person asks for, and calls as they come.
import { byId, make } from "./elements.js";

// What the bundled tutor was taught to call.
const EXAMPLE = {
  lookup_term: { term: "string" },
  kv_cache_size: { layers: "integer", kv_heads: "integer", head_dim: "integer", tokens: "integer" },
  count_blocks: { tokens: "integer", block_size: "integer" },
};

const WRONG = { tools: "tools_wrong", schema: "schema_wrong" }; // what to say of a field that is no JSON

export function setUpTools() {
  byId("tools-example").addEventListener("click", () => {
    const tools = Object.entries(EXAMPLE).map(([name, parameters]) => {
      const properties = Object.fromEntries(Object.entries(parameters).map(([key, type]) => [key, { type }]));
      return { type: "function", function: { name, parameters: { type: "object", properties, required: Object.keys(parameters) } } };
    });
    byId("tools").value = `[\n${tools.map((tool) => `  ${JSON.stringify(tool)}`).join(",\n")}\n]`;
  });
}

/**
 * The fields of a request's body that say what may be called and what an answer looks like; null, and a person is
 * told, if what they wrote is no JSON.
 *
 * @param isFirst whether it answers a question; what answers results need not call again.
 */
export function toolFields(isFirst) {
  const fields = {};
  byId("tools-wrong").replaceChildren();
  for (const [name, wrong] of Object.entries(WRONG)) {
    const text = byId(name).value.trim();
    try {
      if (text) fields[name] = JSON.parse(text);
    } catch (error) {
      byId("tools-settings").open = true;
      byId("tools-wrong").append(make("p", { className: "error", say: [wrong, { message: error.message }] }));
      byId(name).focus();
      return null;
    }
  }
  const { tools, schema } = fields;
  return {
    ...(tools && { tools }),
    ...(tools && isFirst && byId("tools-required").checked && { tool_choice: "required", parallel_tool_calls: false }),
    ...(schema && { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } }),
  };
}

/** JSON on several lines; any other text as it is. */
export function laidOut(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** The calls of one answer, each on a card. */
export class Calls {
  made = []; // as messages have them

  constructor() {
    this.element = make("form", { className: "calls" });
  }

  /** Take in what a stream says of them. */
  add(pieces) {
    for (const { index, id, type, function: { name, arguments: text } } of pieces) {
      if (id) {
        this.made[index] = { id, type, function: { name, arguments: "" } };
        const title = make("code", { textContent: name, translate: false });
        const shown = make("pre", { translate: false });
        this.element.append(
          make("section", { className: "call" }, make("h4", {}, make("span", { say: ["call"] }), " ", title), shown),
        );
      }
      this.made[index].function.arguments += text ?? "";
      this.element.children[index].querySelector("pre").append(text ?? "");
    }
  }

  /** Let a person give each call's result; `give` gets the messages that tell of them. */
  askForResults(give) {
    const inputs = this.made.map((call, i) => {
      const input = make("textarea", { rows: 1, id: `result-${call.id}`, required: true });
      this.element.children[i].append(make("label", { htmlFor: input.id, say: ["call_result"] }), input);
      return input;
    });
    const button = make("button", { type: "submit", className: "small", say: ["call_give"] });
    this.element.append(button);
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      const results = inputs.map(({ value }, i) => ({ role: "tool", tool_call_id: this.made[i].id, content: value }));
      if (give(results)) this.settle();
    });
    inputs[0].focus();
  }

  /** Nothing more can be given. */
  settle() {
    for (const input of this.element.querySelectorAll("textarea")) input.readOnly = true;
    this.element.querySelector("button")?.remove();
  }
}
