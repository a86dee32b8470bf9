// The page: reads the controls, asks worker.js for what they mean, draws the answers.
const SIX = { gate_attn: 2, gate_mlp: 5, scale_attn: 1, shift_attn: 0, scale_mlp: 4, shift_mlp: 3 };
const TIMES = Array.from({ length: 28 }, (_, i) => 37 * i);             // 0 to 999, of the curves
const COLUMNS = 13, SCALES = [0, 1, 2, 4], COUNT = 3;                   // of the strip; of panel 4
const $ = selector => document.querySelector(selector);
const $$ = selector => [...document.querySelectorAll(selector)];
const add = (element, html) => element.insertAdjacentHTML("beforeend", html);
let H, side, names, last_id = 0;                    // image side, patches in a row, class names

// ---------------------------------------------------------------- the worker, controls, images

const worker = new Worker("worker.js", { type: "module" }), asked = {};

/** Give a panel a new job, and call show(result) for each of its results. */
function ask(panel, job, show) {
  asked[panel] = { id: ++last_id, show };
  worker.postMessage({ panel, id: last_id, ...job });
}
const fail = message => { $("#status").textContent = `This does not work: ${message}`; };
worker.onerror = ({ message }) => fail(message ?? "the browser cannot start worker.js");
worker.onmessage = ({ data: { panel, id, ...result } }) => {
  if (id === asked[panel].id) asked[panel].show(result);
};

/** The number that the control of this name is set to. */
const value = name => Number($(`[name=${name}]:not([type=radio]), [name=${name}]:checked`).value);
const settings = () => Object.fromEntries(["y", "seed", "cfg_scale", "steps", "eta"].map(
  name => [name, value(name)]));

const add_radios = (fieldset, labels, checked) => labels.forEach((text, i) => {
  add(fieldset, `<label class="pill"><input type="radio" name="${fieldset.dataset.name}"
    value="${i}" ${i === checked ? "checked" : ""}><span></span></label>`);
  fieldset.lastChild.lastChild.textContent = text;
});

/** Draw an image x (H, H) in [-1, 1] on a canvas: all of it, or the part at left, top. */
function paint(canvas, x, left = null, top = 0) {
  if (left === null) canvas.width = canvas.height = H;
  const image = new ImageData(H, H);
  image.data.fill(255);                             // the array rounds, and clips to 0..255
  for (let i = 0; i < H * H; i++) image.data.fill((x[i] + 1) * 127.5, 4 * i, 4 * i + 3);
  canvas.getContext("2d").putImageData(image, left ?? 0, top);
}

// ---------------------------------------------------------------- 1. denoise

let frames = [], chosen = null;                     // chosen: the reader's place, from 0 to 1
const finished = () => frames.length === value("steps");

function denoise() {
  const job = settings(), started = performance.now(), none = job.y === names.length;
  frames = [];
  $("#speed").textContent = "";
  $$("#settings output").forEach(out => { out.value = out.nextElementSibling.value; });
  $$(".step").forEach(slider => { slider.max = job.steps - 1; });
  $("#command").textContent = "python -m tools.convert import docs/playground/weights.safetensors "
    + `dit.pt\npython sample.py dit.pt --precision fp32 --labels "${names[none ? 0 : job.y]}" `
    + `--cfg-scale ${none ? 0 : job.cfg_scale} --steps ${job.steps} --eta ${job.eta} `
    + `--seed ${job.seed}`;
  ask("denoise", job, frame => {
    frames.push(frame);
    show_step();
    if (!finished()) return;
    $("#speed").textContent = `${Math.round((performance.now() - started) / job.steps)} ms a step.`;
    look_inside();
  });
}

/** The number of the chosen step; by default the newest, at the end one that is half denoised. */
const position = () => Math.min(frames.length - 1,
  Math.round((chosen ?? (finished() ? 0.6 : 1)) * (value("steps") - 1)));

function show_step() {
  const at = position(), { t, xt, x0_hat } = frames[at], last = value("steps") - 1;
  paint($("#xt"), xt);
  paint($("#x0_hat"), x0_hat);
  paint($("#sample"), frames.at(-1).x_next);
  $$(".step").forEach(slider => { slider.value = at; });
  $$(".time").forEach(span => { span.textContent = `Step ${at + 1} of ${last + 1}: t = ${t}`; });
  const strip = Object.assign($("#strip"), { width: COLUMNS * (H + 2), height: 2 * H + 6 });
  const left = column => column * (H + 2) + 1;
  for (let column = 0; column < COLUMNS; column++) {
    const frame = frames[Math.round(column / (COLUMNS - 1) * last)];
    if (!frame) break;
    paint(strip, frame.xt, left(column), 2);
    paint(strip, frame.x0_hat, left(column), H + 4);
  }
  const context = Object.assign(strip.getContext("2d"), { strokeStyle: "#00dcff", lineWidth: 2 });
  context.strokeRect(left(Math.round(at / (last || 1) * (COLUMNS - 1))), 1, H, 2 * H + 4);
}

// ---------------------------------------------------------------- 2. look inside

let inside;                                         // {t, blocks}: the result of this job

function look_inside() {
  if (!finished()) return;
  const { t, xt } = frames[position()];
  ask("inside", { xt, t, y: value("y"), timesteps: TIMES }, ({ blocks }) => {
    inside = { t, blocks };
    $$("#attention canvas").forEach(canvas => paint(canvas, xt));
    show_inside();
  });
}

function show_inside() {
  if (!inside) return;
  const { weights, six, over_t } = inside.blocks[value("block")], D = six.length / 12;
  const patch = value("patch"), N = side ** 2, x = i => i % side, y = i => Math.floor(i / side);
  const square = i => `<rect x="${x(i)}" y="${y(i)}" width="1" height="1"`;
  $$("#attention svg").forEach((svg, head) => {     // opacity: of 10%, 0.32
    const row = [...weights.subarray((head * N + patch) * N, (head * N + patch + 1) * N)];
    svg.innerHTML = row.map((w, i) => `${square(i)} opacity="${Math.sqrt(w)}"/>` + (w < 0.1 ? "" :
      `<text x="${x(i) + 0.5}" y="${y(i) + 0.6}">${Math.round(100 * w)}</text>`)).join("")
      + `${square(patch)} class="patch"/>`;
  });
  const chunk = (six, n) => [...six.subarray(n * D, (n + 1) * D)];      // n + 6: of "no class"
  $("#six").innerHTML = Object.entries(SIX).map(([name, n]) => {
    const own = chunk(six, n), none = chunk(six, n + 6), largest = Math.max(...own.map(Math.abs));
    const bars = numbers => numbers.map((v, i) => `M${i + 0.5} 20v${-20 * v / largest}`).join("");
    const means = [n, n + 6].map(n => over_t.map(six =>
      chunk(six, n).reduce((sum, v) => sum + Math.abs(v) / D, 0)));
    const top = Math.max(...means.flat());
    const curve = means => "M" + means.map((v, i) => [TIMES[i], 40 - 36 * v / top]);
    return `<div><code>${name}</code><small>up to ${largest.toFixed(2)}</small></div>
      <svg viewBox="0 0 ${D} 40" preserveAspectRatio="none" role="img" aria-label="${name}">
        <path class="bars" d="${bars(own)}"/>
        <path class="bars class" d="${bars(own.map((v, i) => v - none[i]))}"/></svg>
      <svg viewBox="0 0 999 40" preserveAspectRatio="none" role="img" aria-label="${name} over t">
        <path d="M${inside.t} 0V40${curve(means[1])}"/>
        <path class="class" d="${curve(means[0])}"/></svg>`;
  }).join("");
}

// ---------------------------------------------------------------- 3. draw, 4. guidance

const drawing = $("#drawing"), pen = drawing.getContext("2d", { willReadFrequently: true });
Object.assign(pen, { lineWidth: 24, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });

/** The drawing as in MNIST: the longer side 20 of 28 pixels, the centre of mass in the middle. */
function drawn() {
  const { data } = pen.getImageData(0, 0, 280, 280), xs = [], ys = [];
  for (let i = 0; i < 280 ** 2; i++)
    if (data[4 * i] > 127) { xs.push(i % 280); ys.push(Math.floor(i / 280)); }
  if (!xs.length) return null;
  const length = x => x.reduce((a, b) => Math.max(a, b)) - x.reduce((a, b) => Math.min(a, b)) + 1;
  const mean = x => x.reduce((a, b) => a + b) / x.length;
  const scale = 20 / 28 * H / Math.max(length(xs), length(ys));
  Object.assign($("#x0"), { width: H, height: H }); // clears it
  const small = $("#x0").getContext("2d", { willReadFrequently: true }), size = 280 * scale;
  small.imageSmoothingQuality = "high";
  small.drawImage(drawing, H / 2 - mean(xs) * scale, H / 2 - mean(ys) * scale, size, size);
  const pixels = small.getImageData(0, 0, H, H).data;                   // white, partly opaque
  return new Float32Array(H * H).map((_, i) => pixels[4 * i] * pixels[4 * i + 3] / 32512.5 - 1);
}

function redraw() {
  const x0 = drawn(), job = { ...settings(), x0, place: value("place") / 24, y: value("as") };
  if (x0) ask("redraw", job, ({ t, xt, x_next }) => {
    $("#noised").firstChild.data = `Noised to t = ${t}`;
    paint($("#noisy"), xt);
    paint($("#denoised"), x_next);
  });
}

function classify() {
  const x0 = drawn();
  if (x0) ask("classify", { x0 }, ({ levels, errors }) => {
    const sums = names.map((_, y) => errors.reduce((sum, error) => sum + error[y], 0));
    const best = sums.indexOf(Math.min(...sums));
    $("#errors").innerHTML = sums.map((sum, y) => `<div class="${y === best ? "best" : ""}"><span>
      </span><b>${"<i></i>".repeat(levels.length)}</b>${sum.toFixed(2)}</div>`).join("");
    $$("#errors span").forEach((span, y) => { span.textContent = names[y]; });
    $$("#errors i").forEach((part, i) => {
      const level = i % levels.length, y = Math.floor(i / levels.length);
      part.style.width = `${100 * errors[level][y] / Math.max(...sums)}%`;
      part.style.opacity = 1 - level / levels.length;
    });
    $("#named").textContent = `Smallest: ${names[best]}. From the left: t = ${levels.join(", ")}.`;
  });
}

function guidance() {
  ask("guidance", { ...settings(), scales: SCALES, count: COUNT }, ({ column, x0_hat }) => {
    $$(`#scales figure:nth-child(${column + 1}) canvas`).forEach((canvas, k) =>
      paint(canvas, x0_hat.subarray(k * H * H, (k + 1) * H * H)));
  });
}

// ---------------------------------------------------------------- events, and the start

document.oninput = ({ target }) => {
  if (target.closest("#settings")) { guidance(); redraw(); denoise(); }     // the last goes first
  else if (target.closest("#redraw")) redraw();
  else if (target.matches(".step")) {
    chosen = target.value / Math.max(target.max, 1);
    if (frames.length) show_step();
    look_inside();
  } else show_inside();
};
document.onpointerover = ({ target }) => { if (target.name === "patch") target.click(); };

drawing.onpointerdown = event => {
  drawing.setPointerCapture(event.pointerId);
  pen.beginPath();
};
drawing.onpointermove = ({ offsetX, offsetY, buttons }) => {
  pen.lineTo(offsetX * 280 / drawing.clientWidth, offsetY * 280 / drawing.clientWidth);
  if (buttons) pen.stroke();
};
drawing.onpointerup = () => { redraw(); classify(); };
$("#clear").onclick = () => pen.clearRect(0, 0, 280, 280);
$("#take").onclick = () => {
  pen.drawImage($("#sample"), 0, 0, 280, 280);
  drawing.onpointerup();
};

function start({ config: { model, recipe, data, sampling }, class_names, step, numbers }) {
  [H, side, names] = [model.input_size, model.input_size / model.patch_size, class_names];
  $("#about").textContent = `${recipe.model}, ${numbers.toLocaleString("en")} numbers, trained for `
    + `${step.toLocaleString("en")} steps of ${recipe.batch_size} images (${data.dataset}).`;
  for (const name of ["cfg_scale", "steps", "eta"]) $(`[name=${name}]`).value = sampling[name];
  for (const fieldset of $$(".classes"))
    add_radios(fieldset, [...names, "none"], Math.min(3, names.length));
  add_radios($("[data-name=block]"), Array.from({ length: model.depth }, (_, i) => i), 0);
  $("#patches").style.gridTemplateColumns = `repeat(${side}, 1fr)`;
  for (let i = 0; i < side ** 2; i++)
    add($("#patches"), `<input type="radio" name="patch" value="${i}" aria-label="patch ${i}">`);
  $$("[name=patch]")[side + 1].checked = true;
  for (let head = 0; head < model.num_heads; head++)
    add($("#attention"), `<figure><div class="patches"><canvas></canvas><svg role="img"
      aria-label="Attention" viewBox="0 0 ${side} ${side}"></svg></div>head ${head}</figure>`);
  for (const scale of SCALES)
    add($("#scales"), `<figure>scale ${scale}`
      + `<canvas role="img" aria-label="scale ${scale}"></canvas>`.repeat(COUNT));
  pen.stroke(new Path2D("M160 40L70 170H215M165 110L160 245"));         // a 4, to begin with
  drawing.onpointerup();
  $("#settings").dispatchEvent(new Event("input", { bubbles: true }));
}

fetch("weights.safetensors").then(response => {
  if (!response.ok) throw new Error(`weights.safetensors: ${response.statusText}`);
  return response.arrayBuffer();
}).then(buffer => ask("load", { buffer }, start)).catch(error => fail(error.message));
