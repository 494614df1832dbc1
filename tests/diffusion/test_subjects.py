"""Pictures: which are taken, how they are cropped, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_moslora.diffusion.subjects import find_pictures, load_square
from llava_moslora.errors import Refusal
from llava_moslora.sdxl_settings import SubjectSettings
from support.sdxl import write_pictures


def settings(folder, **changes):
    return SubjectSettings(str(folder), "a photo of ikat cat", **{"resolution": 64} | changes)


def squares(folder, seed=0, **changes):
    pictures, _ = find_pictures(str(folder), "--image_folder")
    return {p.name: load_square(p, settings(folder, **changes), seed) for p in pictures}


def test_a_crop_is_a_function_of_seed_and_content(tmp_path):
    write_pictures(tmp_path / "a")
    first = squares(tmp_path / "a")
    (tmp_path / "a" / "00.png").unlink()  # other neighbours, another name
    (tmp_path / "a" / "01.png").rename(tmp_path / "a" / "zz.png")
    again = squares(tmp_path / "a")
    assert torch.equal(again["zz.png"].pixels, first["01.png"].pixels)
    assert torch.equal(again["zz.png"].time_ids, first["01.png"].time_ids)
    other = squares(tmp_path / "a", seed=1)
    assert any(not torch.equal(other[name].time_ids, again[name].time_ids) for name in again)


def test_size_and_crop_are_what_the_unet_is_told(tmp_path):
    """A column's brightness is its number, so a crop shows where it begins."""
    folder = tmp_path / "p"
    folder.mkdir()
    pixels = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (64, 200, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "wide.png")
    for center in (False, True):
        square = squares(folder, center_crop=center)["wide.png"]
        height, width, top, left, *target = square.time_ids.tolist()
        assert (height, width, top, target) == (64, 200, 0, [64, 64]) and square.pixels.shape == (3, 64, 64)
        assert square.pixels.dtype == torch.float32
        assert square.pixels[0, 0, 0].item() == pytest.approx(left / 127.5 - 1)
        assert not center or left == 68


def test_resizing_is_pillows(tmp_path):
    folder = write_pictures(tmp_path / "p", count=1, size=128)  # 128 high, 144 wide
    for name, kind in (("bilinear", Image.Resampling.BILINEAR), ("lanczos", Image.Resampling.LANCZOS)):
        square = squares(folder, resampling=name, center_crop=True)["00.png"]
        image = Image.open(folder / "00.png").resize((72, 64), kind).crop((4, 0, 68, 64))
        expected = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(square.pixels, expected)


def test_what_is_no_picture_is_named(tmp_path):
    folder = write_pictures(tmp_path / "p", count=2)
    (folder / "notes.txt").write_text("x"), (folder / ".hidden").write_text("x")
    pictures, others = find_pictures(str(folder), "--image_folder")
    assert [p.name for p in pictures] == ["00.png", "01.png"] and others == ["notes.txt"]


def damaged(folder):
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:200])


def link(folder):
    (folder / "out.png").symlink_to("/etc/hostname")


@pytest.mark.parametrize(("spoil", "message"), [(damaged, r"I-(DECODE|FORMAT).*00\.png"), (link, "I-PATH")])
def test_hostile_pictures_are_refused(tmp_path, spoil, message):
    folder = write_pictures(tmp_path / "p", count=2)
    spoil(folder)
    with pytest.raises(Refusal, match=message):
        squares(folder)


def test_no_pictures(tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH.*--image_folder: no such folder"):
        find_pictures(str(tmp_path / "none"), "--image_folder")
    with pytest.raises(Refusal, match=r"D-EMPTY.*no pictures in the folder; found nothing"):
        find_pictures(str(tmp_path), "--image_folder")
