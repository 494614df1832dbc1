"""The image transforms against transformers' own processors, pixel for pixel."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_moslora.config import DataSettings
from llava_moslora.data import image_transform
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.errors import Refusal
from llava_moslora.models.preprocessing import SIGLIP_PROCESSOR, processor_settings, read_preprocessing

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SIDES = {"height": 33, "width": 33}
SIGLIP = {"size": SIDES, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIGLIP_SETTINGS = processor_settings(SIDES, None, [0.5] * 3, [0.5] * 3, 3, SIGLIP_PROCESSOR)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The settings of the processor that transformers saves for a CLIP tower."""
    folder = tmp_path_factory.mktemp("tower")
    CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=SIDES).save_pretrained(folder)
    return read_preprocessing(folder, 33)


SIZES = [(64, 48), (48, 64), (33, 33), (34, 33), (1, 1), (7, 200), (200, 7), (640, 427), (20, 1), (199, 1), (1, 199)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "reference"), [("crop", CLIPImageProcessorPil), ("pad", LlavaImageProcessorPil)])
@pytest.mark.parametrize("strip", [image_transform.STRIP, 300])
def test_pixels_equal_transformers(tower, monkeypatch, size, mode, reference, strip):
    monkeypatch.setattr(image_transform, "STRIP", strip)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = ImageTransform.from_processor(tower, mode)(image)
    theirs = reference(size={"shortest_edge": 33}, crop_size={"height": 33, "width": 33}, do_pad=mode == "pad")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torch.from_numpy(theirs(image, return_tensors="np")["pixel_values"][0]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_fast_pixels_equal_torchvision(tower, size, mode):
    pytest.importorskip("torchvision")
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    exact = ImageTransform.from_processor(tower, mode)
    ours = replace(exact, engine="torch")(image)
    theirs = LlavaImageProcessor(
        size={"shortest_edge": 33}, crop_size={"height": 33, "width": 33}, do_pad=mode == "pad"
    )
    assert torch.equal(ours, theirs(image, return_tensors="pt")["pixel_values"][0])
    steps = (ours - exact(image)) * torch.tensor(exact.std)[:, None, None] * 255
    assert steps.abs().max() < 1.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [2, 3])  # SigLIP 2's, SigLIP's
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_siglips_pixels_equal_transformers(size, resample, mode):
    """Scaled straight to a square, with nothing to crop; padded first if asked, with the mean as for CLIP."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = ImageTransform.from_processor(SIGLIP_SETTINGS | {"resample": resample}, mode)(image)
    padded = LlavaImageProcessorPil(**SIGLIP, resample=resample, do_pad=True, do_center_crop=False)
    theirs = padded if mode == "pad" else SiglipImageProcessorPil(**SIGLIP, resample=resample)
    assert torch.equal(ours, torch.from_numpy(theirs(image, return_tensors="np")["pixel_values"][0]))


@pytest.mark.parametrize("size", SIZES)
def test_siglips_fast_pixels_equal_torchvision(size):
    pytest.importorskip("torchvision")
    from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = ImageTransform.from_processor(SIGLIP_SETTINGS, "crop", "torch")(image)
    assert torch.equal(ours, SiglipImageProcessor(**SIGLIP)(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_other_settings_equal_transformers(tmp_path, resample):
    settings = {"size": {"height": 20, "width": 24}, "crop_size": {"height": 31, "width": 22}, "resample": resample,
                "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
    theirs = CLIPImageProcessorPil(**settings)
    theirs.save_pretrained(tmp_path)
    transform = ImageTransform.from_processor(json.loads((tmp_path / "preprocessor_config.json").read_text()), "crop")
    assert transform.size == (31, 22)
    image = Image.fromarray(NOISE)
    assert torch.equal(transform(image), torch.from_numpy(theirs(image, return_tensors="np")["pixel_values"][0]))


def test_blank_is_the_padding(tower):
    transform = ImageTransform.from_processor(tower, "pad")
    blank = transform.blank()
    assert blank.shape == (3, 33, 33)
    assert blank.abs().max() < 0.02  # the mean colour, cut to whole numbers
    wide = transform(Image.fromarray(np.zeros((10, 100, 3), dtype=np.uint8)))
    assert torch.equal(wide[:, 0], blank[:, 0])


def test_as_the_data_settings_have_it(tower):
    found = ImageTransform.from_settings(tower, DataSettings(["x"], image_aspect_ratio="crop", image_engine="torch"))
    assert found == ImageTransform.from_processor(tower, "crop", "torch")
    assert (found.aspect_ratio, found.engine) == ("crop", "torch")


def test_refused(tower):
    with pytest.raises(Refusal, match=r"\[C-MODE\] --image_aspect_ratio: unknown aspect ratio; found square"):
        ImageTransform.from_processor(tower, "square")
    with pytest.raises(Refusal, match=r"\[C-MODE\] --image_engine: the torch engine .*; found resample 1;"):
        ImageTransform.from_processor(tower | {"resample": 1}, "pad", "torch")
