"""What is cached is what would be computed anew, and a folder of shards is the same however it came about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dora_core.data.shards import ShardSet, shard_files
from pipelines.video import feature_folder
from pipelines.video.extract import extract, main
from pipelines.video.features import load_encoder
from pipelines.video.frames import frames_of
from pipelines.video.visual import VisualError, media_file, media_names, open_features, slots

ROOT = Path(__file__).parents[3]


def write_video(path, num_frames=24, seed=0, fps=8):
    colours = np.random.default_rng(seed).integers(0, 256, (num_frames, 2, 3, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        for tiles in colours:
            image = tiles.repeat(32, axis=0).repeat(32, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path, seed=0, width=50, height=30):
    tiles = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    Image.fromarray(tiles.repeat(5, axis=0).repeat(5, axis=1)).save(path)


def write_pictures(folder, num):
    folder.mkdir()
    for number in range(num):
        write_picture(folder / f"picture_{number:03d}.png", number)
    return folder


def contents(folder):
    """Everything in a folder by name, but indices, which hold times of files."""
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.endswith(".tar.index.json")
    }


def quiet(line):
    pass


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_video(folder / f"clip_{number}.mp4", 20 + 4 * number, number)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Encoders of frames and of grids, small, with weights of their own."""
    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    visions = {
        "small-vit": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "small-resnet": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    }
    for name, vision in visions.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    yield {"frame": load_encoder("open_clip:small-vit"), "grid": load_encoder("open_clip:small-resnet")}
    for name in visions:
        del open_clip.factory._MODEL_CONFIGS[name]
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)


# ------------------------------------------------------------------------------------------------ cached and online


def test_cached_features_of_videos_are_the_bits_that_the_step_computes(videos, towers, tmp_path):
    encoder = towers["frame"]
    extract(videos, tmp_path, encoder, seconds=0.5, shard_size=2, say=quiet)
    cached = open_features(tmp_path)
    names = media_names(videos)
    assert len(cached) == len(names) == 5 and cached.dim == encoder.dim and cached.encoder == encoder.identity
    pixels = [frames_of(media_file(videos, name), encoder.preprocessing, 0.5) for name in names]
    assert [len(each) for each in pixels] == [5, 6, 7, 8, 9]
    online = encoder(torch.cat(pixels)).flatten(0, 1).split([len(each) for each in pixels])  # as one batch of rows
    for name, own in zip(names, online, strict=True):
        assert cached.read(name).dtype == np.float16 and np.array_equal(cached.read(name), own.numpy())
        pooled = F.adaptive_max_pool1d(own.T[None].float(), 4)[0].T.half()
        assert np.array_equal(slots(cached.read(name), 4)[0], pooled.numpy())
    assert len({own.numpy().tobytes() for own in online}) == 5


def test_cached_grids_of_pictures_are_the_bits_that_the_step_computes(towers, tmp_path):
    media, encoder = write_pictures(tmp_path / "media", 3), towers["grid"]
    extract(media, tmp_path / "out", encoder, say=quiet)
    cached = open_features(tmp_path / "out")
    pixels = [frames_of(media_file(media, name), encoder.preprocessing) for name in media_names(media)]
    online = encoder(torch.cat(pixels))
    assert online.shape == (3, 36, 256)
    for name, own in zip(media_names(media), online, strict=True):
        assert np.array_equal(cached.read(name), own.numpy())


def test_videos_decoded_by_workers_give_the_same_shards(videos, tmp_path):
    for num_workers in (0, 2):
        encoder = load_encoder("pixels:6")
        extract(videos, tmp_path / str(num_workers), encoder, shard_size=3, num_workers=num_workers, say=quiet)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_frames_are_prepared_as_pictures_are_and_may_be_limited(videos):
    encoder = load_encoder("pixels:6")
    path = videos / "clip_4.mp4"
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = torch.stack([encoder.prepare(frames[index]) for index in range(0, 36, 4)])
    taken = frames_of(path, encoder.preprocessing, 0.5)
    assert taken.dtype == torch.uint8 and (taken.int() - expected.int()).abs().max() <= 2  # readers round differently
    few = frames_of(path, encoder.preprocessing, 0.5, max_frames=3)
    assert len(few) == 3 and all(any(torch.equal(one, other) for other in taken) for one in few)


def test_many_frames_are_those_that_are_decoded_one_at_a_time(tmp_path):
    write_video(tmp_path / "long.mp4", 80)
    transform = load_encoder("pixels:6").preprocessing
    taken = frames_of(tmp_path / "long.mp4", transform, 0.125)
    assert len(taken) == 80 and len(torch.unique(taken.flatten(1), dim=0)) == 80
    assert torch.equal(frames_of(tmp_path / "long.mp4", transform, 1.0), taken[::8])


# ------------------------------------------------------------------------------------------------ the same shards


def test_ranks_and_workers_make_the_shards_that_one_process_makes(tmp_path):
    media, encoder = write_pictures(tmp_path / "media", 11), load_encoder("pixels:6")
    manifest = extract(media, tmp_path / "one", encoder, shard_size=3, say=quiet)
    one = contents(tmp_path / "one")
    assert [name for name in one if name.endswith(".tar")] == [f"shard-{number:06d}.tar" for number in range(4)]
    assert extract(media, tmp_path / "two", encoder, shard_size=3, rank=1, world_size=2, say=quiet) is None
    assert sorted(path.name for path in (tmp_path / "two").glob("shard-*.tar")) == [
        "shard-000001.tar",
        "shard-000003.tar",
    ]
    with pytest.raises(VisualError, match="its shards are not complete"):
        open_features(tmp_path / "two")
    assert extract(media, tmp_path / "two", encoder, shard_size=3, rank=0, world_size=2, say=quiet) == manifest
    extract(media, tmp_path / "workers", encoder, shard_size=3, num_workers=2, say=quiet)
    extract(media, tmp_path / "batches", load_encoder("pixels:6", batch=4), shard_size=3, say=quiet)
    assert contents(tmp_path / "two") == contents(tmp_path / "workers") == contents(tmp_path / "batches") == one
    assert manifest["num_samples"] == 11 and [shard["num_samples"] for shard in manifest["shards"]] == [3, 3, 3, 2]
    assert json.loads(one["manifest.json"]) == manifest


def test_what_was_killed_goes_on_and_gives_the_same_bytes(tmp_path):
    media = write_pictures(tmp_path / "media", 150)
    command = [sys.executable, ROOT / "pipelines" / "video" / "extract.py", "--media", "media", "--output", "killed"]
    options = ["--encoder", "pixels:6", "--shard-size", "1"]
    process = subprocess.Popen([*command, *options], cwd=tmp_path, stdout=subprocess.DEVNULL)
    first = tmp_path / "killed" / "shard-000000.tar"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*.json")}
    assert len(done) < 150 and not (tmp_path / "killed" / "manifest.json").exists()
    encoder = load_encoder("pixels:6")
    extract(media, tmp_path / "killed", encoder, shard_size=1, say=quiet)
    extract(media, tmp_path / "whole", encoder, shard_size=1, say=quiet)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # not made again


def test_stopped_at_any_of_its_writes_it_goes_on_and_gives_the_same_bytes(tmp_path):
    media, encoder = write_pictures(tmp_path / "media", 5), load_encoder("pixels:6")
    extract(media, tmp_path / "whole", encoder, shard_size=2, say=quiet)
    whole, replace, num_stops = contents(tmp_path / "whole"), os.replace, 0
    for place in range(11):  # plan, three times two files and a report, manifest
        for is_done in (False, True):
            writes, output = iter(range(place)), tmp_path / f"{place}_{is_done}"

            def stop(*paths, writes=writes, is_done=is_done):
                is_last = next(writes, None) is None
                if is_done or not is_last:
                    replace(*paths)
                if is_last:
                    raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(feature_folder.os, "replace", stop)
                patch.setattr(feature_folder.shutil, "rmtree", lambda *_, **__: None)  # as a kill leaves it
                extract(media, output, encoder, shard_size=2, say=quiet)
            num_stops += (output / "manifest.json").exists()
            extract(media, output, encoder, shard_size=2, say=quiet)
            assert contents(output) == whole
    assert num_stops == 1  # the last of all, so there are no writes but those


def test_a_shard_that_was_cut_off_or_removed_is_made_again(tmp_path):
    media, encoder = write_pictures(tmp_path / "media", 5), load_encoder("pixels:6")
    extract(media, tmp_path / "out", encoder, shard_size=2, say=quiet)
    before, lines = contents(tmp_path / "out"), []
    (tmp_path / "out" / "shard-000000.tar").unlink()
    os.truncate(tmp_path / "out" / "shard-000002.tar", 700)
    extract(media, tmp_path / "out", encoder, shard_size=2, say=lines.append)
    assert contents(tmp_path / "out") == before and [line[:12] for line in lines] == ["shard 1 of 3", "shard 3 of 3"]


def test_a_shard_that_is_in_the_making_is_left_to_who_makes_it(tmp_path):
    names = ["a", "b"]
    folder, again = (feature_folder.FeatureFolder(tmp_path, {}, names, 1) for _ in range(2))
    folder.begin()

    def write(aside, bad):
        assert again.make(0, lambda *_: pytest.fail("made twice")) is None and again.report(0) is None
        bad.append(("a", "unreadable"))
        return []

    assert folder.make(0, write) == again.report(0)
    assert folder.make(0, lambda *_: pytest.fail("made again")) is None and folder.finish(1.0) is None


# ------------------------------------------------------------------------------------------------ what is refused


def test_other_settings_are_refused_with_what_differs(videos, tmp_path):
    encoder = load_encoder("pixels:6")
    begin = {"seconds": 1.5, "shard_size": 2, "say": quiet}
    extract(videos, tmp_path, encoder, **begin)
    before = contents(tmp_path)
    names = media_names(videos)
    for other, options, difference in (
        (encoder, {"seconds": 1.0}, "seconds was 1.5 and is now 1.0"),
        (encoder, {"shard_size": 3}, "shard_size was 2 and is now 3"),
        (load_encoder("pixels:6", None, "bf16"), {}, "encoder.precision was 'fp32' and is now 'bf16'"),
        (load_encoder("pixels:6", "grid"), {}, "encoder.kind was 'frame' and is now 'grid'"),
        (load_encoder("pixels:12"), {}, "encoder.preprocessing.size was 6 and is now 12; preprocessing_sha256 was"),
        (encoder, {"names": names[:4]}, "num_names was 5 and is now 4; names_sha256 was"),
        (encoder, {"names": names[::-1]}, "settings: names_sha256 was"),
    ):
        with pytest.raises(VisualError) as caught:
            extract(videos, tmp_path, other, **{**begin, **options})
        assert f"{tmp_path} was begun with other settings" in str(caught.value) and difference in str(caught.value)
    assert contents(tmp_path) == before


def test_media_that_cannot_be_read_are_counted_and_too_many_are_an_error_at_the_end(videos, tmp_path):
    media, encoder, lines = write_pictures(tmp_path / "media", 6), load_encoder("pixels:6"), []
    whole = (videos / "clip_0.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "picture_000.png").write_bytes(b"nothing")
    write_picture(media / "picture_001.jpg")  # beside picture_001.png
    names = [*media_names(media), "missing"]
    options = {"names": names, "shard_size": 1, "say": lines.append}
    with pytest.raises(VisualError) as caught:
        extract(media, tmp_path / "out", encoder, max_bad_fraction=0.49, **options)
    assert "4 of 8 files cannot be read; --max-bad-fraction 0.49 allows 3." in str(caught.value)
    manifest = extract(media, tmp_path / "out", encoder, max_bad_fraction=0.5, **options)
    reasons = {each["name"]: each["reason"] for each in manifest["bad"]}
    assert list(reasons) == ["cut", "picture_000", "picture_001", "missing"]
    assert "cut.mp4" in reasons["cut"] and "no known format" in reasons["picture_000"]
    assert "picture_001.jpg and picture_001.png" in reasons["picture_001"] and "no file" in reasons["missing"]
    assert manifest["num_samples"] == 4 and [each["name"] for each in manifest["shards"]] == [
        f"shard-{number:06d}.tar" for number in (3, 4, 5, 6)
    ]
    assert sum("1 files cannot be read" in line for line in lines) == 4
    features = open_features(tmp_path / "out")
    assert len(features) == 4 and "picture_005" in features and "cut" not in features

    write_picture(media / "picture_000.png")  # repaired, as the error says
    report = next(path for path in (tmp_path / "out").glob("shard-*.json") if "picture_000" in path.read_text())
    report.unlink()
    assert extract(media, tmp_path / "out", encoder, max_bad_fraction=0.5, **options)["num_samples"] == 5
    assert "picture_000" in open_features(tmp_path / "out")


def test_grids_of_videos_are_refused_before_anything_is_decoded(videos, tmp_path):
    with pytest.raises(VisualError, match=r"clip_0\.mp4 is a video, and grids are of pictures"):
        extract(videos, tmp_path, load_encoder("pixels:6", "grid"), say=quiet)


def test_names_of_any_form_come_back(tmp_path):
    media, encoder = tmp_path / "media", load_encoder("pixels:6")
    names = sorted(["a.b.c", "sub.x/clip.1", "sub.x/deep/__2__", "__init__/x", "100%", "%2E", "é b", "a\nb", "n" * 200])
    for seed, name in enumerate(names):
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        write_picture(media / f"{name}.png", seed)
    (media / ".hidden.png").write_bytes(b"")
    assert media_names(media) == names
    extract(media, tmp_path / "out", encoder, shard_size=4, say=quiet)
    features = open_features(tmp_path / "out")
    assert len(features) == len(names)
    for name in names:
        expected = encoder(frames_of(media / f"{name}.png", encoder.preprocessing))[0].numpy()
        assert np.array_equal(features.read(name), expected)
    keys = [ShardSet(shard_files(tmp_path / "out")).key(index).split("/", 1)[1] for index in range(len(names))]
    assert "sub%2Ex/clip%2E1" in keys and "a%2Eb%2Ec" in keys and "n" * 200 in keys


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "it is empty"),
        (["a", "a"], "'a' is in it twice"),
        (["../a"], "'../a' is no name"),
        (["/a"], "'/a' is no name"),
        (["a/"], "'a/' is no name"),
        (["a\udcff"], "is no name"),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_is_written(tmp_path, names, reason):
    with pytest.raises(VisualError, match=reason):
        extract(tmp_path, tmp_path / "out", load_encoder("pixels:6"), names=names, say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"media": "nowhere"}, "media is 'nowhere'; it must be a folder of pictures or videos"),
        ({"seconds": 0}, "seconds is 0; it must be positive"),
        ({"shard_size": 0}, "shard_size is 0; it must be 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank is 2; it must be in"),
        ({"max_bad_fraction": 2}, "max_bad_fraction is 2; it must be in"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        extract(**{"media": tmp_path, "output": tmp_path / "out", "encoder": load_encoder("pixels:6"), **options})


def test_features_that_are_not_finite_are_not_written(tmp_path):
    media, encoder = write_pictures(tmp_path / "media", 1), load_encoder("pixels:6")
    encoder._tower.register_forward_hook(lambda module, inputs, output: output * 1e6)
    with pytest.raises(VisualError, match="features of 'picture_000' hold NaN, infinity or numbers too large"):
        extract(media, tmp_path / "out", encoder, say=quiet)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_command_line_takes_names_and_the_ranks_of_a_launcher(videos, tmp_path, monkeypatch, capsys):
    (tmp_path / "names.txt").write_text("clip_3\r\nclip_1\n\n")
    command = ["--media", str(videos), "--output", str(tmp_path / "out"), "--encoder", "pixels:6", "--shard-size", "1"]
    options = ["--names", str(tmp_path / "names.txt"), "--seconds", "0.5", "--kind", "frame", "--precision", "fp32"]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        main([*command, *options])
        assert (tmp_path / "out" / "manifest.json").exists() == (rank == "0")
    assert "shard 2 of 2: 1 samples in" in capsys.readouterr().out
    features = open_features(tmp_path / "out")
    assert len(features) == 2 and features.read("clip_3").shape == (8, 108)
