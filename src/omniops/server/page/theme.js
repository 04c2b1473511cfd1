/** Light and dark: as the system says, until the button says otherwise. */

import { announce, find } from "./dom.js";

const NAMES = { auto: "as the system", light: "light", dark: "dark" };

function apply(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = find("theme");
  button.setAttribute("aria-label", `Theme: ${NAMES[theme]}`);
  button.title = `Theme: ${NAMES[theme]}`;
}

function stored() {
  try {
    const theme = localStorage.getItem("omniops.theme");
    return theme in NAMES ? theme : "auto";
  } catch {
    return "auto";
  }
}

export function startTheme() {
  let theme = stored();
  apply(theme);
  find("theme").addEventListener("click", () => {
    const names = Object.keys(NAMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    apply(theme);
    announce(`Theme: ${NAMES[theme]}`);
    try {
      localStorage.setItem("omniops.theme", theme);
    } catch {
      // It lasts as long as the page.
    }
  });
}
