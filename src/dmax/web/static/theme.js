/** Light and dark: what the system says, until a switch is pressed. theme.css has the colours. */

const KEY = "dmax-theme";
const changed = new EventTarget();
const system = matchMedia("(prefers-color-scheme: dark)");

system.addEventListener("change", announce);

/**
 * Make a button switch between light and dark. The choice is kept where the page may keep things.
 *
 * @param {HTMLButtonElement} button
 */
export function attachThemeSwitch(button) {
  const kept = recall();
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    remember(document.documentElement.dataset.theme);
    announce();
  });
  onThemeChange(label);
  label();
}

/** Whether the page is dark now. */
export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : system.matches;
}

/** Call `redraw` when the colours change: a canvas has to be painted anew. */
export function onThemeChange(redraw) {
  changed.addEventListener("change", redraw);
}

/**
 * Colours of theme.css as [red, green, blue], for what CSS cannot paint.
 *
 * @param {HTMLElement} node  where they hold
 * @param {string[]} names  of variables, such as "accent"
 * @returns {Record<string, number[]>}
 */
export function palette(node, names) {
  const probe = document.createElement("span");
  node.append(probe);
  const colours = names.map((name) => {
    probe.style.setProperty("color", `var(--${name})`);
    return [name, getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number)];
  });
  probe.remove();
  return Object.fromEntries(colours);
}

function announce() {
  changed.dispatchEvent(new Event("change"));
}

// A page in a sandboxed frame, as in a notebook, has no storage: reading it raises SecurityError.
function recall() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function remember(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // The choice holds for this page alone.
  }
}
