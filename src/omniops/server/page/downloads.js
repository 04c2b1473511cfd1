/** The dialog of downloads: every format, with progress. */

import * as api from "./api.js";
import { announce, bytesInWords, find, icon, make } from "./dom.js";
import { sentence } from "./notices.js";

const FORMATS = [
  { format: "coco", title: "Masks as JSON", text: "COCO's run-length encoding, of each object on each frame." },
  { format: "png", title: "Masks as PNG", text: "A zip with one picture for each object and frame." },
  { format: "overlay", as: "mp4", title: "Video with masks, MP4", text: "All objects, in their colours. Plays everywhere.", video: true },
  { format: "overlay", as: "webm", title: "Video with masks, WebM", text: "The same, in a free format.", video: true },
  { format: "cutout", as: "webm", title: "Cut-out, WebM", text: "Transparent around the objects.", video: true },
  { format: "cutout", as: "mp4", title: "Cut-out, MP4", text: "MP4 knows no transparency: on black.", video: true },
  { format: "overlay", as: "png", title: "Picture with masks, PNG", text: "All objects, in their colours.", picture: true },
  { format: "cutout", as: "png", title: "Cut-out, PNG", text: "Transparent around the objects.", picture: true },
];

export class Downloads {
  #dialog = find("download-dialog");
  #session = null;
  #cancel = null;

  constructor() {
    find("fetching-cancel").addEventListener("click", () => this.#cancel?.abort());
    this.#dialog.addEventListener("close", () => this.#cancel?.abort());
  }

  /** @param {import("./session.js").Session} session */
  show(session) {
    this.#session = session;
    const { isPicture } = session.video;
    const fitting = FORMATS.filter(({ video, picture }) => (isPicture ? !video : !picture));
    find("formats").replaceChildren(...fitting.map((choice) => this.#choice(choice)));
    find("fetching-problem").hidden = true;
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  #choice(choice) {
    const words = make("span", {}, make("strong", {}, choice.title), make("small", {}, choice.text));
    const name = [choice.format, choice.as].filter(Boolean).join("-");
    const act = () => this.#fetch(choice);
    return make("li", {}, make("button", { type: "button", class: "format", id: `format-${name}`, onclick: act }, words, icon("download")));
  }

  async #fetch(choice) {
    this.#cancel?.abort();
    const cancel = (this.#cancel = new AbortController());
    const problem = find("fetching-problem");
    problem.hidden = true;
    this.#tell("Preparing", null);
    try {
      const onProgress = (words, share) => cancel === this.#cancel && this.#tell(words, share);
      const { blob, name } = await api.download(this.#session.id, choice, onProgress, cancel.signal);
      save(blob, name);
      announce(`${name} is downloaded, ${bytesInWords(blob.size)}`);
      this.#dialog.close();
    } catch (error) {
      if (error.name === "AbortError") return;
      problem.textContent = `${choice.title}: ${sentence(error.message)} Try again, or choose another format.`;
      problem.hidden = false;
    } finally {
      if (cancel === this.#cancel) {
        this.#cancel = null;
        find("fetching").hidden = true;
        find("formats").classList.remove("waiting");
      }
    }
  }

  #tell(words, share) {
    find("fetching").hidden = false;
    find("formats").classList.add("waiting");
    find("fetching-text").textContent = share === null ? `${words}…` : `${words}, ${Math.round(share * 100)} %`;
    const bar = find("fetching-progress");
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
  }
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
