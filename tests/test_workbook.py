"""tools/workbook.py: what it cuts, what it says about right and wrong functions, what it trains."""

import re
import textwrap

import pytest

from conftest import ROOT, command, refused
from tools import workbook
from tools.workbook import BLANKS, LESSON

RAISE = "raise NotImplementedError"


@pytest.fixture
def folder(tmp_path):
    assert workbook.main([str(tmp_path / "mine")]) == 0
    return tmp_path / "mine"


@pytest.fixture
def check(folder, capsys):
    """check({name: body}, dit=source) -> what is said of each function (the lesson's, but for
    those bodies; None: blank), and the exit status."""
    def run(bodies: dict, **files: str) -> tuple[dict, int]:
        for file, source in LESSON.items():
            for blank in (blank for blank in BLANKS if blank.file == file and blank.name in bodies):
                body = bodies[blank.name] and textwrap.dedent(bodies[blank.name]).strip()
                cut = workbook.blanked(source, [blank.name])
                indent = re.search(rf"\n( *){RAISE}", cut)[1]
                source = cut.replace(RAISE, textwrap.indent(body or RAISE, indent).strip())
            (folder / file).write_text(files.get(file[:-3], source))
        capsys.readouterr()
        status = workbook.main([str(folder), "--check"])
        out, err = capsys.readouterr()
        assert err == ""
        lines = [line.split(None, 2) for line in out.splitlines()]
        return {name: text for _, name, text in lines}, status

    return run


def test_bodies_are_cut_and_nothing_else(folder):
    for file, source in LESSON.items():
        cut = (folder / file).read_text()
        rest = iter(source.splitlines())                    # comments and layout stay
        assert all(line in rest for line in cut.splitlines() if line.strip() != RAISE)
        names = [blank.name for blank in BLANKS if blank.file == file]
        assert cut.count(RAISE) == len(names) == 5
        assert cut.count('"""') == source.count('"""')
        assert [re.findall(r"def (\w+)", text)[-1] for text in cut.split(RAISE)[:-1]] == [
            name.split(".")[-1] for name in names]


def test_a_learners_work_is_never_overwritten(folder, tmp_path):
    (folder / "dit.py").write_text("mine")
    for taken in (folder, folder / "dit.py"):
        assert "exists and is not empty" in refused(workbook.main, taken)
    assert (folder / "dit.py").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert workbook.main([str(tmp_path / "empty")]) == 0


def test_the_lesson_is_right_and_blanks_are_not_written(check):
    said, status = check({})
    assert status == 0 and [said.pop(blank.name) for blank in BLANKS] == ["right"] * 10
    said, status = check({blank.name: None for blank in BLANKS})
    assert status == 1 and all(said[blank.name].startswith("not written yet") for blank in BLANKS)


def test_each_known_mistake_is_recognised_alone(check):
    """The changes fit the lesson's source as it is, and no two have the same result."""
    for blank in BLANKS:
        for words, changes in blank.mistakes.items():
            source, (old, new) = LESSON[blank.file], changes.split(" -> ")
            assert old in source, (blank.name, old)
            text = workbook.verdict(blank, ROOT / blank.file, source.replace(old, new).encode())
            assert re.fullmatch(rf"([^:]+: )*{re.escape(words)}", text), (blank.name, text)


ATTENTION = """
    B, N, D = x.shape
    q, k, v = (u.view(B, N, self.num_heads, -1).transpose(1, 2) for u in self.qkv(x).chunk(3, 2))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))
"""
BLOCK = """
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
    x = x + g1 * self.attn(self.norm1(x) * (s1 + 1) + b1)
    return x + g2 * self.mlp(self.norm2(x) * (s2 + 1) + b2)
"""
GUIDED = """
    return lambda xt, t: model(xt, torch.full((len(y),), t), y).lerp(
        model(xt, torch.full((len(y),), t), 0 * y + model.null_class), 1 - cfg_scale)
"""


@pytest.mark.parametrize("name, body, text", [
    ("Attention.forward", ATTENTION, "right"), ("DiTBlock.forward", BLOCK, "right"),
    ("classifier_free_guidance", GUIDED, "right"),
    ("Attention.forward", ATTENTION.replace(" / q.shape[-1] ** 0.5", ""),
     "1 / sqrt(D / heads) is missing"),
    ("Attention.forward", ATTENTION.replace("0.5", "0.49"), "wrong by up to 0.0"),
    ("DiTBlock.forward", BLOCK.replace("b1, s1, g1, b2, s2", "s1, b1, g1, s2, b2"),
     "shift and scale are exchanged"),
    ("classifier_free_guidance", GUIDED.replace("1 - cfg_scale", "cfg_scale"),
     "cfg_scale 3: with and without class are exchanged"),
    ("patchify", "return x.flatten(1)", "(5, 288) float32, not (5, 16, 18) float32"),
    ("patchify", "x.flatten(1)", "None, not (5, 16, 18) float32"),
    ("patchify", "return x.permute(0, 7)", "line N: RuntimeError: permute(sparse_coo)"),
    ("unpatchify", "return torch.zeros(5, 2, 12, 12) / 0", "wrong by up to nan; "),
    ("TimestepEmbedder.forward", "return self.no", "line N: AttributeError: 'TimestepEmbedder' "),
    ("GaussianDiffusion.q_sample", "return x0.mul_(2)",
     "line N: RuntimeError: Inplace update to inference tensor"),
    ("GaussianDiffusion.target", "return eps", "prediction v: wrong by up to "),
    ("GaussianDiffusion.x0_and_eps", "return out", "prediction eps: (3, 2, 4, 4) float32, not "
     "results x0_hat, eps_hat"),
    ("GaussianDiffusion.ddim_sample", "while True:\n    yield 1, xT, xT",
     "eta 0: results step 1, step 2, step 3, step 4, step 5, not"),
    ("GaussianDiffusion.ddim_sample", "return 4 * [(1, xT, 2)]", "eta 0: step 1: t: 1, not 999"),
    ("GaussianDiffusion.ddim_sample", "yield xT", "eta 0: results step 1, not results step 1, "),
])
def test_functions_written_in_another_way(check, name, body, text):
    file = next(blank.file for blank in BLANKS if blank.name == name)
    line = workbook.blanked(LESSON[file], [name]).partition(RAISE)[0].count("\n") + 1
    text, (said, status) = text.replace("line N", f"line {line}"), check({name: body})
    assert said[name].startswith(text) and status == (text != "right")
    others = [said[blank.name] for blank in BLANKS if blank.name != name]
    assert others == ["right"] * 9                          # each is tested alone


def test_files_that_do_not_load(check, folder):
    said, status = check({}, dit="import math\n\ndef patchify(x, p:\n")
    assert status == 1 and said["patchify"] == "SyntaxError: '(' was never closed (dit.py, line 3)"
    assert list(said.values()).count("right") == 5          # diffusion.py
    (folder / "dit.py").unlink()
    process = command("-m", "tools.workbook", folder, "--check", cwd=ROOT)
    assert "No such file" in process.communicate()[1] and process.returncode == 2


def test_train_py_trains_with_the_folders_files(folder, tmp_path):
    for file, source in LESSON.items():
        (folder / file).write_text(source + f'\nif __name__ != "__main__":\n    print("my {file}")')
    process = command(folder / "train.py", "--dataset", "glyphs", "--batch-size", 4, "--steps", 2,
                      "--no-compile", "--model", "DiT-Nano/7", "--out", tmp_path / "run",
                      cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith(f"training with dit.py and diffusion.py of {folder}\n")
    assert "my dit.py" in out and "my diffusion.py" in out
    assert (tmp_path / "run" / "step_0000002.pt").exists()
