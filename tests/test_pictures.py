"""support/pictures.py: grids, panels, the trajectory strip and the animation, pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from PIL._util import DeferredError

from support import pictures
from support.data import to_uint8


def some_images(count: int, channels: int = 1, side: int = 28) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)


def cell(sheet: Image.Image, row: int, column: int, side: int, scale: int, top: int = 0,
         left: int = 0) -> np.ndarray:
    """One image of a sheet in its own size, (H, W, 3), checked to be enlarged `scale` times."""
    pitch = side * scale + 2
    y, x = top + 2 + row * pitch, left + 2 + column * pitch
    shown = np.asarray(sheet)[y : y + side * scale, x : x + side * scale]
    small = shown[::scale, ::scale]
    assert np.array_equal(shown, small.repeat(scale, 0).repeat(scale, 1))
    return small


def as_shown(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).expand(-1, -1, 3).numpy()


# ---------------------------------------------------------------- grids and panels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count, scale", [(5, 4), (16, 4), (17, 2)])
def test_a_grid_shows_the_images_in_reading_order(count, scale, channels):
    images = some_images(count, channels)
    sheet = pictures.grid(images, 3)
    pitch = 28 * scale + 2                          # grids of few images are enlarged more
    assert sheet.size == (3 * pitch + 2, -(-count // 3) * pitch + 2)
    for i, image in enumerate(images):
        assert np.array_equal(cell(sheet, i // 3, i % 3, 28, scale), as_shown(image))


@pytest.mark.parametrize("side, scales", [(7, (16, 8)), (32, (4, 2)), (64, (2, 1)), (256, (1, 1))])
def test_the_enlargement_follows_the_size_of_the_images(side, scales):
    for count, scale in zip((2, 17), scales, strict=True):
        width = 2 * (side * scale + 2) + 2
        assert pictures.grid(some_images(count, side=side), 2).width == width
    assert pictures.grid(some_images(2, side=side), 2, scale=3).width == 2 * (side * 3 + 2) + 2


def test_a_grid_of_floats_is_that_of_their_uint8():
    x = torch.linspace(-1.2, 1.2, 4 * 28 * 28).view(4, 1, 28, 28)
    assert np.array_equal(pictures.grid(x, 2), pictures.grid(to_uint8(x), 2))


def test_a_title_stands_above_the_grid():
    images = some_images(4)
    plain, titled = pictures.grid(images, 2), pictures.grid(images, 2, "guidance 1.5")
    above = titled.height - plain.height
    assert above > 12
    assert np.array_equal(titled.crop((0, above, *titled.size)), plain)
    title = titled.crop((0, 0, titled.width, above))
    assert np.asarray(title).max() > 200
    other = pictures.grid(images, 2, "guidance 2").crop((0, 0, titled.width, above))
    assert not np.array_equal(title, other)


def test_panels_side_by_side_are_separated_by_a_visible_gap():
    sheets = [pictures.grid(some_images(n), 2) for n in (2, 4, 2)]
    row = pictures.side_by_side(sheets)
    gap = (row.width - sum(s.width for s in sheets)) // 2
    assert gap >= 8 and row.height == sheets[1].height
    left = 0
    for sheet in sheets:
        panel = row.crop((left, 0, left + sheet.width, sheet.height))
        assert np.array_equal(panel, sheet)
        left += sheet.width + gap
    between = np.asarray(row)[:, sheets[0].width : sheets[0].width + gap].astype(int)
    edge = np.asarray(sheets[1])[:, :1].astype(int)         # the margin that surrounds each grid
    assert np.abs(between - edge).min() > 100
    assert pictures.side_by_side(sheets[:1]).size == sheets[0].size


# ---------------------------------------------------------------- the denoising


def denoising(steps: int, images: int = 1) -> list[tuple]:
    """(t, xt, x0_hat, xt_next) for each step, as a sampler reports them: floats, each different."""
    x = torch.linspace(-1, 1, 3 * steps * images * 28 * 28)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x = x.view(3, steps, images, 1, 28, 28)
    return [(steps - 1 - i, x[0, i], x[1, i], x[2, i]) for i in range(steps)]


def strip_of(steps: int) -> tuple[Image.Image, list]:
    frames = [(t, to_uint8(xt[0]), to_uint8(x0_hat[0]))
              for t, xt, x0_hat, _ in denoising(steps)]
    return pictures.trajectory_strip(frames), frames


@pytest.mark.parametrize("steps, columns", [(50, 10), (10, 10), (3, 3), (1, 1)])
def test_a_strip_shows_xt_above_x0_hat_from_the_first_step_to_the_last(steps, columns):
    strip, frames = strip_of(steps)
    scale = 4 if 2 * columns <= 16 else 2
    pitch, top = 28 * scale + 2, strip.height - (2 * (28 * scale + 2) + 2)
    left = strip.width - (columns * pitch + 2)
    assert top > 10 and left > 30
    for column in range(columns):
        t, xt, x0_hat = frames[round(column * (steps - 1) / max(1, columns - 1))]
        for row, image in enumerate((xt, x0_hat)):
            assert np.array_equal(cell(strip, row, column, 28, scale, top, left), as_shown(image))


def test_the_t_of_a_column_stands_above_it_and_the_names_of_the_rows_at_the_left():
    strip, frames = strip_of(10)
    (t, *rest), left, top = frames[4], strip.width - (10 * 58 + 2), strip.height - (2 * 58 + 2)
    other = pictures.trajectory_strip([*frames[:4], (t + 300, *rest), *frames[5:]])
    changed = np.argwhere((np.asarray(strip) != np.asarray(other)).any(-1))
    assert len(changed)
    bottom, first, last = changed[:, 0].max(), changed[:, 1].min(), changed[:, 1].max()
    assert bottom < top and left + 4 * 58 < first <= last < left + 5 * 58
    assert abs((first + last) / 2 - (left + 4.5 * 58)) < 6
    for row in (0, 1):
        name = np.asarray(strip)[top + row * 58 : top + (row + 1) * 58, :left]
        assert name.max() > 200, "a row without its name"
    longest = pictures.trajectory_strip([(999, *rest)] * 10)        # numbers fit their columns
    gaps = np.asarray(longest)[:top, [left + c * 58 for c in range(11)]]
    assert gaps.max() == gaps.min()


def test_the_recorder_collects_every_image_of_all_batches():
    recorder, batches = pictures.FrameRecorder(steps=100), [denoising(100, 2), denoising(100, 1)]
    for batch in batches:
        for step in batch:
            recorder(*step)
    frames = recorder.frames()
    assert len(frames) == 24 and all(f.shape == (3, 1, 28, 28) for f in frames)
    for frame, step in [(frames[0], 0), (frames[-1], 99)]:
        results = torch.cat([batch[step][3] for batch in batches])
        assert torch.equal(frame, to_uint8(results))
    assert [t for t, _, _ in recorder.trajectory] == list(range(99, -1, -1))
    for (_, xt, x0_hat), step in zip(recorder.trajectory, batches[0], strict=True):
        assert torch.equal(xt, to_uint8(step[1][0])) and torch.equal(x0_hat, to_uint8(step[2][0]))
    short = pictures.FrameRecorder(steps=6)
    for step in denoising(6):
        short(*step)
    assert len(short.frames()) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_shows_every_frame_and_holds_the_last(channels):
    noise, smooth = some_images(6, channels), torch.linspace(0, 255, 28 * 28).view(28, 28)
    last = torch.stack([smooth, smooth.T, 255 - smooth])[:channels].to(torch.uint8)
    sheets = [pictures.grid(torch.stack([image, last]), 2) for image in [*noise, last]]
    gif = pictures.animation(sheets)
    film = Image.open(io.BytesIO(gif))
    assert film.n_frames == 7 and film.size == sheets[0].size and film.info["loop"] == 0
    times = []
    for number, sheet in enumerate(sheets):
        film.seek(number)
        times.append(film.info["duration"])
        error = np.asarray(film.convert("RGB")).astype(int) - np.asarray(sheet)
        assert np.abs(error).mean() < (8 if number == 6 else 15)    # noise has more colours
    assert times == [120] * 6 + [2000]
    saturated = film.convert("HSV").getchannel("S").getextrema()[1]
    assert (saturated > 100) == (channels == 3)
    assert len(gif) < 40_000 * channels


# ---------------------------------------------------------------- files, and an old Pillow


def test_a_picture_file_is_complete_or_absent(tmp_path, monkeypatch):
    first, second, broken = (pictures.grid(some_images(n), 2) for n in (1, 2, 3))
    pictures.save_picture(tmp_path / "a.png", first)
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(broken, "save", lambda file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        pictures.save_picture(tmp_path / "a.png", broken)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    pictures.save_picture(tmp_path / "a.png", second)
    assert np.array_equal(Image.open(tmp_path / "a.png"), second)
    with pytest.raises(OSError):
        pictures.save_picture(tmp_path / "a.png" / "b.png", first)


def test_text_without_freetype(monkeypatch):
    with_freetype = np.asarray(strip_of(10)[0])
    monkeypatch.setattr(ImageFont, "core", DeferredError(ImportError("no _imagingft")))
    with pytest.raises(ImportError):
        ImageFont.load_default(size=13)
    strip = np.asarray(strip_of(10)[0])
    assert strip.shape == with_freetype.shape and not np.array_equal(strip, with_freetype)
    assert strip[:20].max() > 200
