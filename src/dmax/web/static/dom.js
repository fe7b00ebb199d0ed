/** Making elements. Texts become text nodes, so nothing in them is ever read as markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 *
 * @param {string} tag
 * @param {Record<string, string | number | boolean | null>} attributes  true: one without a value;
 *   false and null leave it out
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Set a text, and leave the node alone if it is there already. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Call `redraw` whenever the width of an element changes, and once at the start. */
export function onResize(node, redraw) {
  let width = -1;
  const observer = new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width === width) return;
    width = contentRect.width;
    redraw();
  });
  observer.observe(node);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children);
  return node;
}
