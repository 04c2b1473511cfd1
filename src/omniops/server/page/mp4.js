/** Reads where an MP4's frames lie, and when each is shown: what a VideoDecoder has to be told. */

/** A file that this reader, or the decoder, has no use for; the page then plays it by a <video>. */
export class UnsupportedMovie extends Error {}

/** The boxes between begin and end: [type, begin of the content, end]. */
function* boxes(view, begin, end) {
  let offset = begin;
  while (offset + 8 <= end) {
    let size = view.getUint32(offset);
    const type = fourLetters(view, offset + 4);
    let head = 8;
    if (size === 1) {
      size = Number(view.getBigUint64(offset + 8));
      head = 16;
    } else if (size === 0) {
      size = end - offset;
    }
    if (size < head || offset + size > end) throw new UnsupportedMovie(`a box ${type} that is cut off`);
    yield [type, offset + head, offset + size];
    offset += size;
  }
}

function fourLetters(view, offset) {
  return String.fromCharCode(...[0, 1, 2, 3].map((i) => view.getUint8(offset + i)));
}

/** The first box under a path of types, or null. */
function inside(view, [, begin, end], ...path) {
  let found = [null, begin, end];
  for (const type of path) {
    found = [...boxes(view, found[1], found[2])].find((box) => box[0] === type);
    if (!found) return null;
  }
  return found;
}

function required(view, box, ...path) {
  const found = inside(view, box, ...path);
  if (!found) throw new UnsupportedMovie(`no box ${path.join("/")}`);
  return found;
}

/** Rows of numbers of a box that has a count at `skip` bytes: read(offset) gives one row of `size` bytes. */
function table(view, [type, begin, end], size, read, skip = 4) {
  const count = view.getUint32(begin + skip);
  if (begin + skip + 4 + count * size > end) throw new UnsupportedMovie(`a box ${type} that is cut off`);
  return Array.from({ length: count }, (_, row) => read(begin + skip + 4 + row * size));
}

/** Values in runs of [count, value], one for each sample. */
function* spread(runs) {
  for (const [count, value] of runs) for (let i = 0; i < count; i += 1) yield value;
}

function sizesOf(view, stbl) {
  const stsz = inside(view, stbl, "stsz");
  if (!stsz) throw new UnsupportedMovie("no box stsz");
  const one = view.getUint32(stsz[1] + 4);
  if (one) return new Array(view.getUint32(stsz[1] + 8)).fill(one);
  return table(view, stsz, 4, (offset) => view.getUint32(offset), 8);
}

function offsetsOf(view, stbl, sizes) {
  const stco = inside(view, stbl, "stco");
  const chunks = stco
    ? table(view, stco, 4, (offset) => view.getUint32(offset))
    : table(view, required(view, stbl, "co64"), 8, (offset) => Number(view.getBigUint64(offset)));
  const stsc = table(view, required(view, stbl, "stsc"), 12, (offset) => [
    view.getUint32(offset) - 1,
    view.getUint32(offset + 4),
  ]);
  const offsets = [];
  stsc.forEach(([first, perChunk], row) => {
    const last = row + 1 < stsc.length ? stsc[row + 1][0] : chunks.length;
    for (let chunk = first; chunk < last; chunk += 1) {
      let offset = chunks[chunk];
      for (let i = 0; i < perChunk && offsets.length < sizes.length; i += 1) {
        offsets.push(offset);
        offset += sizes[offsets.length - 1];
      }
    }
  });
  if (offsets.length !== sizes.length) throw new UnsupportedMovie("samples without an offset");
  return offsets;
}

/** When each sample is shown, in the track's units, in the order of decoding. */
function timesOf(view, stbl) {
  const stts = table(view, required(view, stbl, "stts"), 8, (offset) => [
    view.getUint32(offset),
    view.getUint32(offset + 4),
  ]);
  const ctts = inside(view, stbl, "ctts");
  const shifts = ctts
    ? [...spread(table(view, ctts, 8, (offset) => [view.getUint32(offset), view.getInt32(offset + 4)]))]
    : null;
  let clock = 0;
  return [...spread(stts)].map((duration, sample) => {
    const shown = clock + (shifts ? (shifts[sample] ?? 0) : 0);
    clock += duration;
    return { shown, duration };
  });
}

/** The part of the track that is shown, [begin, end) in the track's units, and the seconds before it is. */
function shownPart(view, trak, movieScale, trackScale) {
  const elst = inside(view, trak, "edts", "elst");
  if (!elst) return { begin: -Infinity, end: Infinity, wait: null };
  const long = view.getUint8(elst[1]) === 1;
  const all = table(view, elst, long ? 20 : 12, (offset) =>
    long
      ? [Number(view.getBigUint64(offset)), Number(view.getBigInt64(offset + 8))]
      : [view.getUint32(offset), view.getInt32(offset + 4)],
  );
  // What has no time in the track is a pause before it begins.
  const edits = all.filter(([, time]) => time >= 0);
  if (edits.length !== 1 || all.at(-1) !== edits[0]) throw new UnsupportedMovie("several edits");
  const wait = all.slice(0, -1).reduce((sum, [duration]) => sum + duration, 0) / movieScale;
  const [[duration, begin]] = edits;
  return { begin, end: duration ? begin + (duration / movieScale) * trackScale : Infinity, wait };
}

/** The name of the codec and what the decoder is configured with. */
function codecOf(view, stbl) {
  const stsd = required(view, stbl, "stsd");
  const entry = [...boxes(view, stsd[1] + 8, stsd[2])][0];
  if (!entry || !["avc1", "avc3"].includes(entry[0])) throw new UnsupportedMovie(`the codec ${entry?.[0]}`);
  const avcC = inside(view, ["", entry[1] + 78, entry[2]], "avcC");
  if (!avcC) throw new UnsupportedMovie("no box avcC");
  const hex = (offset) => view.getUint8(offset).toString(16).padStart(2, "0");
  return {
    codec: `${entry[0]}.${hex(avcC[1] + 1)}${hex(avcC[1] + 2)}${hex(avcC[1] + 3)}`,
    description: new Uint8Array(view.buffer, view.byteOffset + avcC[1], avcC[2] - avcC[1]),
    width: view.getUint16(entry[1] + 24),
    height: view.getUint16(entry[1] + 26),
  };
}

function videoTrack(view, moov) {
  for (const box of boxes(view, moov[1], moov[2])) {
    if (box[0] !== "trak") continue;
    const hdlr = inside(view, box, "mdia", "hdlr");
    if (hdlr && fourLetters(view, hdlr[1] + 8) === "vide") return box;
  }
  throw new UnsupportedMovie("no video track");
}

function scaleOf(view, box) {
  return view.getUint32(box[1] + (view.getUint8(box[1]) === 1 ? 20 : 12));
}

/**
 * @param {ArrayBuffer} buffer a whole MP4
 * @returns {{codec: string, description: Uint8Array, width: number, height: number, start: number,
 *   samples: {offset: number, size: number, key: boolean, index: number}[],
 *   frames: {sample: number, time: number, duration: number}[]}}
 *   samples in the order of decoding, `index` being the frame that they show (-1: decoded, never shown); frames in the
 *   order of showing, times in seconds after the first, which a player shows at the second `start`. Throws
 *   UnsupportedMovie.
 */
export function readMovie(buffer) {
  const view = new DataView(buffer);
  try {
    return movieOf(view);
  } catch (error) {
    if (error instanceof RangeError) throw new UnsupportedMovie("a table that is cut off");
    throw error;
  }
}

function movieOf(view) {
  const moov = required(view, ["", 0, view.byteLength], "moov");
  const trak = videoTrack(view, moov);
  const scale = scaleOf(view, required(view, trak, "mdia", "mdhd"));
  const stbl = required(view, trak, "mdia", "minf", "stbl");
  const sizes = sizesOf(view, stbl);
  if (!sizes.length) throw new UnsupportedMovie("no samples: the movie is in fragments");
  const offsets = offsetsOf(view, stbl, sizes);
  const times = timesOf(view, stbl);
  if (times.length !== sizes.length) throw new UnsupportedMovie("samples without a time");
  const stss = inside(view, stbl, "stss");
  const keys = stss ? new Set(table(view, stss, 4, (offset) => view.getUint32(offset) - 1)) : null;
  const { begin, end, wait } = shownPart(view, trak, scaleOf(view, required(view, moov, "mvhd")), scale);
  const samples = sizes.map((size, sample) => {
    if (offsets[sample] + size > view.byteLength) throw new UnsupportedMovie("a sample that is cut off");
    return { offset: offsets[sample], size, key: keys ? keys.has(sample) : true, index: -1 };
  });
  const shown = times
    .map(({ shown, duration }, sample) => ({ sample, shown, duration }))
    .filter(({ shown }) => shown >= begin && shown < end)
    .sort((a, b) => a.shown - b.shown);
  if (!shown.length) throw new UnsupportedMovie("no frame is shown");
  const first = shown[0].shown;
  const frames = shown.map(({ sample, shown: time, duration }, index) => {
    samples[sample].index = index;
    // The duration of a sample is one of decoding: with frames between others it is not how long it is shown.
    const next = shown[index + 1]?.shown ?? time + duration;
    return { sample, time: (time - first) / scale, duration: (next - time) / scale };
  });
  return { ...codecOf(view, stbl), start: wait ?? first / scale, samples, frames };
}
