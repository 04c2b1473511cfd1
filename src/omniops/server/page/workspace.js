/** The work on one picture or video: stage, objects, timeline and tracking, and what clicks on them do. */

import { colorOf } from "./colors.js";
import { announce, find, secondsInWords } from "./dom.js";
import { Everything } from "./everything.js";
import { Hover } from "./hover.js";
import { ObjectList } from "./objects.js";
import { Overlay } from "./overlay.js";
import { Player } from "./player.js";
import { defaultName, isPrompted, objectOf, stepsOf } from "./prompts.js";
import { areaOf } from "./rle.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Tracking } from "./tracking.js";

/** Events: "change", after which what a reload brings back is another. */
export class Workspace extends EventTarget {
  session = null;
  #stage = new Stage(find("stage"), find("canvas"));
  #player = new Player();
  #timeline = new Timeline((index) => this.#seek(index));
  #list = new ObjectList();
  #masks = new Overlay();
  #everything = new Everything();
  #hover = new Hover(() => this.render());
  #tracking;
  #active = null;
  #hidden = new Set();
  #subtracts = false;
  #listening = new AbortController();
  #tell;

  /** @param {{lost: Function, problem: Function, restart: Function, download: Function}} tell what the page does */
  constructor(tell) {
    super();
    this.#tell = tell;
    this.#tracking = new Tracking({
      session: () => this.session,
      show: (frame) => this.#player.seek(frame),
      problem: tell.problem,
      begin: () => {
        this.#player.pause();
        this.#leaveEverything();
        this.#hover.clear();
      },
    });
    this.#listenToStage();
    this.#listenToList();
    this.#listenToButtons();
  }

  set canHover(can) {
    this.#hover.isOn = can;
  }

  /** What of the view outlives a reload. */
  get view() {
    return { frame: this.#player.index, active: this.#active, hidden: [...this.#hidden] };
  }

  /** Takes over a view that outlived a reload. */
  show({ frame = 0, active = null, hidden = [] }) {
    this.#hidden = new Set(hidden);
    this.#active = objectOf(this.session.prompts, active) ? active : null;
    if (frame) this.#player.seek(frame);
    this.render();
  }

  async open(session, frames) {
    this.close();
    this.session = session;
    this.#active = null;
    this.#hidden.clear();
    this.#setSubtract(false);
    const { video } = session;
    find("timeline").hidden = video.isPicture;
    this.#stage.open(video.width, video.height);
    this.#timeline.open(Math.min(frames.count, video.numFrames), video.fps);
    this.#listening = new AbortController();
    const { signal } = this.#listening;
    const on = (type, act) => session.addEventListener(type, act, { signal });
    on("change", () => this.#changed());
    on("busy", ({ detail }) => this.#showBusy(detail));
    on("frame", ({ detail }) => this.#tracking.took(detail));
    on("tracking", () => this.render());
    on("problem", ({ detail }) => this.#tell.problem(detail, () => session.sync()));
    on("broken", ({ detail }) => this.#tell.problem(detail, () => this.#tracking.start()));
    on("lost", ({ detail }) => this.#tell.lost(detail));
    this.#player.open(frames, video.fps);
    await this.#player.seek(0);
    this.render();
  }

  close() {
    this.#listening.abort();
    this.#player.close();
    this.#leaveEverything();
    this.#hover.clear();
    this.#list.clear();
    this.session = null;
  }

  // What is shown

  #changed() {
    const { prompts } = this.session;
    if (this.#active !== null && !objectOf(prompts, this.#active)) this.#active = prompts.objects.at(-1)?.id ?? null;
    this.render();
    this.dispatchEvent(new CustomEvent("change"));
  }

  #showBusy(busy) {
    find("working").hidden = !busy;
    if (busy || !this.session) return;
    const mask = this.#active === null ? null : this.session.mask(this.#player.index, this.#active);
    const object = objectOf(this.session.prompts, this.#active);
    if (!mask || !object) return;
    const share = (100 * areaOf(mask.counts)) / (mask.size[0] * mask.size[1]);
    announce(`${object.name} covers ${share < 1 ? share.toFixed(1) : Math.round(share)} % of the picture`);
  }

  render() {
    const { session } = this;
    if (!session) return;
    const { prompts } = session;
    const frame = this.#player.index;
    this.#stage.show([this.#paintMasks(frame), ...this.#everything.paint(), this.#hover.paint()], this.#dots(frame));
    this.#stage.drawsBoxes = !this.#everything.isOn;
    this.#list.show(prompts.objects.map((object) => this.#row(object)));
    this.#drawThumbs(frame);
    this.#timeline.show(session);
    this.#tracking.render();
    find("undo").disabled = !session.history.canUndo;
    find("redo").disabled = !session.history.canRedo;
    find("clear").disabled = !prompts.objects.length;
    find("download").disabled = !session.masks.size;
    find("guided").checked = session.guided;
    find("everything").setAttribute("aria-pressed", String(this.#everything.isOn));
    find("new").setAttribute("aria-pressed", String(this.#active === null && prompts.objects.length > 0));
    find("tip").textContent = this.#tipText();
  }

  #tipText() {
    if (this.session.tracking || this.#player.playing) return "";
    if (this.#everything.isOn) {
      return this.#everything.found ? "Click on a mask to make it an object" : "Finding everything…";
    }
    if (!this.session.prompts.objects.some(isPrompted)) return "Click on an object, or drag a box around it";
    if (this.#active === null) return "Click on the next object";
    return "";
  }

  #paintMasks(frame) {
    const { video, prompts } = this.session;
    const layers = [];
    for (const { id } of prompts.objects) {
      const mask = this.session.mask(frame, id);
      if (!mask || this.#hidden.has(id)) continue;
      layers.push({ counts: mask.counts, color: colorOf(id), fill: this.#everything.isOn ? 0.75 : 0.5, edge: 1 });
    }
    return this.#masks.paint([video.height, video.width], layers);
  }

  #dots(frame) {
    if (this.#player.playing || this.session.tracking || this.#everything.isOn) return [];
    return this.session.prompts.objects
      .filter(({ id }) => !this.#hidden.has(id))
      .map(({ id, frames }) => ({ id, color: colorOf(id), steps: frames[frame] ?? [], active: id === this.#active }));
  }

  #row(object) {
    const clicks = Object.values(object.frames).reduce((sum, steps) => sum + steps.length, 0);
    return {
      id: object.id,
      name: object.name,
      clicks,
      frames: this.session.framesOf(object.id).length,
      visible: !this.#hidden.has(object.id),
      active: object.id === this.#active,
    };
  }

  /** An object looks as on the frame where it was clicked last. */
  #drawThumbs(frame) {
    if (this.#player.playing || this.session.tracking) return;
    for (const { id } of this.session.prompts.objects) {
      const mask = this.session.mask(frame, id);
      if (mask && stepsOf(this.session.prompts, id, frame).length) this.#list.picture(id, this.#stage.picture, mask);
    }
  }

  // What a person does

  #listenToStage() {
    const stage = this.#stage;
    stage.addEventListener("point", ({ detail: { x, y, subtract } }) => {
      if (this.#everything.isOn) this.#takeFound({ x, y });
      else this.#addStep({ kind: "point", x, y, label: subtract || this.#subtracts ? 0 : 1 });
    });
    stage.addEventListener("box", ({ detail: { box } }) => this.#addStep({ kind: "box", box }));
    stage.addEventListener("dot", ({ detail: { id, step } }) => {
      const frame = this.#player.index;
      const steps = stepsOf(this.session.prompts, id, frame);
      this.#active = id;
      this.session.setSteps(id, frame, steps.toSpliced(step, 1));
      announce("The click was taken back");
    });
    stage.addEventListener("hover", ({ detail }) => this.#hovered(detail));
    this.#player.addEventListener("frame", ({ detail: { index, bitmap, wanted } }) => {
      if (this.#everything.isOn && index !== this.#everything.frame) this.#leaveEverything();
      stage.setFrame(bitmap);
      this.#timeline.setFrame(index, wanted);
      this.#hover.clear();
      this.render();
    });
    this.#player.addEventListener("state", () => this.#showPlaying());
    this.#player.addEventListener("problem", ({ detail }) => this.#tell.problem(detail));
  }

  #addStep(step) {
    const { session } = this;
    if (!session) return;
    this.#player.pause();
    this.#hover.clear();
    const frame = this.#player.index;
    const isNew = this.#active === null;
    if (isNew && step.label === 0) {
      announce("First add an object, then subtract from it");
      find("tip").textContent = "First click on an object: then parts of it can be subtracted";
      return;
    }
    if (isNew) this.#active = session.newId();
    const steps = stepsOf(session.prompts, this.#active, frame);
    // A second box replaces the first: the model takes one.
    const others = step.kind === "box" ? steps.filter(({ kind }) => kind !== "box") : steps;
    session.setSteps(this.#active, frame, step.kind === "box" ? [step, ...others] : [...others, step]);
  }

  #takeFound(position) {
    const mask = this.#everything.maskAt(position);
    if (!mask) return;
    this.#everything.take(mask);
    this.#active = this.session.newId();
    const { size, counts } = mask.rleMask;
    this.session.setSteps(this.#active, this.#everything.frame, [{ kind: "mask", size, counts }]);
  }

  #hovered(position) {
    const { session } = this;
    if (!session) return;
    if (this.#everything.isOn) {
      if (this.#everything.mark(position)) this.render();
      return;
    }
    if (!position || session.tracking || this.#player.playing) {
      this.#hover.clear();
      return;
    }
    const subtract = position.subtract || this.#subtracts;
    if (subtract && this.#active === null) {
      this.#hover.clear();
      return;
    }
    const frame = this.#player.index;
    const steps = this.#active === null ? [] : stepsOf(session.prompts, this.#active, frame);
    const color = colorOf(this.#active ?? session.nextId);
    this.#hover.ask(session, frame, steps, { x: position.x, y: position.y, label: subtract ? 0 : 1 }, color);
  }

  #listenToList() {
    const list = this.#list;
    list.addEventListener("select", ({ detail }) => {
      this.#active = detail;
      this.render();
    });
    list.addEventListener("visible", ({ detail }) => {
      if (!this.#hidden.delete(detail)) this.#hidden.add(detail);
      this.#changed();
    });
    list.addEventListener("remove", ({ detail }) => {
      announce(`${objectOf(this.session.prompts, detail)?.name ?? defaultName(detail)} was removed`);
      this.session.remove(detail);
    });
    list.addEventListener("rename", ({ detail: { id, name } }) => {
      if (objectOf(this.session.prompts, id)?.name !== name.trim()) this.session.rename(id, name);
    });
  }

  #listenToButtons() {
    const on = (id, act) => find(id).addEventListener("click", act);
    on("mode-add", () => this.#setSubtract(false));
    on("mode-less", () => this.#setSubtract(true));
    on("everything", () => this.#toggleEverything());
    on("undo", () => this.#undo());
    on("redo", () => this.#redo());
    on("clear", () => this.session.clear());
    on("new", () => this.#newObject());
    on("play", () => this.#player.toggle());
    on("back", () => this.#step(-1));
    on("forward", () => this.#step(1));
    on("track", () => this.#tracking.start());
    on("cancel", () => this.session.cancel());
    on("download", () => this.#tell.download(this.session));
    find("guided").addEventListener("change", (event) => this.#tell.restart(event.target.checked));
  }

  /** The keys of the work; each does nothing while nothing is open. */
  get keys() {
    const press = (id) => () => {
      const button = find(id);
      if (this.session && !button.disabled && !button.closest("[hidden]")) button.click();
    };
    return {
      a: press("mode-add"),
      s: press("mode-less"),
      e: press("everything"),
      n: press("new"),
      t: press("track"),
      d: press("download"),
      " ": press("play"),
      ",": press("back"),
      ".": press("forward"),
      "ctrl+z": press("undo"),
      "ctrl+shift+z": press("redo"),
      "ctrl+y": press("redo"),
      escape: () => this.#escape(),
    };
  }

  #escape() {
    if (!this.session || this.#stage.escape()) return;
    if (this.#everything.isOn) this.#leaveEverything();
    else if (this.session.tracking) this.session.cancel();
  }

  #setSubtract(subtracts) {
    this.#subtracts = subtracts;
    find("mode-add").setAttribute("aria-pressed", String(!subtracts));
    find("mode-less").setAttribute("aria-pressed", String(subtracts));
  }

  #newObject() {
    this.#active = null;
    this.#setSubtract(false);
    this.#leaveEverything();
    this.render();
    announce("The next click begins a new object");
  }

  #undo() {
    this.session.undo();
    announce("Undone");
  }

  #redo() {
    this.session.redo();
    announce("Done again");
  }

  #seek(index) {
    this.#tracking.lookAway();
    this.#player.pause();
    this.#player.seek(index);
  }

  #step(by) {
    this.#tracking.lookAway();
    this.#player.step(by);
  }

  #showPlaying() {
    const { playing } = this.#player;
    const button = find("play");
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
    button.querySelector("use").setAttribute("href", playing ? "#i-pause" : "#i-play");
    this.render();
  }

  async #toggleEverything() {
    if (this.#everything.isOn) {
      this.#leaveEverything();
      return;
    }
    this.#player.pause();
    this.#hover.clear();
    const began = performance.now();
    const asked = this.#everything.start(this.session.id, this.#player.index, this.session.nextId);
    this.render();
    find("working").hidden = false;
    try {
      const count = await asked;
      const time = secondsInWords((performance.now() - began) / 1000);
      if (count !== null) announce(count ? `${count} ${count === 1 ? "mask was" : "masks were"} found in ${time}` : "Nothing was found");
      if (count === 0) this.#leaveEverything();
    } catch (error) {
      this.#leaveEverything();
      if (error.kind === "session") this.#tell.lost(error);
      else this.#tell.problem(error, () => this.#toggleEverything());
    } finally {
      find("working").hidden = true;
      this.render();
    }
  }

  #leaveEverything() {
    this.#everything.leave();
    this.render();
  }
}
