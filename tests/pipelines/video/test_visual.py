"""Features are found, recognised, read alike from three kinds of files, and pooled as torch pools."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dora_core.data.shards import write_shards
from pipelines.video.feature_files import FORMAT, NameTable, key_of, name_of, pool_grid
from pipelines.video.visual import (
    VisualError,
    find_collection,
    find_media,
    media_file,
    media_names,
    open_features,
    slots,
)

NAMES = ["COCO_train2014_000000000009", "COCO_val2014_000000000042", "clip.with.dots", "é 100%"]


def halves(*shape, seed=0):
    """Numbers of both signs, among them many equal ones and zeros of both signs."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape).astype(np.float16)
    values[generator.random(shape) < 0.2] = 0.0
    values[generator.random(shape) < 0.2] = -0.0
    values[generator.random(shape) < 0.1] = 1.5
    return values


def write_npz(folder, name, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    return folder


def write_h5(folder, name, values, key=None):
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file.create_dataset(f"{key or name}/features", data=values)
    return folder


def npy(values):
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def write_feature_shards(folder, values, max_count=3, **facts):
    samples = [{"__key__": key_of(name), "npy": npy(array)} for name, array in values.items()]
    files = write_shards(samples, folder, max_count=max_count)
    manifest = {
        "format": FORMAT,
        "encoder": {"model": "some"},
        "dim": next(iter(values.values())).shape[1],
        "num_samples": len(values),
        "shards": [{"name": file.name} for file in files],
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def same_bits(first, second):
    return first.dtype == second.dtype and np.array_equal(first.view(np.uint8), second.view(np.uint8))


@pytest.fixture
def three(tmp_path):
    """The same grids in three kinds of folders, and what is in them."""
    values = {name: halves(36, 16, seed=place) for place, name in enumerate(NAMES)}
    for name, array in values.items():
        write_npz(tmp_path / "npz", name, features=array)
        write_h5(tmp_path / "h5", name, array)
    write_feature_shards(tmp_path / "shards", values)
    return [tmp_path / kind for kind in ("npz", "h5", "shards")], values


def test_three_kinds_of_folders_are_recognised_and_read_alike(three):
    folders, values = three
    for folder in folders:
        features = open_features(str(folder))
        assert (len(features), features.dim, features.folder) == (4, 16, folder)
        for name, array in values.items():
            assert name in features and same_bits(features.read(name), array)
        assert "COCO_train2014_000000000008" not in features and "" not in features
        assert NAMES[0] + "9" not in features and NAMES[0][:-1] not in features and "z" * 1000 not in features
        assert features.encoder == ({"model": "some"} if folder.name == "shards" else None)


def test_features_can_be_pickled_and_read_by_forked_workers(three):
    folders, values = three
    for folder in folders:
        features = open_features(folder)
        assert same_bits(pickle.loads(pickle.dumps(features)).read(NAMES[1]), values[NAMES[1]])
        loader = DataLoader(NAMES * 3, batch_size=None, num_workers=2, collate_fn=features.read)
        for name, array in zip(NAMES * 3, loader, strict=True):
            assert same_bits(np.asarray(array), values[name])


def test_identity_changes_with_names_sizes_and_the_content_of_a_manifest(three):
    folders, values = three
    before = [open_features(folder).sha256 for folder in folders]
    assert [open_features(folder).sha256 for folder in folders] == before and len(set(before)) == 3
    (folders[0] / f"{NAMES[3]}.npz").unlink()
    write_h5(folders[1], NAMES[0], np.zeros((36, 17), np.float16))
    write_feature_shards(folders[2], values, encoder={"model": "other"})
    assert all(open_features(folder).sha256 != old for folder, old in zip(folders, before, strict=True))


def test_float32_becomes_float16_and_frames_may_be_any_number(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    write_npz(tmp_path, "a", features=values)
    write_npz(tmp_path, "b", features=values[:1].astype(np.float64), other=np.zeros(3))
    features = open_features(tmp_path)
    assert same_bits(features.read("a"), values.astype(np.float16)) and features.read("b").shape == (1, 5)


# ------------------------------------------------------------------------------------------------ pooling


def test_grids_are_pooled_bit_for_bit_as_torch_pools(tmp_path):
    for seed in range(5):
        grid = halves(49, 64, seed=seed)
        maps = torch.from_numpy(grid).T.reshape(1, 64, 7, 7)
        expected = nn.AdaptiveMaxPool2d(6)(maps).flatten(2)[0].T.contiguous().numpy()
        assert same_bits(pool_grid(grid), expected)
        assert same_bits(pool_grid(grid.astype(np.float32)), expected.astype(np.float32))
    write_h5(tmp_path, "x", grid)
    write_h5(tmp_path, "y", grid.astype(np.float32))
    assert same_bits(open_features(tmp_path).read("x"), expected) and same_bits(
        open_features(tmp_path).read("y"), expected
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("length", "num"), [(1, 1), (64, 64), (65, 64), (100, 64), (127, 64), (128, 64), (1000, 64), (9, 4)]
)
def test_long_videos_are_pooled_bit_for_bit_as_torch_pools(length, num, dtype):
    values = halves(length, 12, seed=length).astype(dtype)
    pooled, num_real = slots(values, num)
    expected = nn.AdaptiveMaxPool1d(num)(torch.from_numpy(values).T[None])[0].T.contiguous().numpy()
    assert num_real == num and same_bits(pooled, expected)


def test_short_videos_are_padded_with_zeros_at_the_end():
    values = halves(5, 3)
    padded, num_real = slots(values, 8)
    assert num_real == 5 and same_bits(padded[:5], values) and padded.shape == (8, 3) and not padded[5:].any()
    assert padded.dtype == np.float16


def test_nan_is_not_pooled_away(tmp_path):
    grid = halves(49, 4)
    grid[48, 0] = np.nan
    write_h5(tmp_path, "x", halves(49, 4))
    write_h5(tmp_path, "y", grid)
    with pytest.raises(VisualError, match=r"'y' .* holds NaN"):
        open_features(tmp_path).read("y")


# ------------------------------------------------------------------------------------------------ what is wrong


def test_a_missing_name_is_an_error_with_those_that_are_like_it(three):
    folders, _ = three
    for folder in folders:
        with pytest.raises(VisualError) as caught:
            open_features(folder).read("COCO_val2014_000000000043")
        message = str(caught.value)
        assert f"{folder} has no features of 'COCO_val2014_000000000043'; it has those of 4 names" in message
        assert "such as COCO_val2014_000000000042" in message and message.endswith("remove the rows that need them.")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"other": np.zeros((2, 4))}, "it has the arrays other and not 'features'"),
        ({"features": np.zeros((2, 5))}, "its vectors have 5 numbers and others 4"),
        ({"features": np.zeros(4)}, r"it is float64 of the shape \[4\]"),
        ({"features": np.zeros((0, 4))}, r"it is float64 of the shape \[0, 4\]"),
        ({"features": np.zeros((2, 4), int)}, "it is int64 of the shape"),
        ({"features": np.array([[0, 1, 2, np.nan]])}, "holds NaN"),
        ({"features": np.array([[0, 1, 2, np.inf]])}, "infinity"),
        ({"features": np.array([[0, 1, 2, 70000.0]])}, "too large for float16"),
        ({"features": np.array([[{}, 1, 2, 3]], object)}, "cannot be read"),
    ],
)
def test_a_file_of_another_form_costs_itself_alone(tmp_path, arrays, reason):
    write_npz(tmp_path, "b_good", features=np.ones((3, 4), np.float16))
    write_npz(tmp_path, "c_bad", **arrays)
    features = open_features(tmp_path)
    assert features.read("b_good").shape == (3, 4)
    with pytest.raises(VisualError, match=r"c_bad.* cannot be used: .*" + reason):
        features.read("c_bad")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_a_damaged_file_is_named_and_others_are_read(three, kind, share):
    folders, values = three
    folder = next(each for each in folders if each.name == kind)
    path = folder / f"{NAMES[0]}.{kind}"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    features = open_features(folder)
    assert features.dim == 16 and same_bits(features.read(NAMES[1]), values[NAMES[1]])
    with pytest.raises(VisualError, match=f"{NAMES[0]}.*cannot be"):
        features.read(NAMES[0])


def test_a_folder_of_nothing_but_damaged_files_is_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.npz").write_bytes(b"nothing")
    with pytest.raises(VisualError, match=r"a\.npz cannot be used: it cannot be read"):
        open_features(tmp_path)


def test_wrong_keys_and_grids_of_h5_are_told(tmp_path):
    write_h5(tmp_path, "good", halves(36, 4))
    write_h5(tmp_path, "key", halves(36, 4), key="other")
    write_h5(tmp_path, "shape", halves(50, 4))
    write_h5(tmp_path, "type", np.zeros((49, 4), np.int64))
    features = open_features(tmp_path)
    with pytest.raises(VisualError, match=r"key\.h5 cannot be used: it has other and not 'key/features'"):
        features.read("key")
    with pytest.raises(VisualError, match=r"float16 of the shape \[50, 4\] and not floating-point \[49, dim\] or"):
        features.read("shape")
    with pytest.raises(VisualError, match=r"int64 of the shape \[49, 4\] and not floating-point"):
        features.read("type")


def test_a_sample_that_is_no_array_is_told(tmp_path):
    write_shards([{"__key__": "a", "npy": b"nothing"}, {"__key__": "b", "jpg": b""}], tmp_path)
    manifest = {"format": FORMAT, "dim": 4, "num_samples": 2, "shards": [{"name": "shard-000000.tar"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    features = open_features(tmp_path)
    with pytest.raises(VisualError, match="the sample 'a' cannot be used: it cannot be read"):
        features.read("a")
    with pytest.raises(VisualError, match=r"the sample 'b' cannot be used: .*no member 'npy'"):
        features.read("b")


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    values = {name: halves(2, 4) for name in NAMES}
    folder = write_feature_shards(tmp_path / "f", values)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, reason in (
        ({"num_samples": 5}, "shards hold 4 samples and its manifest says 5"),
        ({"shards": []}, "lists no shard"),
        ({"shards": [{"name": "shard-000009.tar"}]}, "shard-000009.tar"),
        ({"shards": None}, "it is no manifest of extracted features"),
        ({"format": 99}, f"format 99, and this version reads {FORMAT}"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(VisualError, match=reason):
            open_features(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(VisualError, match="it is no manifest"):
        open_features(folder)
    (folder / "manifest.json").unlink()
    (folder / "plan.json").write_text("{}")
    with pytest.raises(VisualError, match=r"no manifest\.json: its shards are not complete"):
        open_features(folder)


def test_a_folder_that_holds_nothing_or_two_kinds_is_refused(tmp_path):
    with pytest.raises(VisualError, match=r"missing holds no features; a folder of features holds either shards"):
        open_features(tmp_path / "missing")
    write_npz(tmp_path, "a", features=np.zeros((1, 4)))
    write_h5(tmp_path, "a", halves(36, 4))
    with pytest.raises(VisualError, match=r"holds h5 and npz; .* Name another folder"):
        open_features(tmp_path)


# ------------------------------------------------------------------------------------------------ places and names


def test_collections_are_found_where_they_may_be_in_this_order(tmp_path):
    with pytest.raises(VisualError) as caught:
        find_collection(tmp_path, "tv")
    places = ["tv", "tv/clip_features/data_clip_RN101_att", "video/vis_features/tv/clip-vit"]
    assert f"no features of tv in {tmp_path}; looked in {', '.join(places)}." in str(caught.value)
    (tmp_path / "tv" / "clip_features").mkdir(parents=True)  # annotations are here, features below
    (tmp_path / "tv" / "dataset.json").write_text("{}")
    for place in reversed(places):
        write_npz(tmp_path / place, "a", features=np.zeros((1, 4)))
        assert find_collection(str(tmp_path), "tv") == tmp_path / place


def test_media_are_found_where_they_may_be_in_this_order(tmp_path):
    with pytest.raises(VisualError, match=r"no pictures or videos of tv in .*; looked in video/videos/tv, images/tv"):
        find_media(tmp_path, "tv")
    for place in ("tv", "tv/images", "images/tv", "video/videos/tv"):
        (tmp_path / place).mkdir(parents=True)
        assert find_media(tmp_path, "tv") == tmp_path / place


def test_a_media_file_is_the_one_of_its_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for file in ("a.mp4", "b.JPG", "c.jpg", "c.png", "a.b.webm", "sub/d.jpeg", "e.txt", ".hidden.jpg"):
        (tmp_path / file).write_bytes(b"")
    assert media_file(tmp_path, "a") == tmp_path / "a.mp4"
    assert media_file(str(tmp_path), "b") == tmp_path / "b.JPG"
    assert media_file(tmp_path, "a.b") == tmp_path / "a.b.webm"
    assert media_file(tmp_path, "sub/d") == tmp_path / "sub" / "d.jpeg"
    with pytest.raises(VisualError, match=r"has c\.jpg and c\.png for 'c'; it must have one"):
        media_file(tmp_path, "c")
    with pytest.raises(VisualError, match=r"has no file for 'e'; it must have one, 'e' with one of \.mp4, \.mkv"):
        media_file(tmp_path, "e")
    assert media_names(tmp_path) == ["a", "a.b", "b", "c", "sub/d"]


@pytest.mark.parametrize(
    "name", ["plain", "a.b.c", "sub.x/clip.1", "__init__/x", "__x", "_x", "100%", "%2E", "a b", "é", ".hidden", "a\nb"]
)
def test_a_name_survives_as_a_key_of_shards(tmp_path, name):
    values = halves(2, 4)
    features = open_features(write_feature_shards(tmp_path, {name: values}))
    assert same_bits(features.read(name), values) and name_of(key_of(name)) == name
    assert (key_of(name) == name) == (not any(mark in name for mark in ".%") and not name.startswith("__"))


def test_many_names_are_found_and_no_other():
    names = [f"{number * 7919 % 100_003:06d}" for number in range(5000)]
    table = NameTable(names)
    assert len(table) == 5000 and all(table.find(name) == place for place, name in enumerate(names))
    assert table.find("999999") is None and table.find("00000") is None and table.find("0000000") is None
    assert table.close_to(names[17] + "0")[0] == names[17]


def test_importing_it_needs_no_torch():
    code = "import sys, pipelines.video.visual, pipelines.video.feature_folder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
