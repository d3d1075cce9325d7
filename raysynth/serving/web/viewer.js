// Images in Hounsfield units on canvases: window and level, planes, zoom, overlays, comparison.
//
// A view (`makeView`) is what several viewers may share: window, place, zoom. A viewer draws one
// plane of a scene, which it asks for whenever something has changed.

export const WINDOWS = {
  lung: { name: "Lung", low: -1350, high: 150 },
  mediastinum: { name: "Mediastinum", low: -160, high: 240 },
  bone: { name: "Bone", low: -500, high: 1300 },
};

export const COLOURS = {
  1: [86, 156, 255], // left lung
  2: [72, 214, 200], // right lung
  3: [250, 224, 90], // trachea
  4: [176, 148, 122], // body
  5: [255, 104, 84], // nodule
};

const ORGAN_COLOUR = [200, 130, 230];
const BOX_COLOUR = "#ffb454";
const CROSS_COLOUR = "rgba(124, 199, 232, 0.7)";
const NAMES = ["axial", "coronal", "sagittal"];
// What lies to the left, right, above and below. Slices count their rows from the front.
const SIDES = [["R", "L", "A", "P"], ["R", "L", "S", "I"], ["A", "P", "S", "I"]];

// An image: values in C order, (y, x) or (z, y, x), with mm between planes, rows and columns.
export function makeVolume(values, shape, depthMm = 1, pixelMm = 1) {
  const whole = shape.length === 3 ? shape : [1, ...shape];
  return { values, shape: whole, isVolume: shape.length === 3, spacing: [depthMm, pixelMm, pixelMm] };
}

// How rows and columns of a plane run through the values; the head is above.
export function planeOf(volume, axis, index) {
  const [, Y, X] = volume.shape;
  const [rowAxis, columnAxis] = [[1, 2], [0, 2], [0, 1]][axis];
  const strides = [Y * X, X, 1];
  const rows = volume.shape[rowAxis];
  const isTurned = rowAxis === 0;
  return {
    axis, rowAxis, columnAxis, rows, isTurned,
    columns: volume.shape[columnAxis],
    start: index * strides[axis] + (isTurned ? (rows - 1) * strides[0] : 0),
    rowStride: isTurned ? -strides[0] : strides[rowAxis],
    columnStride: strides[columnAxis],
    rowMm: volume.spacing[rowAxis],
    columnMm: volume.spacing[columnAxis],
  };
}

export function windowOf(name, volume, full) {
  if (WINDOWS[name]) return { low: WINDOWS[name].low, high: WINDOWS[name].high };
  return { low: full[0], high: full[1] };
}

// State that viewers share; `change` tells all of them.
export function makeView() {
  const listeners = new Set();
  const view = {
    window: { low: -1350, high: 150 },
    at: [0, 0, 0],
    zoom: 1,
    pan: [0, 0],
    tool: "window",
    onTool: null, // (name, phase, voxel, axis, event): of other tools than window, pan and cross
    listeners,
    change(parts = {}) {
      Object.assign(view, parts);
      for (const listener of listeners) listener();
    },
  };
  return view;
}

function picture(plane, paint) {
  const canvas = new OffscreenCanvas(plane.columns, plane.rows);
  const context = canvas.getContext("2d");
  const image = context.createImageData(plane.columns, plane.rows);
  const out = new Uint32Array(image.data.buffer);
  let to = 0;
  for (let row = 0; row < plane.rows; row++) {
    let from = plane.start + row * plane.rowStride;
    for (let column = 0; column < plane.columns; column++, from += plane.columnStride) {
      out[to++] = paint(from);
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const rgba = (r, g, b, a) => (a << 24) | (b << 16) | (g << 8) | r;

function grey(values, { low, high }) {
  const scale = 255 / Math.max(1, high - low);
  return (at) => {
    const level = Math.max(0, Math.min(255, (values[at] - low) * scale)) | 0;
    return rgba(level, level, level, 255);
  };
}

// Black where both agree; orange where the first is denser, blue where it is less so.
function difference(values, others, { low, high }) {
  const scale = 510 / Math.max(1, high - low);
  return (at) => {
    const more = Math.max(-255, Math.min(255, (values[at] - others[at]) * scale));
    const level = Math.abs(more) | 0;
    return more > 0 ? rgba(level, (level * 0.6) | 0, (level * 0.15) | 0, 255)
      : rgba((level * 0.15) | 0, (level * 0.6) | 0, level, 255);
  };
}

const labelled = (values, colours) => (at) => {
  const label = values[at];
  if (!label) return 0;
  const [r, g, b] = (colours ?? COLOURS)[label] ?? ORGAN_COLOUR;
  return rgba(r, g, b, 255);
};

// Draws planes of a scene on a canvas.
//
// `scene()` gives null or {volume, other, mode, swipe, layers, box, sharp}: `other` is compared by
// `mode` ("swipe" or "difference"); layers are {values, colours, opacity}; a box is
// [z0, y0, x0, z1, y1, x1]; `sharp` shows pixels as squares.
export function makeViewer(canvas, view, scene, axis = 0) {
  const context = canvas.getContext("2d");
  let pending = false;
  let hover = null;
  const kept = new Map(); // pictures by what they were made of

  function paintOnce(name, mark, make) {
    const old = kept.get(name);
    if (old && old.mark.length === mark.length && old.mark.every((one, at) => one === mark[at])) {
      return old.picture;
    }
    const made = make();
    kept.set(name, { mark, picture: made });
    return made;
  }

  function geometry(volume) {
    const plane = planeOf(volume, axis, Math.min(view.at[axis], volume.shape[axis] - 1));
    const width = plane.columns * plane.columnMm;
    const height = plane.rows * plane.rowMm;
    const scale = Math.min(canvas.clientWidth / width, canvas.clientHeight / height) * view.zoom;
    const pan = axis === 0 ? view.pan : [0, 0];
    const left = canvas.clientWidth / 2 - (width * scale) / 2 + pan[0];
    const top = canvas.clientHeight / 2 - (height * scale) / 2 + pan[1];
    return { plane, left, top, cell: [plane.columnMm * scale, plane.rowMm * scale] };
  }

  // Where a point of the canvas lies in the volume, in voxels with fractions.
  function voxelAt(x, y) {
    const shown = scene();
    if (!shown) return null;
    const { plane, left, top, cell } = geometry(shown.volume);
    const voxel = [...view.at];
    voxel[plane.columnAxis] = (x - left) / cell[0];
    const row = (y - top) / cell[1];
    voxel[plane.rowAxis] = plane.isTurned ? plane.rows - row : row;
    voxel[axis] = view.at[axis];
    return voxel;
  }

  function draw() {
    pending = false;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    const shown = scene();
    if (!shown) return;
    const place = geometry(shown.volume);
    drawImages(shown, place);
    drawBox(shown, place);
    drawCross(shown, place);
    drawWords(shown, width, height);
  }

  function drawImages(shown, { plane, left, top, cell }) {
    const { volume, other } = shown;
    const index = view.at[axis];
    const size = [plane.columns * cell[0], plane.rows * cell[1]];
    const put = (image) => context.drawImage(image, left, top, ...size);
    context.imageSmoothingEnabled = !shown.sharp;
    context.imageSmoothingQuality = "high";
    const { low, high } = view.window;
    const mark = [volume.values, index, low, high];
    if (other && shown.mode === "difference") {
      put(paintOnce("difference", [...mark, other.values], () =>
        picture(plane, difference(volume.values, other.values, view.window))));
      return;
    }
    context.strokeStyle = "#313b44";
    context.lineWidth = 1;
    context.strokeRect(left - 0.5, top - 0.5, size[0] + 1, size[1] + 1);
    put(paintOnce("image", mark, () => picture(plane, grey(volume.values, view.window))));
    drawLayers(shown.layers ?? [], plane, index, put);
    if (other && shown.mode === "swipe") {
      const edge = left + size[0] * shown.swipe;
      context.save();
      context.beginPath();
      context.rect(left, top, Math.max(0, edge - left), size[1]);
      context.clip();
      context.imageSmoothingEnabled = !shown.sharp;
      put(paintOnce("other", [other.values, index, low, high], () =>
        picture(plane, grey(other.values, view.window))));
      context.restore();
      context.fillStyle = "#7cc7e8";
      context.fillRect(edge - 1, top, 2, size[1]);
    }
  }

  function drawLayers(layers, plane, index, put) {
    context.imageSmoothingEnabled = false;
    layers.forEach((layer, number) => {
      context.globalAlpha = layer.opacity;
      put(paintOnce(`layer ${number}`, [layer.values, layer.version ?? 0, layer.colours, index], () =>
        picture(plane, labelled(layer.values, layer.colours))));
      context.globalAlpha = 1;
    });
  }

  function drawBox({ box }, { plane, left, top, cell }) {
    if (!box || view.at[axis] < box[axis] || view.at[axis] >= box[axis + 3]) return;
    const [c0, c1] = [box[plane.columnAxis], box[plane.columnAxis + 3]];
    let [r0, r1] = [box[plane.rowAxis], box[plane.rowAxis + 3]];
    if (plane.isTurned) [r0, r1] = [plane.rows - r1, plane.rows - r0];
    const edges = [left + c0 * cell[0], top + r0 * cell[1], (c1 - c0) * cell[0], (r1 - r0) * cell[1]];
    context.lineWidth = 4;
    context.strokeStyle = "rgba(0, 0, 0, 0.6)";
    context.strokeRect(...edges);
    context.lineWidth = 2;
    context.strokeStyle = BOX_COLOUR;
    context.strokeRect(...edges);
  }

  function drawCross({ volume }, { plane, left, top, cell }) {
    if (!volume.isVolume || !view.cross) return;
    const row = view.at[plane.rowAxis];
    const x = left + (view.at[plane.columnAxis] + 0.5) * cell[0];
    const y = top + (plane.isTurned ? plane.rows - row - 0.5 : row + 0.5) * cell[1];
    context.fillStyle = CROSS_COLOUR;
    const [width, height] = [plane.columns * cell[0], plane.rows * cell[1]];
    context.fillRect(x - 0.5, top, 1, height);
    context.fillRect(left, y - 0.5, width, 1);
  }

  function drawWords({ volume, unit, sides }, width, height) {
    context.font = "12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
    const write = (text, x, y, align) => {
      context.textAlign = align;
      context.lineWidth = 3;
      context.strokeStyle = "rgba(0, 0, 0, 0.85)";
      context.strokeText(text, x, y);
      context.fillStyle = "#dfe6ea";
      context.fillText(text, x, y);
    };
    if (sides !== false) {
      const [left, right, above, below] = SIDES[axis];
      write(left, 8, height / 2, "left");
      write(right, width - 8, height / 2, "right");
      write(above, width / 2, 16, "center");
      write(below, width / 2, height - 8, "center");
    }
    if (volume.isVolume) {
      write(`${NAMES[axis]} ${view.at[axis] + 1}/${volume.shape[axis]}`, 8, 16, "left");
    }
    const { low, high } = view.window;
    if (width > 320) write(`W ${Math.round(high - low)} L ${Math.round((high + low) / 2)}`, 8, height - 8, "left");
    const value = hover && valueAt(volume, hover);
    if (value !== null && value !== undefined) write(`${value} ${unit ?? "HU"}`, width - 8, height - 8, "right");
  }

  function valueAt(volume, voxel) {
    const [z, y, x] = voxel.map(Math.floor);
    const [Z, Y, X] = volume.shape;
    const isInside = z >= 0 && y >= 0 && x >= 0 && z < Z && y < Y && x < X;
    return isInside ? volume.values[(z * Y + y) * X + x] : null;
  }

  function refresh() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(draw);
  }

  function clamped(voxel, shape) {
    return voxel.map((one, at) => Math.max(0, Math.min(shape[at] - 1, Math.floor(one))));
  }

  function swipeEdge(shown) {
    const { plane, left, cell } = geometry(shown.volume);
    return left + plane.columns * cell[0] * shown.swipe;
  }

  function step(count) {
    const shown = scene();
    if (!shown?.volume.isVolume) return;
    const at = [...view.at];
    at[axis] = Math.max(0, Math.min(shown.volume.shape[axis] - 1, at[axis] + count));
    view.change({ at });
  }

  function zoom(factor) {
    view.change({ zoom: Math.max(0.5, Math.min(20, view.zoom * factor)) });
  }

  // The pointer.
  let drag = null;
  const placeOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  canvas.addEventListener("pointerdown", (event) => {
    const shown = scene();
    if (!shown) return;
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
    const [x, y] = placeOf(event);
    const edge = shown.mode === "swipe" && shown.other ? swipeEdge(shown) : null;
    const tool = edge !== null && Math.abs(x - edge) < 12 ? "swipe" : event.button === 1 || event.shiftKey ? "pan" : event.button === 2 ? "window" : view.tool;
    drag = { tool, x, y, window: { ...view.window }, pan: [...view.pan] };
    if (tool === "cross") view.change({ at: clamped(voxelAt(x, y), shown.volume.shape) });
    else if (tool !== "window" && tool !== "pan") view.onTool?.(tool, "start", voxelAt(x, y), axis, event);
  });

  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = placeOf(event);
    hover = voxelAt(x, y);
    if (!drag) return refresh();
    const [dx, dy] = [x - drag.x, y - drag.y];
    if (drag.tool === "window") {
      const width = Math.max(1, drag.window.high - drag.window.low);
      const level = (drag.window.high + drag.window.low) / 2 + (dy * width) / 300;
      const wider = Math.max(1, width * 2 ** (dx / 200));
      view.change({ window: { low: level - wider / 2, high: level + wider / 2 }, preset: null });
    } else if (drag.tool === "pan") {
      view.change({ pan: [drag.pan[0] + dx, drag.pan[1] + dy] });
    } else if (drag.tool === "cross") {
      const shown = scene();
      if (shown) view.change({ at: clamped(hover, shown.volume.shape) });
    } else view.onTool?.(drag.tool, "move", hover, axis, event);
  });

  const end = (event) => {
    if (!drag) return;
    const { tool } = drag;
    drag = null;
    if (!["window", "pan", "cross"].includes(tool)) view.onTool?.(tool, "end", hover, axis, event);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    refresh();
  });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    const shown = scene();
    if (!shown) return;
    event.preventDefault();
    if (shown.volume.isVolume && !event.ctrlKey) step(event.deltaY > 0 ? -1 : 1);
    else zoom(event.deltaY > 0 ? 1 / 1.15 : 1.15);
  }, { passive: false });

  canvas.addEventListener("keydown", (event) => {
    const act = {
      ArrowUp: () => step(1), ArrowDown: () => step(-1), PageUp: () => step(5), PageDown: () => step(-5),
      "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8),
      0: () => view.change({ zoom: 1, pan: [0, 0] }),
    }[event.key];
    if (!act || event.defaultPrevented || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });

  canvas.tabIndex = 0;
  view.listeners.add(refresh);
  const observer = new ResizeObserver(refresh);
  observer.observe(canvas);
  refresh();
  return {
    refresh,
    close() {
      view.listeners.delete(refresh);
      observer.disconnect();
    },
  };
}
