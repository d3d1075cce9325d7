// Arrays as NumPy's files hold them: .npz in, .npz out.

const TYPES = {
  "|u1": Uint8Array, "|i1": Int8Array, "|b1": Uint8Array, "<u2": Uint16Array, "<i2": Int16Array,
  "<u4": Uint32Array, "<i4": Int32Array, "<f4": Float32Array, "<f8": Float64Array,
  "<i8": BigInt64Array, "<u8": BigUint64Array,
};

// Arrays of a file by their names, each {values, shape}; a text is {text}.
export async function readNpz(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const arrays = {};
  for (const member of members(view)) {
    const at = member.offset + 30 + view.getUint16(member.offset + 26, true) + view.getUint16(member.offset + 28, true);
    const packed = bytes.subarray(at, at + member.size);
    const content = member.isDeflated ? await inflate(packed) : packed.slice();
    arrays[member.name.replace(/\.npy$/, "")] = readNpy(content);
  }
  return arrays;
}

// The list of files at a ZIP's end.
function* members(view) {
  let end = view.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end -= 1;
  if (end < 0) throw new Error("this is no NPZ");
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
    const nameLength = view.getUint16(at + 28, true);
    const name = new Uint8Array(view.buffer, view.byteOffset + at + 46, nameLength);
    yield {
      name: new TextDecoder().decode(name),
      isDeflated: view.getUint16(at + 10, true) === 8,
      size: view.getUint32(at + 20, true),
      offset: view.getUint32(at + 42, true),
    };
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
}

async function inflate(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const isFirst = bytes[6] === 1;
  const start = isFirst ? 10 : 12;
  const length = isFirst ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const type = /'descr': '([^']+)'/.exec(header)[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((one) => one.trim()).map(Number);
  const content = bytes.slice(start + length);
  if (type.startsWith("<U")) {
    const letters = [...new Uint32Array(content.buffer)].filter(Boolean);
    return { text: letters.map((one) => String.fromCodePoint(one)).join("") };
  }
  const Values = TYPES[type];
  if (!Values) throw new Error(`an array of ${type} cannot be shown`);
  return { values: new Values(content.buffer), shape };
}

// A file of one array: {name: {values, shape}}, not compressed.
export function writeNpz(name, { values, shape }) {
  const type = Object.keys(TYPES).find((one) => TYPES[one] === values.constructor);
  const shown = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const told = `{'descr': '${type}', 'fortran_order': False, 'shape': (${shown}), }`;
  const header = told.padEnd(Math.ceil((told.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length & 255, header.length >> 8]);
  const data = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  return zip(`${name}.npy`, join(start, new TextEncoder().encode(header), data));
}

function zip(name, content) {
  const title = new TextEncoder().encode(name);
  const facts = [20, 0, 0, 0, 0x21]; // version, flags, stored, time, date
  const head = new DataView(new ArrayBuffer(26));
  facts.forEach((fact, at) => head.setUint16(2 * at, fact, true));
  head.setUint32(10, crc32(content), true);
  head.setUint32(14, content.length, true);
  head.setUint32(18, content.length, true);
  head.setUint16(22, title.length, true);
  const common = new Uint8Array(head.buffer);
  const local = join(word(0x04034b50), common, title);
  const more = new Uint8Array(10 + 4); // no comment, first disk, no attributes, at offset 0
  const central = join(word(0x02014b50), new Uint8Array([20, 0]), common, more.subarray(0, 14), title);
  const end = new DataView(new ArrayBuffer(18));
  end.setUint16(4, 1, true);
  end.setUint16(6, 1, true);
  end.setUint32(8, central.length, true);
  end.setUint32(12, local.length + content.length, true);
  return join(local, content, central, word(0x06054b50), new Uint8Array(end.buffer));
}

const word = (value) => new Uint8Array(new Uint32Array([value]).buffer);

function join(...parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

const CRC = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit += 1) number = number & 1 ? (number >>> 1) ^ 0xedb88320 : number >>> 1;
  return number;
});

function crc32(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = (sum >>> 8) ^ CRC[(sum ^ byte) & 255];
  return (sum ^ 0xffffffff) >>> 0;
}
