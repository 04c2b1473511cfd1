/** The list of objects: what each looks like, its name, whether it is shown, and removing it. */

import { colorOf } from "./colors.js";
import { find, icon, make } from "./dom.js";
import { decode } from "./rle.js";

const THUMB = 44;

/** Events, with the object's id: "select", "visible", "remove"; and "rename" {id, name}. */
export class ObjectList extends EventTarget {
  #list = find("objects");
  #rows = new Map();

  /**
   * @param {{id: number, name: string, clicks: number, frames: number, visible: boolean, active: boolean}[]} objects
   */
  show(objects) {
    const ids = new Set(objects.map(({ id }) => id));
    for (const [id, row] of this.#rows) {
      if (ids.has(id)) continue;
      const hadFocus = row.item.contains(document.activeElement);
      row.item.remove();
      this.#rows.delete(id);
      if (hadFocus) find("new").focus();
    }
    objects.forEach((object, index) => {
      const row = this.#rows.get(object.id) ?? this.#add(object.id);
      this.#update(row, object);
      // A removal that is undone brings an object back to where it was.
      const there = this.#list.children[index] ?? null;
      if (there !== row.item) this.#list.insertBefore(row.item, there);
    });
    find("empty").hidden = objects.length > 0;
  }

  /** Draws an object cut out of the frame that is shown. */
  picture(id, picture, mask) {
    const row = this.#rows.get(id);
    if (!row || row.drawn === mask.counts) return;
    row.drawn = mask.counts;
    drawThumb(row.thumb, picture, mask, colorOf(id));
  }

  clear() {
    this.show([]);
  }

  #add(id) {
    const ratio = 2;
    const thumb = make("canvas", { width: THUMB * ratio, height: THUMB * ratio, "aria-hidden": "true" });
    const select = make("button", { type: "button", class: "swatch", onclick: () => this.#emit("select", id) }, thumb);
    const name = make("input", { type: "text", maxlength: 60, autocomplete: "off", spellcheck: "false" });
    name.addEventListener("change", () => this.#emit("rename", { id, name: name.value }));
    name.addEventListener("focus", () => this.#emit("select", id));
    name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
    const summary = make("p", { class: "summary" });
    const eye = make("button", { type: "button", class: "button icon", onclick: () => this.#emit("visible", id) });
    const remove = make("button", { type: "button", class: "button icon", onclick: () => this.#emit("remove", id) }, icon("clear"));
    const item = make("li", { class: "object" }, select, make("div", { class: "about" }, name, summary), eye, remove);
    item.style.setProperty("--color", colorOf(id));
    const row = { item, thumb, select, name, summary, eye, remove, drawn: null };
    this.#rows.set(id, row);
    return row;
  }

  #update(row, { name, clicks, frames, visible, active }) {
    if (document.activeElement !== row.name) row.name.value = name;
    row.name.setAttribute("aria-label", `Name of ${name}`);
    row.summary.textContent = clicks ? wordsOf(clicks, frames) : "Click in the picture";
    row.select.setAttribute("aria-label", `Choose ${name}`);
    row.select.setAttribute("aria-pressed", String(active));
    row.eye.setAttribute("aria-label", `Show ${name}`);
    row.eye.setAttribute("aria-pressed", String(visible));
    row.eye.replaceChildren(icon(visible ? "eye" : "hidden"));
    row.remove.setAttribute("aria-label", `Remove ${name}`);
    row.item.classList.toggle("active", active);
    row.item.classList.toggle("unshown", !visible);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function wordsOf(clicks, frames) {
  const prompted = clicks === 1 ? "1 prompt" : `${clicks} prompts`;
  return frames > 1 ? `${prompted} · ${frames} frames` : prompted;
}

function drawThumb(canvas, picture, { size, counts }, color) {
  const context = canvas.getContext("2d");
  const side = canvas.width;
  context.clearRect(0, 0, side, side);
  const { mask, box, area } = decode({ size, counts });
  if (!area) return;
  const [x0, y0, x1, y1] = box;
  const cut = document.createElement("canvas");
  [cut.width, cut.height] = [x1 - x0, y1 - y0];
  const cutContext = cut.getContext("2d");
  cutContext.drawImage(picture, -x0, -y0);
  const image = cutContext.getImageData(0, 0, cut.width, cut.height);
  for (let y = y0, offset = 3; y < y1; y += 1) {
    for (let x = x0; x < x1; x += 1, offset += 4) if (!mask[y * size[1] + x]) image.data[offset] = 0;
  }
  cutContext.putImageData(image, 0, 0);
  const scale = (side * 0.86) / Math.max(cut.width, cut.height);
  const [width, height] = [cut.width * scale, cut.height * scale];
  context.fillStyle = `${color}40`;
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  context.drawImage(cut, (side - width) / 2, (side - height) / 2, width, height);
}
