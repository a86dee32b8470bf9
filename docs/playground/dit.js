// The network: dit.py in plain JavaScript, with its names and in its order, to be read beside it.
// B batch, C channels, H image side, p patch side, N = (H/p)^2 tokens, D width. A tensor is a
// Float32Array whose shape is in a comment. Layers keep the arrays that they fill, so that after a
// forward each intermediate can be read, for example model.blocks[2].attn.weights.

/** The array `name` of a layer, of `size` numbers or more: made once, and then used again. */
function array(layer, name, size) {
  if (!(layer[name]?.length >= size)) layer[name] = new Float32Array(size);
  return layer[name];
}

/** Copy images x (B, C, H, H) to tokens (B, N, p*p*C), or back where `to_image`. */
function patchify(x, tokens, B, C, H, p, to_image = false) {
  let token = 0;                                    // of (B, H/p, H/p, p, p, C)
  for (let b = 0; b < B; b++)
    for (let i = 0; i < H; i += p)
      for (let j = 0; j < H; j += p)
        for (let row = i; row < i + p; row++)
          for (let column = j; column < j + p; column++)
            for (let c = 0; c < C; c++, token++) {
              const pixel = ((b * C + c) * H + row) * H + column;
              if (to_image) x[pixel] = tokens[token];
              else tokens[token] = x[pixel];
            }
}

// ---------------------------------------------------------------- layers

/** x (rows, I) -> x W^T + bias, (rows, O). Nearly all of the time is spent here. */
class Linear {
  constructor(state, name) {
    const { shape: [O, I], data: weight } = state[`${name}.weight`];
    Object.assign(this, { I, O, weight, bias: state[`${name}.bias`].data });
  }
  forward(x, rows) {
    const { I, O, weight, bias } = this, out = array(this, "out", rows * O);
    // In blocks of 2 rows x 4 columns: a number is read once for several products. The last block
    // overlaps the one before where 4 does not divide O; an odd last row is computed twice.
    for (let block = 0; block < O; block += 4) {
      const o = Math.min(block, O - 4), w0 = o * I, w1 = w0 + I, w2 = w1 + I, w3 = w2 + I;
      for (let row = 0; row < rows; row += 2) {
        const next = Math.min(row + 1, rows - 1), xa = row * I, xb = next * I;
        let a0 = bias[o], a1 = bias[o + 1], a2 = bias[o + 2], a3 = bias[o + 3];
        let b0 = a0, b1 = a1, b2 = a2, b3 = a3;
        for (let i = 0; i < I; i++) {
          const a = x[xa + i], b = x[xb + i];
          const c0 = weight[w0 + i], c1 = weight[w1 + i], c2 = weight[w2 + i], c3 = weight[w3 + i];
          a0 += a * c0; a1 += a * c1; a2 += a * c2; a3 += a * c3;
          b0 += b * c0; b1 += b * c1; b2 += b * c2; b3 += b * c3;
        }
        const a = row * O + o, b = next * O + o;
        out[a] = a0; out[a + 1] = a1; out[a + 2] = a2; out[a + 3] = a3;
        out[b] = b0; out[b + 1] = b1; out[b + 2] = b2; out[b + 3] = b3;
      }
    }
    return out;
  }
}

// These three work in place.

function silu(x, count) {
  for (let i = 0; i < count; i++) x[i] /= 1 + Math.exp(-x[i]);
  return x;
}

function gelu(x, count) {               // its tanh form: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
  const factor = -2 * Math.sqrt(2 / Math.PI);
  for (let i = 0; i < count; i++)
    x[i] /= 1 + Math.exp(factor * (x[i] + 0.044715 * x[i] * x[i] * x[i]));
  return x;
}

function softmax(x, start, N) {
  let max = -Infinity, sum = 0;
  for (let j = start; j < start + N; j++) max = Math.max(max, x[j]);
  for (let j = start; j < start + N; j++) sum += x[j] = Math.exp(x[j] - max);
  for (let j = start; j < start + N; j++) x[j] /= sum;
}

/** Timesteps (B,) -> 256 sinusoids -> a two-layer MLP: (B, D). */
class TimestepEmbedder {
  constructor(state) {
    this.mlp = [0, 2].map(i => new Linear(state, `t_embedder.mlp.${i}`));
    const half = this.mlp[0].I / 2, { fround } = Math;              // rounded as in float32
    this.freqs = Float32Array.from({ length: half }, (_, i) =>
      Math.exp(fround(fround(-Math.log(10000) * i) / half)));
  }
  forward(t) {
    const { mlp: [first, second], freqs } = this, B = t.length;
    const sinusoids = array(this, "sinusoids", B * first.I);
    for (let b = 0; b < B; b++)
      freqs.forEach((freq, i) => {
        const angle = Math.fround(t[b] * freq), at = b * first.I + i;
        sinusoids[at] = Math.cos(angle);
        sinusoids[at + freqs.length] = Math.sin(angle);
      });
    return second.forward(silu(first.forward(sinusoids, B), B * first.O), B);
  }
}

// ---------------------------------------------------------------- the block

/** Multi-head self-attention, (B, N, D) -> (B, N, D): the only place where tokens exchange
    information. weights (B, heads, N, N): how much each token (row) attends to each. */
class Attention {
  constructor(state, name, num_heads) {
    this.num_heads = num_heads;
    this.qkv = new Linear(state, `${name}.qkv`);
    this.proj = new Linear(state, `${name}.proj`);
  }
  forward(tokens, { B, N, D }) {
    const { num_heads } = this, d = D / num_heads;
    const qkv = this.qkv.forward(tokens, B * N);                    // (B, N, 3, heads, d)
    const weights = array(this, "weights", B * num_heads * N * N);
    const x = array(this, "x", B * N * D);                          // (B, N, heads, d)
    for (let b = 0; b < B; b++)
      for (let h = 0; h < num_heads; h++)
        for (let i = 0; i < N; i++) {
          const row = ((b * num_heads + h) * N + i) * N, out = (b * N + i) * D + h * d;
          const q = (b * N + i) * 3 * D + h * d;
          for (let j = 0; j < N; j++) {
            const k = (b * N + j) * 3 * D + D + h * d;
            let dot = 0;
            for (let n = 0; n < d; n++) dot += qkv[q + n] * qkv[k + n];
            weights[row + j] = dot / Math.sqrt(d);
          }
          softmax(weights, row, N);
          for (let n = 0; n < d; n++) {
            let sum = 0, v = b * N * 3 * D + 2 * D + h * d + n;
            for (let j = 0; j < N; j++, v += 3 * D) sum += weights[row + j] * qkv[v];
            x[out + n] = sum;
          }
        }
    return this.proj.forward(x, B * N);
  }
}

/** Two layers with GELU between them, applied to each token separately. */
class Mlp {
  constructor(state, name) {
    this.fc1 = new Linear(state, `${name}.fc1`);
    this.fc2 = new Linear(state, `${name}.fc2`);
  }
  forward(x, rows) {
    return this.fc2.forward(gelu(this.fc1.forward(x, rows), rows * this.fc1.O), rows);
  }
}

/** A LayerNorm of x (rows, D) without learned weights: `modulate` supplies its shift and scale. */
function plain_norm(x, out, rows, D) {
  for (let row = 0; row < rows * D; row += D) {
    let mean = 0, variance = 0;
    for (let i = row; i < row + D; i++) mean += x[i] / D;
    for (let i = row; i < row + D; i++) variance += (x[i] - mean) ** 2 / D;
    const factor = 1 / Math.sqrt(variance + 1e-6);
    for (let i = row; i < row + D; i++) out[i] = (x[i] - mean) * factor;
  }
  return out;
}

/** Scale and shift tokens x (B, N, D), in place, by two of the K chunks of vectors (B, K D). */
function modulate(x, vectors, shift, scale, { B, N, D }, K) {
  for (let i = 0; i < B * N * D; i++) {
    const chunks = Math.floor(i / (N * D)) * K * D + i % D;
    x[i] = x[i] * (1 + vectors[chunks + scale * D]) + vectors[chunks + shift * D];
  }
  return x;
}

/** x + gate branch, in place; gate is one of the six chunks. */
function add_gated(x, six, gate, branch, { B, N, D }) {
  for (let i = 0; i < B * N * D; i++)
    x[i] += six[(Math.floor(i / (N * D)) * 6 + gate) * D + i % D] * branch[i];
}

const [shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp] = Array(6).keys();

/** A transformer block whose LayerNorms take shift and scale from c, and whose two residual
    branches are multiplied by a gate, also from c. x changes in place. */
class DiTBlock {
  constructor(state, name, num_heads) {
    this.attn = new Attention(state, `${name}.attn`, num_heads);
    this.mlp = new Mlp(state, `${name}.mlp`);
    this.adaLN_modulation = new Linear(state, `${name}.adaLN_modulation.1`);
  }
  forward(x, c, sizes) {
    const { B, N, D } = sizes, six = this.adaLN_modulation.forward(c, B);       // (B, 6 D)
    const norm1 = plain_norm(x, array(this, "norm1", B * N * D), B * N, D);
    const attn = this.attn.forward(modulate(norm1, six, shift_attn, scale_attn, sizes, 6), sizes);
    add_gated(x, six, gate_attn, attn, sizes);
    const norm2 = plain_norm(x, array(this, "norm2", B * N * D), B * N, D);
    const mlp = this.mlp.forward(modulate(norm2, six, shift_mlp, scale_mlp, sizes, 6), B * N);
    add_gated(x, six, gate_mlp, mlp, sizes);
    return x;
  }
}

/** Tokens (B, N, D) -> (B, N, p*p*C), modulated by c once more. */
class FinalLayer {
  constructor(state) {
    this.linear = new Linear(state, "final_layer.linear");
    this.adaLN_modulation = new Linear(state, "final_layer.adaLN_modulation.1");
  }
  forward(x, c, sizes) {
    const { B, N, D } = sizes, two = this.adaLN_modulation.forward(c, B);       // (B, 2 D)
    const norm_final = plain_norm(x, array(this, "norm_final", B * N * D), B * N, D);
    return this.linear.forward(modulate(norm_final, two, 0, 1, sizes, 2), B * N);
  }
}

// ---------------------------------------------------------------- the model

/** new DiT(state, config): the weights, {name: {shape, data}}, and the arguments of dit.py's DiT
    (without learn_sigma). */
export class DiT {
  constructor(state, { input_size: H, patch_size: p, in_channels: C, hidden_size: D, depth,
                       num_heads, num_classes }) {
    Object.assign(this, { H, p, C, N: (H / p) ** 2, D, num_classes, null_class: num_classes });
    this.x_embedder = new Linear(state, "x_embedder.proj");
    this.pos_embed = state["pos_embed"].data;                                   // (1, N, D)
    this.t_embedder = new TimestepEmbedder(state);
    this.y_embedder = state["y_embedder.embedding_table.weight"].data;          // (classes + 1, D)
    this.blocks = Array.from({ length: depth }, (_, i) =>
      new DiTBlock(state, `blocks.${i}`, num_heads));
    this.final_layer = new FinalLayer(state);
  }

  /** The sum c (B, D) of the embeddings of t (B,) and y (B,), after the SiLU with which every
      adaLN_modulation begins. */
  conditioning(t, y) {
    const { D, y_embedder } = this, c = this.t_embedder.forward(t), count = y.length * D;
    for (let i = 0; i < count; i++) c[i] += y_embedder[y[Math.floor(i / D)] * D + i % D];
    return silu(c, count);
  }

  /** xt (B, C, H, H), t (B,), y (B,) -> (B, C, H, H), which the next call overwrites. */
  forward(xt, t, y) {
    const { H, p, C, N, D, pos_embed } = this, B = y.length, sizes = { B, N, D };
    const tokens = array(this, "tokens", xt.length), out = array(this, "out", xt.length);
    patchify(xt, tokens, B, C, H, p);                                           // (B, N, p*p*C)
    let x = this.x_embedder.forward(tokens, B * N);                             // (B, N, D)
    for (let i = 0; i < B * N * D; i++) x[i] += pos_embed[i % (N * D)];
    const c = this.conditioning(t, y);                                          // (B, D)
    for (const block of this.blocks) x = block.forward(x, c, sizes);            // (B, N, D)
    x = this.final_layer.forward(x, c, sizes);                                  // (B, N, p*p*C)
    patchify(out, x, B, C, H, p, true);
    return out;                                                                 // (B, C, H, H)
  }
}
