/**
 * What a person asked for, as a value that is never changed but replaced: {objects: [{id, name, frames}]}, frames being
 * {frame: steps}, and a step {kind: "point", x, y, label}, {kind: "box", box} or {kind: "mask", size, counts}, in [0, 1].
 */

export const EMPTY = Object.freeze({ objects: Object.freeze([]) });

export const defaultName = (id) => `Object ${id + 1}`;

export function objectOf(prompts, id) {
  return prompts.objects.find((object) => object.id === id) ?? null;
}

export function stepsOf(prompts, id, frame) {
  return objectOf(prompts, id)?.frames[frame] ?? [];
}

/** With the steps of an object on a frame replaced; makes the object where there is none. */
export function withSteps(prompts, id, frame, steps, name = defaultName(id)) {
  const known = objectOf(prompts, id) ?? { id, name, frames: {} };
  const frames = { ...known.frames, [frame]: steps };
  if (!steps.length) delete frames[frame];
  return withObject(prompts, { ...known, frames });
}

function withObject(prompts, changed) {
  const known = prompts.objects.some((object) => object.id === changed.id);
  const objects = known
    ? prompts.objects.map((object) => (object.id === changed.id ? changed : object))
    : [...prompts.objects, changed];
  return { objects };
}

export function withName(prompts, id, name) {
  const known = objectOf(prompts, id);
  return known ? withObject(prompts, { ...known, name }) : prompts;
}

export function without(prompts, id) {
  return { objects: prompts.objects.filter((object) => object.id !== id) };
}

/** Whether an object was clicked anywhere. */
export function isPrompted(object) {
  return Object.keys(object.frames).length > 0;
}

/** The first frame with a prompt, or null. */
export function firstFrame(prompts) {
  const frames = prompts.objects.flatMap((object) => Object.keys(object.frames).map(Number));
  return frames.length ? Math.min(...frames) : null;
}

const sameStep = (a, b) => a === b || JSON.stringify(a) === JSON.stringify(b);

function isPrefix(shorter, longer) {
  return shorter.length <= longer.length && shorter.every((step, index) => sameStep(step, longer[index]));
}

/**
 * The next thing that the server has to be asked so that what it knows becomes what is wanted, or null.
 * Steps are sent one after another, each with those before it, for a mask depends on the mask that it refines.
 * @returns {null | {kind: "empty"} | {kind: "remove" | "rename" | "clear" | "send", id: number, frame?: number,
 *   steps?: object[], name?: string}}
 */
export function nextCall(known, wanted) {
  if (known.objects.length && !wanted.objects.length) return { kind: "empty" };
  for (const { id } of known.objects) if (!objectOf(wanted, id)) return { kind: "remove", id };
  for (const object of wanted.objects) {
    const before = objectOf(known, object.id) ?? { frames: {}, name: defaultName(object.id) };
    const frames = new Set([...Object.keys(before.frames), ...Object.keys(object.frames)].map(Number));
    for (const frame of [...frames].sort((a, b) => a - b)) {
      const had = before.frames[frame] ?? [];
      const steps = object.frames[frame] ?? [];
      if (!isPrefix(had, steps)) return { kind: "clear", id: object.id, frame };
      if (had.length < steps.length) {
        return { kind: "send", id: object.id, frame, steps: steps.slice(0, had.length + 1) };
      }
    }
    if (objectOf(known, object.id) && before.name !== object.name) {
      return { kind: "rename", id: object.id, name: object.name };
    }
  }
  return null;
}

/** What the server knows after it answered the call. */
export function after(known, call) {
  if (call.kind === "empty") return EMPTY;
  if (call.kind === "remove") return without(known, call.id);
  if (call.kind === "rename") return withName(known, call.id, call.name);
  return withSteps(known, call.id, call.frame, call.kind === "clear" ? [] : call.steps);
}

/** The arguments of a "send": which mutation, and its input without session, frame and object. */
export function inputOf(steps) {
  const last = steps[steps.length - 1];
  if (last.kind === "mask") return { mutation: "addMask", input: { mask: { size: last.size, counts: last.counts } } };
  const clicks = steps.filter((step) => step.kind === "point");
  const box = steps.filter((step) => step.kind === "box").pop()?.box;
  const points = clicks.map(({ x, y }) => [x, y]);
  const labels = clicks.map(({ label }) => label);
  const input = { points, labels, clearOldPoints: true };
  return box ? { mutation: "addBox", input: { ...input, box } } : { mutation: "addPoints", input };
}

/** What was asked for, from what Query.session tells of a session. */
export function fromServer(state) {
  const masks = new Map(state.frames.map(({ frameIndex, rleMaskList }) => [frameIndex, rleMaskList]));
  const objects = state.objects.map(({ objectId, name, prompts }) => {
    const frames = {};
    for (const { frameIndex, points, labels, box, hasMask } of prompts) {
      const mask = masks.get(frameIndex)?.find((found) => found.objectId === objectId)?.rleMask;
      frames[frameIndex] = [
        ...(hasMask && mask ? [{ kind: "mask", size: mask.size, counts: mask.counts }] : []),
        ...(box ? [{ kind: "box", box }] : []),
        ...points.map(([x, y], index) => ({ kind: "point", x, y, label: labels[index] })),
      ];
      if (!frames[frameIndex].length) delete frames[frameIndex];
    }
    return { id: objectId, name: name || defaultName(objectId), frames };
  });
  return { objects };
}
