/** The page of the server's interface: what its own OpenAPI document says, for people to read. */

import { attachThemeSwitch } from "dmax/theme.js";
import { element } from "dmax/dom.js";

const DOCUMENT = "/openapi.json";
const DEEPEST = 4; // levels of objects within objects that are written out

/**
 * The schema that a `$ref` points to, or the schema itself.
 *
 * @param {object} api  an OpenAPI document
 * @param {object} schema
 */
export function resolved(api, schema) {
  if (!schema.$ref) return schema;
  const path = schema.$ref.replace(/^#\//, "").split("/");
  return path.reduce((part, name) => part?.[name], api) ?? {};
}

/** What a schema allows, in a few words: "text or list of texts". */
export function described(api, schema, depth = 0) {
  const own = resolved(api, schema);
  if (own.const !== undefined) return JSON.stringify(own.const);
  if (own.enum) return own.enum.map((value) => JSON.stringify(value)).join(" or ");
  const choices = own.anyOf ?? own.oneOf;
  if (choices) {
    const words = choices.map((choice) => described(api, choice, depth));
    return [...new Set(words)].join(" or ");
  }
  if (own.type === "array") {
    return depth < DEEPEST ? `list of ${described(api, own.items ?? {}, depth + 1)}` : "list";
  }
  const names = { string: "text", integer: "whole number", boolean: "true or false", null: "null" };
  return names[own.type] ?? own.type ?? "anything";
}

/**
 * The fields of an object, those of objects within it after their own with a dotted name.
 *
 * @returns {{ name: string, type: string, required: boolean, text: string, limits: string }[]}
 */
export function fieldsOf(api, schema, prefix = "", depth = 0) {
  const own = resolved(api, schema);
  const required = new Set(own.required ?? []);
  return Object.entries(own.properties ?? {}).flatMap(([name, property]) => {
    const full = `${prefix}${name}`;
    const field = {
      name: full,
      type: described(api, property),
      required: required.has(name),
      text: property.description ?? resolved(api, property).description ?? "",
      limits: limitsOf(api, property),
    };
    const inner = objectIn(api, property);
    if (!inner || depth === DEEPEST) return [field];
    return [field, ...fieldsOf(api, inner.schema, `${full}${inner.isList ? "[]" : ""}.`, depth + 1)];
  });
}

/** The object that a field holds, be it one of several choices or in a list; null without one. */
function objectIn(api, schema) {
  const own = resolved(api, schema);
  if (own.properties) return { schema: own, isList: false };
  if (own.type === "array") {
    const inner = objectIn(api, own.items ?? {});
    return inner && { schema: inner.schema, isList: true };
  }
  for (const choice of own.anyOf ?? own.oneOf ?? []) {
    const inner = objectIn(api, choice);
    if (inner) return inner;
  }
  return null;
}

function limitsOf(api, schema) {
  const own = resolved(api, schema);
  const bounds = [own, ...(own.anyOf ?? [])];
  const find = (name) => bounds.map((each) => each[name]).find((value) => value !== undefined);
  const said = [
    ["from", find("minimum")],
    ["above", find("exclusiveMinimum")],
    ["to", find("maximum")],
    ["default", find("default")],
  ];
  return said
    .filter(([, value]) => value !== undefined && value !== null)
    .map(([word, value]) => `${word} ${JSON.stringify(value)}`)
    .join(", ");
}

function fieldTable(caption, fields) {
  const rows = fields.map((field) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, field.name)),
      element("td", {}, field.type, field.required ? " (required)" : ""),
      element("td", {}, [field.text, field.limits].filter(Boolean).join(" · ")),
    ),
  );
  const heads = ["field", "type", "meaning"].map((head) => element("th", { scope: "col" }, head));
  return element(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...rows),
    ),
  );
}

function jsonSchema(content) {
  return content?.content?.["application/json"]?.schema;
}

function operation(api, path, method, details) {
  const parts = [
    element(
      "h2",
      { id: details.operationId ?? `${method}-${path}` },
      element("span", { class: "method" }, method.toUpperCase()),
      " ",
      element("code", {}, path),
    ),
    element("p", {}, details.description || details.summary || ""),
  ];
  const body = jsonSchema(details.requestBody);
  if (body) parts.push(fieldTable("Request", fieldsOf(api, body)));
  for (const [status, response] of Object.entries(details.responses ?? {})) {
    parts.push(element("p", {}, element("strong", {}, status), ` ${response.description ?? ""}`));
    const schema = jsonSchema(response);
    const fields = schema && status.startsWith("2") ? fieldsOf(api, schema) : [];
    if (fields.length) parts.push(fieldTable(`Response ${status}`, fields));
  }
  return element("section", { class: "panel" }, ...parts);
}

/** Fill an element with all operations of a document. */
export function showReference(target, api) {
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, details]) => operation(api, path, method, details)),
  );
  target.replaceChildren(element("p", {}, api.info.description ?? ""), ...operations);
}

async function start() {
  attachThemeSwitch(document.getElementById("theme"));
  const target = document.getElementById("reference");
  const response = await fetch(DOCUMENT);
  target.removeAttribute("aria-busy");
  if (!response.ok) {
    target.textContent = `The server answered ${response.status} for ${DOCUMENT}.`;
    return;
  }
  showReference(target, await response.json());
}

start();
