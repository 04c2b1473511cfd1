/** The picture with its masks and prompts on a canvas, and what the pointer and the keys do on it. */

/** Pixels of the screen that a pointer may tremble within a click. */
const STILL = 6;
const DOT = 7;
const STEP = 0.02;

const clamp = (value) => Math.min(1, Math.max(0, value));

/**
 * Events, with positions in [0, 1] of the picture: "point" {x, y, subtract}, "box" {box}, "dot" {id, step} (a click that
 * was already there), "hover" {x, y, subtract} or null.
 */
export class Stage extends EventTarget {
  /** The frame that is shown, in its own size. */
  picture = document.createElement("canvas");
  /** Whether dragging draws a box. */
  drawsBoxes = true;
  #section;
  #canvas;
  #context;
  #overlays = [];
  #prompts = [];
  #press = null;
  #drag = null;
  #cross = null;
  #corner = null;
  #asked = 0;

  constructor(section, canvas) {
    super();
    this.#section = section;
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    new ResizeObserver(() => this.#fit()).observe(section);
    canvas.addEventListener("pointerdown", (event) => this.#pressed(event));
    canvas.addEventListener("pointermove", (event) => this.#moved(event));
    canvas.addEventListener("pointerup", (event) => this.#released(event));
    canvas.addEventListener("pointercancel", () => this.#forget());
    canvas.addEventListener("pointerleave", () => this.#emit("hover", null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#hideCross());
  }

  open(width, height) {
    this.picture.width = width;
    this.picture.height = height;
    this.#overlays = [];
    this.#prompts = [];
    this.#forget();
    this.#cross = null;
    this.#fit();
  }

  /** Copies a frame, which its owner may close afterwards. */
  setFrame(bitmap) {
    this.picture.getContext("2d").drawImage(bitmap, 0, 0, this.picture.width, this.picture.height);
    this.invalidate();
  }

  /** @param {(HTMLCanvasElement | null)[]} overlays @param {{id: number, color: string, steps: object[], active: boolean}[]} prompts */
  show(overlays, prompts) {
    this.#overlays = overlays.filter(Boolean);
    this.#prompts = prompts;
    this.invalidate();
  }

  /** Ends a box that was begun. @returns {boolean} whether there was one */
  escape() {
    const begun = this.#drag !== null || this.#corner !== null;
    this.#forget();
    this.invalidate();
    return begun;
  }

  invalidate() {
    this.#asked ||= requestAnimationFrame(() => {
      this.#asked = 0;
      this.#draw();
    });
  }

  #fit() {
    const { clientWidth, clientHeight } = this.#section;
    const { width, height } = this.picture;
    const style = getComputedStyle(this.#section);
    const across = clientWidth - Number.parseFloat(style.paddingLeft) - Number.parseFloat(style.paddingRight);
    const down = clientHeight - Number.parseFloat(style.paddingTop) - Number.parseFloat(style.paddingBottom);
    const scale = Math.min(across / width, down / height);
    if (!(scale > 0)) return;
    const ratio = globalThis.devicePixelRatio || 1;
    this.#canvas.style.width = `${Math.round(width * scale)}px`;
    this.#canvas.style.height = `${Math.round(height * scale)}px`;
    this.#canvas.width = Math.round(width * scale * ratio);
    this.#canvas.height = Math.round(height * scale * ratio);
    const top = Number.parseFloat(style.paddingTop) + (down - height * scale) / 2;
    this.#section.style.setProperty("--picture-bottom", `${Math.round(top + height * scale)}px`);
    this.#draw();
  }

  // Drawing, in pixels of the screen

  #draw() {
    const context = this.#context;
    const ratio = globalThis.devicePixelRatio || 1;
    const [width, height] = [this.#canvas.width / ratio, this.#canvas.height / ratio];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.picture, 0, 0, width, height);
    for (const overlay of this.#overlays) context.drawImage(overlay, 0, 0, width, height);
    for (const { color, steps, active } of this.#prompts) {
      context.globalAlpha = active ? 1 : 0.55;
      for (const step of steps) {
        if (step.kind === "box") this.#drawBox(step.box, color, width, height);
        if (step.kind === "point") this.#drawDot(step, color, width, height);
      }
      context.globalAlpha = 1;
    }
    if (this.#drag) this.#drawBox(this.#drag, "#ffffff", width, height);
    if (this.#cross) this.#drawCross(width, height);
  }

  #drawDot({ x, y, label }, color, width, height) {
    const context = this.#context;
    const [left, top] = [x * width, y * height];
    context.beginPath();
    context.arc(left, top, DOT, 0, 2 * Math.PI);
    context.fillStyle = label ? color : "#ffffff";
    context.shadowColor = "rgba(0, 0, 0, 0.6)";
    context.shadowBlur = 4;
    context.fill();
    context.shadowBlur = 0;
    context.lineWidth = 2;
    context.strokeStyle = label ? "#ffffff" : color;
    context.stroke();
    context.beginPath();
    context.moveTo(left - 3, top);
    context.lineTo(left + 3, top);
    if (label) {
      context.moveTo(left, top - 3);
      context.lineTo(left, top + 3);
    }
    context.strokeStyle = label ? "#10131c" : "#b00020";
    context.stroke();
  }

  #drawBox([x0, y0, x1, y1], color, width, height) {
    const context = this.#context;
    const rectangle = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height];
    context.lineWidth = 4;
    context.strokeStyle = "rgba(0, 0, 0, 0.55)";
    context.strokeRect(...rectangle);
    context.lineWidth = 2;
    context.strokeStyle = color;
    context.strokeRect(...rectangle);
  }

  #drawCross(width, height) {
    const context = this.#context;
    const [left, top] = [this.#cross.x * width, this.#cross.y * height];
    for (const [line, color] of [[4, "rgba(0, 0, 0, 0.7)"], [1.5, "#ffffff"]]) {
      context.beginPath();
      context.moveTo(left - 14, top);
      context.lineTo(left + 14, top);
      context.moveTo(left, top - 14);
      context.lineTo(left, top + 14);
      context.lineWidth = line;
      context.strokeStyle = color;
      context.stroke();
    }
  }

  // The pointer

  #position(event) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return { x: clamp((event.clientX - left) / width), y: clamp((event.clientY - top) / height) };
  }

  #pressed(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    this.#cross = null;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#press = { ...this.#position(event), clientX: event.clientX, clientY: event.clientY };
  }

  #moved(event) {
    const position = this.#position(event);
    if (!this.#press) {
      if (event.pointerType !== "touch") this.#emit("hover", { ...position, subtract: event.shiftKey });
      return;
    }
    const distance = Math.hypot(event.clientX - this.#press.clientX, event.clientY - this.#press.clientY);
    if (!this.drawsBoxes || (!this.#drag && distance <= STILL)) return;
    if (!this.#drag) this.#emit("hover", null);
    this.#drag = boxOf(this.#press, position);
    this.invalidate();
  }

  #released(event) {
    if (!this.#press) return;
    const [press, drag] = [this.#press, this.#drag];
    this.#forget();
    if (drag) this.#finishBox(drag);
    else this.#click(press, event.shiftKey, event.pointerType === "touch" ? 2 * DOT : DOT + 2);
  }

  #click({ x, y }, subtract, reach) {
    const dot = this.#dotAt(x, y, reach);
    if (dot) this.#emit("dot", dot);
    else this.#emit("point", { x, y, subtract });
  }

  #finishBox(box) {
    this.invalidate();
    if (box[2] - box[0] > 0.003 && box[3] - box[1] > 0.003) this.#emit("box", { box });
  }

  #dotAt(x, y, reach) {
    const { width, height } = this.#canvas.getBoundingClientRect();
    for (const { id, steps } of [...this.#prompts].reverse()) {
      for (let step = steps.length - 1; step >= 0; step -= 1) {
        const { kind, x: left, y: top } = steps[step];
        if (kind === "point" && Math.hypot((left - x) * width, (top - y) * height) <= reach) return { id, step };
      }
    }
    return null;
  }

  #forget() {
    this.#press = null;
    this.#drag = null;
    this.#corner = null;
  }

  // The keys

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move) this.#moveCross(move, event.shiftKey ? STEP / 4 : STEP);
    else if (event.key === "Enter" && this.#cross) this.#click(this.#cross, event.shiftKey, DOT);
    else if (event.key.toLowerCase() === "b" && this.#cross) this.#markCorner();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #moveCross([right, down], step) {
    const { x, y } = this.#cross ?? { x: 0.5 - right * step, y: 0.5 - down * step };
    this.#cross = { x: clamp(x + right * step), y: clamp(y + down * step) };
    if (this.#corner) this.#drag = boxOf(this.#corner, this.#cross);
    this.#emit("hover", { ...this.#cross, subtract: false });
    this.invalidate();
  }

  #markCorner() {
    if (!this.drawsBoxes) return;
    if (!this.#corner) {
      this.#corner = { ...this.#cross };
      this.#drag = boxOf(this.#corner, this.#cross);
      this.invalidate();
      return;
    }
    const box = boxOf(this.#corner, this.#cross);
    this.#forget();
    this.#finishBox(box);
  }

  #hideCross() {
    this.#cross = null;
    if (this.#corner) this.#forget();
    this.#emit("hover", null);
    this.invalidate();
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function boxOf(a, b) {
  return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];
}
