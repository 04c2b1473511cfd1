/** The keys that work anywhere on the page, and the help that lists them. */

import { find } from "./dom.js";

const isTyping = (target) => target.matches("input:not([type=range]):not([type=checkbox]), textarea, select");

/** @param {{[key: string]: () => void}} actions by key, "ctrl+z" and the like. An action may return false: not its key now. */
export function startKeys(actions) {
  addEventListener("keydown", (event) => {
    if (event.altKey || event.defaultPrevented || isTyping(event.target) || document.querySelector("dialog[open]")) return;
    const control = event.ctrlKey || event.metaKey ? "ctrl+" : "";
    const shift = event.shiftKey && control ? "shift+" : "";
    // Space presses the button, or ticks the box, that has the focus.
    if (event.key === " " && event.target.matches("button, input[type=checkbox]")) return;
    const action = actions[`${control}${shift}${event.key.toLowerCase()}`];
    if (action && action() !== false) event.preventDefault();
  });
  find("help").addEventListener("click", showHelp);
}

export function showHelp() {
  find("help-dialog").showModal();
}

/** Asks for the token until it is right. @param {(token: string) => Promise<boolean>} login */
export function askForToken(login) {
  const dialog = find("token-dialog");
  const field = find("token");
  const problem = find("token-problem");
  problem.hidden = true;
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const submitted = async (event) => {
      event.preventDefault();
      let words = "That is not the server's token. See whether all of it was copied.";
      try {
        if (await login(field.value.trim())) {
          dialog.close();
          return;
        }
      } catch (error) {
        words = `${error.message} See whether omniops serve is still running.`;
      }
      problem.textContent = words;
      problem.hidden = false;
      field.select();
    };
    const form = find("token-form");
    form.addEventListener("submit", submitted);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", submitted);
        resolve(dialog.dataset.cancelled !== "true");
        delete dialog.dataset.cancelled;
      },
      { once: true },
    );
    dialog.addEventListener("cancel", () => (dialog.dataset.cancelled = "true"), { once: true });
  });
}
