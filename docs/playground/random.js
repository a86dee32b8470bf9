// The noise of sample.py, number for number: image_noise of support/compute.py, with the generator
// and the normal distribution of PyTorch on a CPU.

/** The first 4 bytes, little endian, of the SHA-256 (FIPS 180-4) of fewer than 56 ASCII characters.
    (crypto.subtle is missing on a page that comes over http from another machine.) */
function sha256_seed(text) {
  const fraction = x => (x % 1) * 2 ** 32 | 0, rotate = (x, n) => x >>> n | x << (32 - n);
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every(p => n % p)) primes.push(n);
  const block = new DataView(new ArrayBuffer(64));
  [...text, "\x80"].forEach((letter, i) => block.setUint8(i, letter.charCodeAt(0)));
  block.setUint32(60, 8 * text.length);
  const w = Array.from({ length: 16 }, (_, i) => block.getInt32(4 * i));
  let [a, b, c, d, e, f, g, h] = primes.map(p => fraction(Math.sqrt(p)));
  for (let i = 0; i < 64; i++) {
    if (i > 15) w[i] = w[i - 16] + w[i - 7]
      + (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >>> 3)
      + (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >>> 10) | 0;
    const one = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (e & f ^ ~e & g)
                + fraction(Math.cbrt(primes[i])) + w[i] | 0;
    const two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + (a & b ^ a & c ^ b & c);
    [a, b, c, d, e, f, g, h] = [one + two | 0, a, b, c, d + one | 0, e, f, g];
  }
  block.setInt32(0, fraction(Math.sqrt(2)) + a);
  return block.getUint32(0, true);
}

/** The Mersenne Twister MT19937: a function that returns 32 bits at a time. */
function mt19937(seed) {
  const state = Uint32Array.of(seed, ...Array(623));
  for (let i = 1; i < 624; i++)
    state[i] = Math.imul(1812433253, state[i - 1] ^ state[i - 1] >>> 30) + i;
  let next = 0;
  return () => {
    const i = next, y = state[i] & 0x80000000 | state[next = (i + 1) % 624] & 0x7fffffff;
    let x = state[i] = state[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
    x ^= x >>> 11;
    x ^= x << 7 & 0x9d2c5680;
    x ^= x << 15 & 0xefc60000;
    return (x ^ x >>> 18) >>> 0;
  };
}

/** Noise of `size` numbers for image k of a seed, of row k % 16 of block k // 16. t: the timestep
    whose step adds it, or "T" for the noise that sampling starts from. torch.randn makes uniform
    numbers of 24 bits, then, in groups of 16, normal ones by Box-Muller: 8 radii, 8 angles. */
export function image_noise(seed, t, k, size) {
  const key = `(${seed}, 'image', ${t === "T" ? "'T'" : t}, ${Math.floor(k / 16)})`;
  const random = mt19937(sha256_seed(key));
  const block = new Float32Array(16 * size).map(() => (random() & 0xffffff) / 2 ** 24);
  for (let group = 0; group < block.length; group += 16)
    for (let i = group; i < group + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - block[i])), angle = 2 * Math.PI * block[i + 8];
      block[i] = radius * Math.cos(angle);
      block[i + 8] = radius * Math.sin(angle);
    }
  return block.slice(k % 16 * size, (k % 16 + 1) * size);
}
