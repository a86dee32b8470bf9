// Reads a .safetensors file of tools/convert.py: the header's length, the header (JSON), numbers.

/** {state: {name: {shape, data}}, metadata} of a file's ArrayBuffer; data are Float32Arrays. */
export function read_safetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)), state = {};
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata, ...tensors } = header;
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(tensors)) {
    if (dtype !== "F16") throw new Error(`${name} is not in half precision`);
    const halves = new Uint16Array(buffer.slice(8 + length + start, 8 + length + end));
    state[name] = { shape, data: new Float32Array(halves.length).map((_, i) => float(halves[i])) };
  }
  return { state, metadata };
}

const POWERS = Array.from({ length: 31 }, (_, exponent) => 2 ** (exponent - 15));

/** The number of a half: 1 bit of sign, 5 of exponent, 10 of fraction. Weights are finite. */
function float(half) {
  const exponent = half >> 10 & 31, fraction = (half & 1023) / 1024;
  const size = exponent ? POWERS[exponent] * (1 + fraction) : POWERS[1] * fraction;
  return half & 0x8000 ? -size : size;
}
