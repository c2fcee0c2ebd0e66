"""Encoders give what their models give, whatever frames are computed together, and say what they are."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dora_core.media.images import CLIP_MEAN, CLIP_STD, ImageTransform
from pipelines.video.features import load_encoder

TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
CONFIGS = {
    "tiny-vit": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "tiny-resnet": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in CONFIGS.items():
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield folder
    for name in CONFIGS:
        del open_clip.factory._MODEL_CONFIGS[name]
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)


@pytest.fixture(scope="module")
def weights(models):
    """Files of weights, and the models that they are of."""
    made = {}
    for name in CONFIGS:
        torch.manual_seed(7)
        model = open_clip.create_model(name).eval()
        for place, parameter in model.named_parameters():
            if not place.endswith("bias"):  # which would make all places alike
                parameter.data += 0.2 * torch.randn_like(parameter)
        torch.save(model.state_dict(), models / f"{name}.pt")
        made[name] = (f"open_clip:{name}:{models / name}.pt", model)
    return made


def pictures(num, size):
    """Tiles of random colours: every place of a feature map sees something else."""
    tile = max(1, size // 8)
    side = -(-size // tile)
    tiles = torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return tiles.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :size, :size]


def normalized(pixels):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return (pixels / 255 - mean) / std


@torch.no_grad()
def test_a_vit_gives_what_encode_image_gives(weights):
    name, model = weights["tiny-vit"]
    encoder = load_encoder(name)
    pixels = pictures(3, 32)
    features = encoder(pixels)
    assert (encoder.kind, encoder.tokens, encoder.dim, encoder.size) == ("frame", 1, 24, 32)
    assert features.dtype == torch.float16 and features.shape == (3, 1, 24) and not features.requires_grad
    expected = torch.cat([model.encode_image(normalized(each)[None]) for each in pixels])
    assert torch.allclose(features[:, 0].float(), expected, rtol=1e-3, atol=1e-6)
    assert features.float().norm(dim=-1).std() > 1e-3  # as encode_image gives it, not normalized
    assert encoder(pixels[:0]).shape == (0, 1, 24)


@torch.no_grad()
def test_a_resnet_gives_its_last_feature_map_pooled_or_its_embedding(weights):
    name, model = weights["tiny-resnet"]
    encoder = load_encoder(name)
    pixels = pictures(2, 224)
    features = encoder(pixels)
    assert (encoder.kind, encoder.tokens, encoder.dim) == ("grid", 36, 256)
    visual, maps = model.visual, normalized(pixels)
    for layer in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        maps = layer(maps)
    assert maps.shape == (2, 256, 7, 7)
    expected = F.adaptive_max_pool2d(maps, 6).flatten(2).transpose(1, 2)
    assert features.shape == (2, 36, 256)
    assert torch.allclose(features.float(), expected, rtol=1e-3, atol=1e-4)
    assert features.float().std(dim=1).mean() > 0.1 * features.float().mean()  # places differ
    embeddings = load_encoder(name, "frame")(pixels)
    assert torch.allclose(embeddings[:, 0].float(), model.encode_image(normalized(pixels)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", list(CONFIGS))
def test_a_frame_has_the_same_bits_whatever_frames_are_with_it(weights, model):
    encoder = load_encoder(weights[model][0])
    pixels = pictures(7, encoder.size)
    together = encoder(pixels)
    for start, stop in ((0, 1), (1, 4), (4, 7), (6, 7)):
        assert torch.equal(together[start:stop], encoder(pixels[start:stop]))
    assert torch.equal(encoder(pixels.flip(0)), together.flip(0))


@pytest.mark.parametrize("model", list(CONFIGS))
def test_computed_several_at_a_time_frames_differ_by_no_more_than_rounding(weights, model):
    name = weights[model][0]
    pixels = pictures(7, load_encoder(name).size)
    alone, chunks = load_encoder(name)(pixels).float(), load_encoder(name, batch=4)(pixels).float()
    assert torch.allclose(alone, chunks, rtol=2**-9, atol=2**-12)


def test_the_last_chunk_is_filled_up_so_that_every_call_has_one_shape(weights):
    encoder = load_encoder(weights["tiny-vit"][0], batch=4)
    shapes = []
    encoder._tower.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    assert encoder(pictures(6, 32)).shape == (6, 1, 24)
    assert shapes == [(4, 3, 32, 32)] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", list(CONFIGS))
def test_lower_precisions_are_near_and_told_apart(weights, model, precision):
    full, low = load_encoder(weights[model][0]), load_encoder(weights[model][0], None, precision)
    pixels = pictures(2, full.size)
    exact = full(pixels).float()
    error = (low(pixels).float() - exact).norm() / exact.norm()
    assert 0 < error < (0.05 if precision == "bf16" else 0.01)
    assert low.identity == {**full.identity, "precision": precision}


def test_what_the_caller_has_set_changes_nothing_and_is_left_as_it_was(weights):
    encoder = load_encoder(weights["tiny-vit"][0])
    pixels = pictures(2, 32)
    expected = encoder(pixels)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            assert torch.equal(encoder(pixels), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_random_weights_are_always_the_same_and_come_with_a_warning(caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first = load_encoder("open_clip:tiny-vit")
    assert [record.message for record in caplog.records] == [
        "open_clip:tiny-vit has no weights named: they are random, and features mean nothing"
    ]
    assert torch.equal(torch.get_rng_state(), state) and logging.root.manager.disable == logging.NOTSET
    torch.manual_seed(3)
    second = load_encoder("open_clip:tiny-vit")
    assert torch.equal(first(pictures(2, 32)), second(pictures(2, 32)))
    assert first.identity == second.identity and first.identity["pretrained"] is None


def test_identity_is_of_what_changes_features_and_is_plain_json(weights, models, tmp_path):
    name = weights["tiny-vit"][0]
    encoder = load_encoder(name)
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    assert encoder.identity["model"] == "tiny-vit" and encoder.identity["pretrained"] == "tiny-vit.pt"
    assert encoder.identity["preprocessing"] == {
        "size": 32,
        "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD),
        "aspect": "square",
        "resample": "bicubic",
    }
    state = torch.load(models / "tiny-vit.pt")
    torch.save(state, tmp_path / "tiny-vit.pt")
    assert load_encoder(f"open_clip:tiny-vit:{tmp_path / 'tiny-vit.pt'}").identity == encoder.identity
    state["visual.class_embedding"][0] += 1e-3
    torch.save(state, tmp_path / "tiny-vit.pt")
    other = load_encoder(f"open_clip:tiny-vit:{tmp_path / 'tiny-vit.pt'}")
    assert other.identity["weights_sha256"] != encoder.identity["weights_sha256"]
    assert other.preprocessing_hash == encoder.preprocessing_hash
    grid = load_encoder(weights["tiny-resnet"][0])
    assert grid.identity["preprocessing"]["aspect"] == "stretch"
    assert grid.preprocessing_hash != load_encoder(weights["tiny-resnet"][0], "frame").preprocessing_hash


def test_weights_of_openai_come_with_their_activation(weights, monkeypatch):
    """open_clip gives ``ViT-B-32`` with the tag ``openai`` the wrong one, and warns."""
    made = {}
    create = open_clip.create_model

    def record(name, **options):
        made.update(name=name, **options)
        return create("tiny-vit", force_quick_gelu=options["force_quick_gelu"])

    monkeypatch.setattr(open_clip, "create_model", record)
    load_encoder("open_clip:ViT-B-32:openai")
    assert (made["name"], made["pretrained"], made["force_quick_gelu"]) == ("ViT-B-32", "openai", True)
    load_encoder("open_clip:ViT-B-32:laion2b_s34b_b79k")
    assert not made["force_quick_gelu"]


def test_a_local_folder_of_a_model_is_loaded_with_its_own_preprocessing(weights, models, tmp_path):
    config = json.loads((models / "tiny-vit.json").read_text())
    own = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": own}))
    with pytest.raises(ValueError, match="cannot be loaded: Required pretrained weights"):
        load_encoder(f"open_clip:local-dir:{tmp_path}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes((models / "tiny-vit.pt").read_bytes())
    encoder = load_encoder(f"open_clip:local-dir:{tmp_path}")
    half, quarter = (0.5,) * 3, (0.25,) * 3
    assert encoder.preprocessing == ImageTransform(32, half, quarter, aspect="stretch", resample="bilinear")
    assert encoder.identity["model"] == f"local-dir:{tmp_path.name}" and encoder.identity["pretrained"] is None
    assert encoder.identity["weights_sha256"] == load_encoder(weights["tiny-vit"][0]).identity["weights_sha256"]


def test_pixels_are_the_mean_colours_of_the_whole_picture():
    encoder = load_encoder("pixels:12")
    array = np.random.default_rng(0).integers(0, 256, (36, 60, 3), dtype=np.uint8)
    pixels = encoder.prepare(array)
    assert torch.equal(pixels, encoder.prepare(Image.fromarray(array))) and pixels.shape == (3, 12, 12)
    features = encoder(pixels[None])
    means = array.reshape(12, 3, 12, 5, 3).mean(axis=(1, 3)) / 255
    assert (encoder.kind, encoder.tokens, encoder.dim) == ("frame", 1, 432)
    assert np.abs(features[0, 0].numpy() - means.reshape(-1)).max() < 0.01
    assert 0 <= features.min() < 0.4 and 0.5 < features.max() <= 1
    black_and_white = torch.stack([torch.zeros_like(pixels), torch.full_like(pixels, 255)])
    assert encoder(black_and_white)[:, 0, 0].tolist() == [0, 1]


def test_a_grid_of_pixels_is_its_patches_row_by_row():
    frame, grid = load_encoder("pixels:12"), load_encoder("pixels:12", "grid")
    pixels = pictures(2, 12)
    whole = frame(pixels).reshape(2, 12, 12, 3)
    patches = grid(pixels)
    assert patches.shape == (2, 36, 12) and (grid.tokens, grid.dim) == (36, 12)
    for place in range(36):
        row, column = 2 * (place // 6), 2 * (place % 6)
        assert torch.equal(patches[:, place], whole[:, row : row + 2, column : column + 2].reshape(2, 12))


def test_preprocessing_can_be_sent_to_other_processes():
    encoder = load_encoder("pixels:6")
    copy = pickle.loads(pickle.dumps(encoder.preprocessing))
    array = pictures(1, 20)[0].permute(1, 2, 0).numpy()
    assert copy == encoder.preprocessing and torch.equal(copy(Image.fromarray(array)), encoder.prepare(array))


def test_pixels_of_another_type_or_size_are_refused():
    encoder = load_encoder("pixels:6")
    for wrong in (pictures(1, 6).float(), pictures(1, 7), pictures(1, 6)[0]):
        with pytest.raises(ValueError, match=r"Pixels are .*; pixels:6 needs torch.uint8 \[N, 3, 6, 6\]"):
            encoder(wrong)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("clip", {}, "encoder is 'clip'; it must be open_clip:<model>"),
        ("pixels:0", {}, "side must be a positive integer"),
        ("pixels:wide", {}, "side must be a positive integer"),
        ("pixels:8", {"kind": "grid"}, "of a grid a multiple of 6"),
        ("open_clip:tiny-vot", {}, "Unknown open_clip model 'tiny-vot'. Did you mean tiny-vit"),
        ("open_clip:tiny-vit:/no/such/file.pt", {}, "cannot be loaded: .*Its weights must be a file, or a tag"),
        ("open_clip:tiny-vit", {"kind": "grid"}, "is a VisionTransformer, and grids are of ResNets"),
        ("pixels:6", {"kind": "patch"}, "kind is 'patch'; it must be frame or grid"),
        ("pixels:6", {"precision": "int8"}, "precision is 'int8'; it must be fp32 or bf16 or fp16"),
    ],
)
def test_an_encoder_that_there_is_not_is_an_error(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        load_encoder(name, **options)


def test_weights_of_another_model_are_refused(weights, models):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_encoder(f"open_clip:tiny-vit:{models / 'tiny-resnet.pt'}")
