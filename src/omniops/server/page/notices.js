/** What goes wrong, in words with what to do about it. */

import { find, icon, make } from "./dom.js";

/**
 * Shows a notice until it is closed, or one of its actions is taken.
 * @param {{title: string, text: string, actions?: [string, () => void][], kind?: "problem" | "note"}} notice
 * @returns {() => void} closes it
 */
export function notify({ title, text, actions = [], kind = "problem" }) {
  const list = find("notices");
  // The same words twice are one notice.
  for (const shown of list.children) if (shown.dataset.words === title + text) shown.remove();
  const close = () => box.remove();
  const buttons = actions.map(([words, act]) =>
    make("button", { type: "button", class: "button small", onclick: () => (close(), act()) }, words),
  );
  const box = make(
    "div",
    { class: `notice ${kind}`, role: kind === "problem" ? "alert" : "status" },
    make("div", { class: "notice-words" }, make("strong", {}, title), make("p", {}, text)),
    ...buttons,
    make("button", { type: "button", class: "button icon", "aria-label": "Close", onclick: close }, icon("close")),
  );
  box.dataset.words = title + text;
  list.append(box);
  while (list.children.length > 3) list.firstElementChild.remove();
  return close;
}

export function clearNotices() {
  find("notices").replaceChildren();
}

/** What a person is told about an ApiError: {title, text}. */
export function explain(error) {
  const said = error.message;
  switch (error.kind) {
    case "unreachable":
      return { title: "The server cannot be reached", text: `${said} See whether omniops serve is still running, then try again.` };
    case "busy":
      return { title: "The server is busy", text: `${sentence(said)} Try again in a moment.` };
    case "token":
      return { title: "Not signed in", text: "The server asks for its token. Reload the page to enter it." };
    case "large":
      return { title: "The file is too large", text: `${sentence(said)} Choose a smaller one, or cut it first.` };
    case "session":
      return { title: "The session ended", text: `${sentence(said)} Start again: your clicks are kept and are made once more.` };
    case "file":
      return { title: "That is not there any more", text: `${sentence(said)} Open another file.` };
    default:
      return { title: "That did not work", text: `${sentence(said)} What you did last was taken back.` };
  }
}

/** With a capital, and a full stop. */
export function sentence(words) {
  const begun = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
