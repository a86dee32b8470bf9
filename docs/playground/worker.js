// Runs the network in a thread of its own. A panel posts {panel, id, ...job}, and results come back
// one by one. A panel's new job replaces its old one; the job that came last goes first.
import { DiT } from "./dit.js";
import { GaussianDiffusion, classifier_free_guidance } from "./diffusion.js";
import { image_noise } from "./random.js";
import { read_safetensors } from "./safetensors.js";

const LEVELS = [300, 400, 500, 600], NOISES = 4;    // of `classify`
let model, diffusion, size;                         // size: the numbers of an image

/** The images of a list, each of `size` numbers, as one array (B, C, H, H). */
function stack(images) {
  const out = new Float32Array(images.length * size);
  images.forEach((image, b) => out.set(image, b * size));
  return out;
}

/** noise(t) of images 0 to count - 1 of a seed. */
const noise_of = (seed, count = 1) => t =>
  stack(Array.from({ length: count }, (_, k) => image_noise(seed, t, k, size)));

const panels = {
  *load({ buffer }) {
    const { state, metadata } = read_safetensors(buffer), config = JSON.parse(metadata.config);
    if (config.network !== "dit" || config.process !== "ddpm" || config.model.in_channels !== 1)
      throw new Error("this page runs the network dit with the process ddpm, on grey images");
    model = new DiT(state, config.model);
    diffusion = new GaussianDiffusion(config.diffusion);
    size = model.H ** 2;
    yield { config, class_names: JSON.parse(metadata.class_names), step: JSON.parse(metadata.step),
            numbers: Object.values(state).reduce((sum, { data }) => sum + data.length, 0) };
  },

  *denoise({ y, seed, cfg_scale, steps, eta }) {
    const noise = noise_of(seed), predict = classifier_free_guidance(model, [y], cfg_scale);
    yield* diffusion.ddim_sample(predict, noise("T"), { noise, steps, eta });
  },

  /** Of each block: the attention weights (heads, N, N) of xt, and the six vectors, for y and for
      "no class" (2, 6 D), at t and at each of the timesteps. */
  *inside({ xt, t, y, timesteps }) {
    const classes = [y, model.null_class];
    model.forward(stack([xt, xt]), [t, t], classes);
    const { blocks, N, D } = model, found = blocks.map(({ attn, adaLN_modulation }) => ({
      weights: attn.weights.slice(0, attn.num_heads * N * N),
      six: adaLN_modulation.out.slice(0, 12 * D) }));
    const over_t = timesteps.map(t => model.conditioning([t, t], classes).slice()).map(c =>
      blocks.map(({ adaLN_modulation }) => adaLN_modulation.forward(c, 2).slice(0, 12 * D)));
    yield { blocks: found.map((block, k) => ({ ...block, over_t: over_t.map(six => six[k]) })) };
  },

  /** x0 noised to the timestep at a place from 0 to 1 of the way, then denoised as the class y. */
  *redraw({ x0, place, y, seed, cfg_scale, steps }) {
    const first = Math.round(place * (steps - 1)), noise = noise_of(seed);
    const t = diffusion.ddim_timesteps(steps)[first];
    const xt = diffusion.q_sample(x0, t, noise("T"));
    const predict = classifier_free_guidance(model, [y], cfg_scale);
    for (const { x_next } of diffusion.ddim_sample(predict, xt, { noise, steps, first }))
      yield { t, xt, x_next };
  },

  /** errors[level][class]: the mean squared error of x0_hat, over more and more noises. */
  *classify({ x0 }) {
    const y = Array.from({ length: model.num_classes }, (_, k) => k);
    const predict = classifier_free_guidance(model, y, 1), sums = LEVELS.map(() => y.map(() => 0));
    for (let n = 0; n < NOISES; n++) {
      LEVELS.forEach((t, level) => {
        const xt = diffusion.q_sample(x0, t, image_noise(0, "T", n, size));
        const [x0_hat] = diffusion.denoise(predict, stack(y.map(() => xt)), t);
        x0_hat.forEach((x, i) => { sums[level][Math.floor(i / size)] += (x - x0[i % size]) ** 2; });
      });
      yield { levels: LEVELS, errors: sums.map(sum => sum.map(x => x / (n + 1) / size)) };
    }
  },

  *guidance({ y, seed, steps, scales, count }) {
    const noise = noise_of(seed, count);
    for (const [column, scale] of scales.entries()) {
      const predict = classifier_free_guidance(model, Array(count).fill(y), scale);
      for (const { x0_hat } of diffusion.ddim_sample(predict, noise("T"), { noise, steps }))
        yield { column, x0_hat };
    }
  },
};

const jobs = new Map(), { port1, port2 } = new MessageChannel();        // panel -> {id, results}

onmessage = ({ data: { panel, id, ...job } }) => {
  jobs.delete(panel);                                                   // to become the last
  jobs.set(panel, { id, results: panels[panel](job) });
  if (jobs.size === 1) port2.postMessage("continue");
};

port1.onmessage = () => {                           // one result, then the turn of other messages
  const panel = [...jobs.keys()].pop(), { id, results } = jobs.get(panel);
  const { value, done } = results.next();
  if (done) jobs.delete(panel);
  else postMessage({ panel, id, ...value });
  if (jobs.size) port2.postMessage("continue");
};
