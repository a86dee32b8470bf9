"""docs/playground: its JavaScript in node against the Python that it restates, and the page in a
headless Chromium. Skipped where the program is absent."""

import base64
import functools
import http.server
import io
import json
import os
import select
import shlex
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import ROOT
from diffusion import PREDICTIONS, GaussianDiffusion
from sample import generate, load
from support import checkpoint as checkpoints
from support import flags
from support.compute import image_noise
from support.data import to_uint8
from tools import convert, evaluate
from tools.figures import AttentionWeights

PLAYGROUND = ROOT / "docs" / "playground"
WEIGHTS = PLAYGROUND / "weights.safetensors"
MODULES = {"dit.js": "DiT", "diffusion.js": "GaussianDiffusion, classifier_free_guidance",
           "random.js": "image_noise", "safetensors.js": "read_safetensors"}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The page's checkpoint, in Python."""
    path = tmp_path_factory.mktemp("playground") / "dit.pt"
    assert convert.main(["import", str(WEIGHTS), str(path)]) == 0
    return load(path, "cpu")


@pytest.fixture
def node(tmp_path):
    """node(script, **inputs): what a script with the page's modules returns. It finds the inputs by
    name, and `model` and `diffusion`, those of the weights; typed arrays come back as tensors."""
    if not shutil.which("node"):
        pytest.skip("node is absent")

    def run(script: str, **inputs):
        for name in MODULES:
            shutil.copy(PLAYGROUND / name, tmp_path)
        (tmp_path / "package.json").write_text('{"type": "module"}')
        imports = [f'import {{ {names} }} from "./{name}";' for name, names in MODULES.items()]
        (tmp_path / "script.js").write_text("\n".join([
            *imports, 'import { readFileSync } from "node:fs";',
            f"const file = readFileSync({json.dumps(str(WEIGHTS))});",
            "const { state, metadata } = read_safetensors(file.buffer.slice(file.byteOffset, "
            "file.byteOffset + file.length)), config = JSON.parse(metadata.config);",
            "const model = new DiT(state, config.model);",
            "const diffusion = new GaussianDiffusion(config.diffusion);",
            *(f"const {name} = {json.dumps(value)};" for name, value in inputs.items()),
            f"const result = (() => {{ {script} }})();",
            "console.log(JSON.stringify(result, (key, value) => "
            "ArrayBuffer.isView(value) ? [...value] : value));"]))
        done = subprocess.run(["node", "script.js"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


# ---------------------------------------------------------------- the modules


def test_noise_is_that_of_sample_py(node):
    keys = [(0, "T", 0), (0, "T", 17), (12345, 999, 3), (999_999_999, 0, 0)]
    found = node("return keys.map(([seed, t, k]) => image_noise(seed, t, k, 784));", keys=keys)
    for (seed, t, k), noise in zip(keys, found, strict=True):
        theirs = image_noise(seed, t, k, k + 1, (1, 28, 28)).flatten()
        assert torch.allclose(torch.tensor(noise), theirs, atol=1e-5), (seed, t, k)


def test_forward_and_every_intermediate_of_a_block(node, shipped):
    model = shipped.model
    xt = image_noise(0, "T", 0, 10, (1, 28, 28))
    t, y = [0, 1, 50, 200, 400, 500, 600, 800, 998, 999], [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    found = node("""
        const out = model.forward(Float32Array.from(xt), t, y).slice();
        const { attn, mlp, adaLN_modulation, norm1, norm2 } = model.blocks.at(-1);
        return { out, six: adaLN_modulation.out, norm1, qkv: attn.qkv.out, weights: attn.weights,
                 averages: attn.x, attn: attn.proj.out, norm2, gelu: mlp.fc1.out, mlp: mlp.fc2.out,
                 x: model.x_embedder.out };""", xt=xt.flatten().tolist(), t=t, y=y)
    block, theirs = model.blocks[-1], {}
    inputs = dict(norm1=block.attn, averages=block.attn.proj, norm2=block.mlp, gelu=block.mlp.fc2)
    outputs = dict(six=block.adaLN_modulation, qkv=block.attn.qkv, attn=block.attn, mlp=block.mlp,
                   x=block)
    hooks = [module.register_forward_hook(lambda _, x, out, name=name: theirs.update({name: x[0]}))
             for name, module in inputs.items()]
    hooks += [module.register_forward_hook(lambda _, x, out, name=name: theirs.update({name: out}))
              for name, module in outputs.items()]
    with torch.no_grad(), AttentionWeights() as attention:
        theirs["out"] = model(xt, torch.tensor(t), torch.tensor(y))
    theirs["weights"] = attention.found[-1]
    for hook in hooks:
        hook.remove()
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():              # some of a block's values are in the hundreds
        error = (torch.tensor(found[name]) - value.flatten()).abs().max()
        assert error < 1e-5 * max(10, value.abs().max()), (name, error)


@pytest.mark.parametrize("y, seed, cfg_scale, steps, eta", [
    (3, 0, 1.2, 25, 0), (8, 7, 4, 7, 1), (5, 1, 1, 2, 0), (0, 2, 0, 10, 0.5)])
def test_samples_are_those_of_sample_py(node, shipped, y, seed, cfg_scale, steps, eta):
    found = node("""
        const noise = t => image_noise(seed, t, 0, 784);
        const predict = classifier_free_guidance(model, [y], cfg_scale);
        return [...diffusion.ddim_sample(predict, noise("T"), { noise, steps, eta })].pop().x_next;
        """, y=y, seed=seed, cfg_scale=cfg_scale, steps=steps, eta=eta)
    theirs = generate(shipped, [y], seed=seed, cfg_scale=cfg_scale, steps=steps, eta=eta,
                      precision="fp32").as_subclass(Tensor)
    grey = to_uint8(torch.tensor(found)).int() - to_uint8(theirs).flatten().int()
    assert grey.abs().max() <= 1


def test_process_of_each_prediction(node):
    x0, eps, t = torch.rand(4, 9) * 2 - 1, torch.randn(4, 9), 300
    process = {name: GaussianDiffusion(prediction=name) for name in PREDICTIONS}
    xt = process["x0"].q_sample(x0[:, None, None], torch.tensor(t), eps[:, None, None]).flatten()
    found = node("""
        const arrays = [x0, eps, xt].map(x => Float32Array.from(x));
        return [diffusion.q_sample(arrays[0], t, arrays[1]), Object.keys(targets).map(prediction =>
          new GaussianDiffusion({ prediction }).x0_hat(Float32Array.from(targets[prediction]),
                                                       arrays[2], t)),
          Array.from({ length: 1000 }, (_, i) => diffusion.ddim_timesteps(i + 1))];""",
        x0=x0.flatten().tolist(), eps=eps.flatten().tolist(), xt=xt.tolist(), t=t,
        targets={name: each.target(x0, eps, torch.tensor(t)).flatten().tolist()
                 for name, each in process.items()})
    assert torch.allclose(torch.tensor(found[0]), xt, atol=1e-6)
    assert torch.allclose(torch.tensor(found[1]), x0.flatten().expand(3, -1), atol=1e-5)
    assert found[2] == [process["x0"].ddim_timesteps(steps) for steps in range(1, 1001)]


# ---------------------------------------------------------------- the page


class Page:
    """A page in a headless Chromium, which is driven through two pipes: the DevTools protocol."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", "--remote-debugging-pipe")

    def __init__(self, profile):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # the protocol's descriptors are 3 and 4
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "-", "chromium", *self.FLAGS,
             f"--user-data-dir={profile}"], pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", flatten=True, **target)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """The result of a method; events that come before it are kept. Raises EOFError."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        message = dict(id=self.count, method=method, params=params, **session)
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.answers], [], [], 60)
                if not ready or not (more := os.read(self.answers, 1 << 20)):
                    raise EOFError("chromium does not answer")
                self.buffer += more
            line, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def js(self, expression: str):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.js("document.body.innerText"))
            time.sleep(0.05)

    def pixels(self, selector: str) -> np.ndarray:
        """A canvas, uint8 (H, H)."""
        url = self.js(f"document.querySelector({json.dumps(selector)}).toDataURL()")
        png = base64.b64decode(url.split(",")[1])
        return np.asarray(Image.open(io.BytesIO(png)).convert("L"))

    def mouse(self, selector: str, *points: tuple[float, float], drag: bool = False) -> None:
        """Move over an element through points, fractions of its width and height."""
        left, top, width, height = self.js(
            f"(element => {{ element.scrollIntoView({{block: 'center'}}); const r = "
            "element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })"
            f"(document.querySelector({json.dumps(selector)}))")
        for i, (x, y) in enumerate(points):
            where = dict(x=left + x * width, y=top + y * height, button="left" if drag else "none")
            self.call("Input.dispatchMouseEvent", type="mouseMoved", buttons=int(drag and i > 0),
                      **where)
            if drag and i in (0, len(points) - 1):
                self.call("Input.dispatchMouseEvent", clickCount=1,
                          type="mouseReleased" if i else "mousePressed", **where)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The playground, loaded from a local web server, with all its first results."""
    if not shutil.which("chromium"):
        pytest.skip("chromium is absent")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(
        QuietHandler, directory=PLAYGROUND))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = Page(tmp_path_factory.mktemp("chromium"))
    except EOFError:
        pytest.skip("chromium does not start here")
    page.url = f"http://127.0.0.1:{server.server_port}/"
    page.call("Page.navigate", url=page.url)
    page.wait_for("document.querySelectorAll('#six svg').length === 12 && "
                  "document.querySelector('#named').textContent")
    yield page
    page.process.terminate()
    page.process.wait()
    server.shutdown()


@pytest.fixture(scope="module")
def ruler():
    state = checkpoints.read_archive(evaluate.SHIPPED_RULER)
    ruler = evaluate.Ruler(1, 10).eval()
    ruler.load_state_dict(state["weights"])
    return lambda pixels: int(evaluate.extract(
        ruler, torch.tensor(pixels)[None, None], "reading")[1])


def test_page_draws_the_digit_that_was_asked_for(page, shipped, ruler):
    for digit in (7, 2):
        page.js(f"document.querySelectorAll('[name=y]')[{digit}].click()")
        page.wait_for("document.querySelector('#speed').textContent")
        sample = page.pixels("#sample")
        assert ruler(sample) == digit
        theirs = to_uint8(generate(shipped, [digit], precision="fp32").as_subclass(Tensor))
        assert np.abs(sample.astype(int) - theirs[0, 0].numpy().astype(int)).max() <= 1
    lines = page.js("document.querySelector('#command').textContent").split("\n")
    convert.parser().parse_args(shlex.split(lines[0])[3:])
    args = flags.sample_parser("").parse_args(shlex.split(lines[1])[2:])
    assert (args.labels, args.seed, args.steps, args.cfg_scale, args.precision) == (
        ["2"], 0, 25, [1.2], "fp32")


def test_attention_panel_follows_the_pointer(page):
    def heads() -> list:
        return page.js("[...document.querySelectorAll('#attention svg')].map(svg => svg.innerHTML)")
    page.mouse("[name=patch][value='10']", (0.5, 0.5))
    before = heads()
    page.mouse("[name=patch][value='5']", (0.5, 0.5))
    assert all(a != b for a, b in zip(before, heads(), strict=True))
    before = page.js("document.querySelector('#six').innerHTML")
    page.js("document.querySelectorAll('[name=block]')[3].click()")
    assert page.js("document.querySelector('#six').innerHTML") != before


def test_a_drawn_one_is_named(page, ruler):
    page.js("document.querySelector('#clear').click()")
    page.mouse("#drawing", (0.55, 0.15), (0.53, 0.4), (0.5, 0.6), (0.47, 0.85), drag=True)
    page.wait_for("document.querySelector('#named').textContent.startsWith('Smallest: 1.')")
    assert ruler(page.pixels("#x0")) == 1


def test_nothing_failed_and_nothing_came_from_elsewhere(page):
    page.js("1")                                    # collects the last events
    requests = [event["params"]["request"]["url"] for event in page.events
                if event["method"] == "Network.requestWillBeSent"]
    assert {page.url, page.url + "page.js", page.url + "weights.safetensors"} <= set(requests)
    assert all(url.startswith((page.url, "data:")) for url in requests), requests
    failures = [event for event in page.events if event["method"] == "Runtime.exceptionThrown"
                or event["method"] == "Log.entryAdded"
                and event["params"]["entry"]["level"] == "error"]
    assert not failures, failures
    for path in PLAYGROUND.glob("*.*"):             # the worker's requests are not among these
        assert path == WEIGHTS or "://" not in path.read_text(), path
