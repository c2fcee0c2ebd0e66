"""Shards are read by number, byte for byte as WebDataset reads them, and a damaged one is named."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import stat
import tarfile
from pathlib import Path

import pytest
import webdataset
from torch.utils.data import DataLoader

from dora_core.data import shard_index, shards
from dora_core.data.rows import DataError
from dora_core.data.shards import ShardSet, shard_files, write_shards

LONG = "a folder/" + "n" * 150
SAMPLES = [
    {"__key__": key, "jpg": bytes([number]) * (700 * number), "json": json.dumps({"id": number}).encode()}
    for number, key in enumerate(["000", "001", "train/é", LONG, "a.b/004", "005", "006"])
]


@pytest.fixture
def files(tmp_path):
    return write_shards(SAMPLES, tmp_path, max_count=3)


def contents(shard_set):
    return [
        {
            "__key__": shard_set.key(index).split(".tar/", 1)[1],
            **{suffix: shard_set.read(index, suffix) for suffix in shard_set.members(index)},
        }
        for index in range(len(shard_set))
    ]


def webdatasets(files):
    """Return the samples as WebDataset's own reader gives them, without its own fields."""
    read = webdataset.WebDataset([str(file) for file in files], shardshuffle=False, empty_check=False)
    own = ("__url__", "__local_path__")
    return [{name: value for name, value in sample.items() if name not in own} for sample in read]


def make_tar(path, members, format=tarfile.USTAR_FORMAT):
    """Write members given as (name, content) or as ``TarInfo`` without content."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, type, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, linkname
    return info


def test_samples_are_spread_over_shards_and_read_as_webdataset_reads_them(files):
    assert [file.name for file in files] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert contents(ShardSet(files)) == webdatasets(files) == SAMPLES


def test_a_shard_written_by_webdataset_is_read_as_webdataset_reads_it(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"x/{number}", "seg.PNG": b"png%d" % number, "json": {"n": number}, "cls": number})
    files = shard_files(tmp_path)
    ours = contents(ShardSet(files))
    assert len(files) == 3 and len(ours) == 5
    assert ours == webdatasets(files)
    assert ours[3] == {"__key__": "x/3", "cls": b"3", "json": b'{"n": 3}', "seg.png": b"png3"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_name_is_read_as_webdataset_reads_it(tmp_path, format):
    names = ["./0.jpg", "a.b/c.d.e.JPG", "a.b/c.json", "n" * 90 + "/" + "m" * 60 + ".jpg", "ü/ß.txt"]
    skipped = ["readme", "x.y/readme", ".hidden", "__meta__", "__meta__/0.json"]
    path = make_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names + skipped], format)
    assert contents(ShardSet([path])) == webdatasets([path])
    assert [sorted(sample) for sample in contents(ShardSet([path]))][1] == ["__key__", "d.e.jpg", "json"]


def test_sizes_and_keys_come_without_reading_contents(files):
    shard_set = ShardSet(files)
    assert len(shard_set) == 7
    assert shard_set.members(5) == {"jpg": 3500, "json": 9}
    assert shard_set.key(5) == "shard-000001.tar/005"
    with pytest.raises(IndexError):
        shard_set.key(7)
    with pytest.raises(DataError, match=r"shard-000001\.tar/005 has no member 'png'; it has jpg, json\. Add"):
        shard_set.read(5, "png")


def test_shards_of_several_folders_are_told_apart_in_keys(tmp_path):
    files = [*write_shards(SAMPLES[:1], tmp_path / "a"), *write_shards(SAMPLES[:1], tmp_path / "b")]
    shard_set = ShardSet(files)
    assert [shard_set.key(index) for index in (0, 1)] == ["a/shard-000000.tar/000", "b/shard-000000.tar/000"]


def test_members_of_a_key_need_not_be_neighbours(tmp_path):
    names = ["0.jpg", "1.jpg", "1.json", "0.json"]
    shard_set = ShardSet([make_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names])])
    assert len(shard_set) == 2
    assert shard_set.read(0, "json") == b"0.json" and shard_set.read(1, "json") == b"1.json"


def test_links_folders_and_devices_are_no_members(tmp_path):
    members = [
        special("0.json", tarfile.SYMTYPE, "/etc/passwd"),
        special("0.png", tarfile.LNKTYPE, "0.jpg"),
        special("0.dir", tarfile.DIRTYPE),
        special("0.dev", tarfile.CHRTYPE),
        special("0.fifo", tarfile.FIFOTYPE),
        ("0.jpg", b"content"),
        ("../../1.jpg", b"outside"),
    ]
    (tmp_path / "inner").mkdir()
    path = make_tar(tmp_path / "inner" / "s.tar", members)
    shard_set = ShardSet([path])
    assert [shard_set.members(index) for index in range(2)] == [{"jpg": 7}, {"jpg": 7}]
    assert shard_set.key(1) == "s.tar/../../1"
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["s.tar", "s.tar.index.json"]


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_in_a_shard_is_bytes_and_never_run(tmp_path):
    bomb = pickle.dumps(_Bomb(tmp_path / "executed"))
    suffixes = ("pkl", "pyd", "pickle", "pth")
    path = make_tar(tmp_path / "s.tar", [(f"0.{suffix}", bomb) for suffix in suffixes])
    shard_set = ShardSet(shard_files(path))
    assert all(shard_set.read(0, suffix) == bomb for suffix in suffixes)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists()


def test_forked_workers_read_what_this_process_reads(files):
    shard_set = ShardSet(files)
    here = [shard_set.read(index, "jpg") for index in range(len(shard_set))]
    for _ in range(2):
        assert list(_loaded(shard_set, num_workers=2, multiprocessing_context="fork")) == here


def test_spawned_workers_read_what_this_process_reads(files):
    shard_set = ShardSet(files)
    read = _loaded(shard_set, num_workers=1, multiprocessing_context="spawn")
    assert list(read) == [sample["jpg"] for sample in SAMPLES]


def _loaded(shard_set, **options):
    """Read every jpg in workers; a bound method is what a spawned process can be sent."""
    read = functools.partial(shard_set.read, suffix="jpg")
    return DataLoader(range(len(shard_set)), collate_fn=read, batch_size=None, **options)


def test_few_files_stay_open_however_many_shards_there_are(tmp_path):
    shard_set = ShardSet(write_shards(SAMPLES * 20, tmp_path, max_count=1))
    before = len(os.listdir("/proc/self/fd"))
    assert [shard_set.read(index, "json") for index in range(140)] == [sample["json"] for sample in SAMPLES] * 20
    assert len(os.listdir("/proc/self/fd")) <= before + shards.MAX_OPEN_FILES


def forbid_walking(monkeypatch):
    monkeypatch.setattr(shard_index, "_walk", lambda *_: pytest.fail("the tar was read again"))


def test_the_second_time_the_index_beside_the_shard_is_used(files, monkeypatch):
    first = ShardSet(files)
    assert all(file.with_name(file.name + ".index.json").is_file() for file in files)
    forbid_walking(monkeypatch)
    second = ShardSet(files)
    assert contents(second) == contents(first) == SAMPLES
    assert second.sha256 == first.sha256


def test_a_changed_shard_is_indexed_again(files):
    before = ShardSet(files).sha256
    write_shards([SAMPLES[5]], files[0].parent)
    changed = ShardSet(files)
    assert contents(changed)[0] == SAMPLES[5] and changed.sha256 != before
    status = files[0].stat()
    make_tar(files[0], [("other.txt", b"x")])
    os.truncate(files[0], status.st_size)
    os.utime(files[0], ns=(0, status.st_mtime_ns + 1))
    assert contents(ShardSet(files))[0] == {"__key__": "other", "txt": b"x"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[1, 2]",
        lambda text: text.replace('"samples": {', '"samples": {"0": 3, '),
        lambda text: text.replace('"jpg": [', '"jpg": [-'),
        lambda text: text.replace('"jpg": [', '"jpg": [9999'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[" * 100_000,
        lambda text: "\udc80",
    ],
)
def test_an_index_that_is_damaged_is_made_again(files, damage):
    good = ShardSet(files)
    cache = files[0].with_name(files[0].name + ".index.json")
    text = cache.read_text(encoding="utf-8")
    cache.write_text(damage(text), encoding="utf-8", errors="surrogateescape")
    assert contents(ShardSet(files)) == contents(good)
    assert cache.read_text(encoding="utf-8") == text


def test_where_no_index_can_be_written_the_shard_is_read_all_the_same(files, monkeypatch):
    def full(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", full)
    assert contents(ShardSet(files)) == SAMPLES
    assert [file for file in files[0].parent.iterdir() if file not in files] == []


def test_the_index_is_as_readable_as_the_umask_says(files):
    ShardSet(files)
    mode = files[0].with_name(files[0].name + ".index.json").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(files[0].stat().st_mode)


def test_the_hash_is_of_names_and_member_tables_not_of_the_folder(files, tmp_path):
    hashes = {ShardSet(files).sha256, ShardSet(files[:2]).sha256, ShardSet(files[::-1]).sha256}
    assert len(hashes) == 3
    elsewhere = write_shards(SAMPLES, tmp_path / "copy", max_count=3)
    assert ShardSet(elsewhere).sha256 == ShardSet(files).sha256


@pytest.mark.parametrize("end", [100, 600, 1300, 3000, 4096])
def test_a_shard_that_was_cut_off_is_named(files, end):
    os.truncate(files[0], end)
    with pytest.raises(DataError, match=r"shard-000000\.tar: .*Write or download the file again"):
        ShardSet(files)


def test_a_shard_without_its_end_mark_is_named(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("0.jpg", b"x" * 512), ("1.jpg", b"y" * 512)])
    os.truncate(path, 1024)  # just after the first member, where tarfile and WebDataset see a whole archive
    assert len(webdatasets([path])) == 1
    with pytest.raises(DataError, match=r"s\.tar: neither a valid header nor the end-of-archive mark at byte 1,024"):
        ShardSet([path])


def _with_header(offset, value):
    def change(content):
        content[512 * 2 + offset : 512 * 2 + offset + len(value)] = value
        header = content[1024:1536]
        header[148:156] = b" " * 8
        content[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(header)

    return change


def _bad_checksum(content):
    content[1024 + 5] ^= 255


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_bad_checksum, "neither a valid header nor the end-of-archive mark at byte 1,024"),
        (_with_header(124, b"\xff" * 11 + b"\x00"), "negative size"),
        (_with_header(124, b"\xff" * 9 + b"\xfc\x00\x00"), "negative size"),
        (_with_header(124, b"7" * 11), "cut off within the member '1.jpg'"),
        (_with_header(156, b"x"), "not a readable tar"),
        (_with_header(156, b"L"), "s.tar: "),
        (_with_header(156, b"S"), "s.tar: "),
    ],
)
def test_a_damaged_header_is_named_and_ends_the_reading(tmp_path, change, reason):
    path = make_tar(tmp_path / "s.tar", [("0.jpg", b"x" * 512), ("1.jpg", b"y" * 512)])
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        ShardSet([path])
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


def test_a_pax_header_with_a_negative_or_a_vast_size_is_named(tmp_path):
    for size in ("-512", "1000000000000"):
        info = tarfile.TarInfo("0.jpg")
        info.pax_headers = {"size": size}
        path = make_tar(tmp_path / "s.tar", [info, ("1.jpg", b"x")], tarfile.PAX_FORMAT)
        with pytest.raises(DataError, match=r"s\.tar: .*'0\.jpg'"):
            ShardSet([path])


def test_a_sparse_member_is_refused(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"GNU.sparse.size": "1000000000000", "GNU.sparse.map": "0,1"}
    path = make_tar(tmp_path / "s.tar", [info], tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=r"s\.tar: the member '0\.jpg' is sparse"):
        ShardSet([path])


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(2000)])
def test_what_is_no_tar_is_named(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar: not a readable tar"):
        ShardSet([path])


@pytest.mark.parametrize("second", ["0.jpg", "0.JPG"])
def test_two_members_of_one_name_are_refused(tmp_path, second):
    path = make_tar(tmp_path / "s.tar", [("0.jpg", b"a"), ("1.jpg", b"b"), (second, b"c")])
    with pytest.raises(DataError, match=rf"s\.tar: two members are named '{second}'"):
        ShardSet([path])


def test_shards_without_samples_or_given_twice_are_refused(tmp_path, files):
    empty = make_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar and 0 other shards hold no sample"):
        ShardSet([empty])
    assert len(ShardSet([empty, *files])) == 7
    with pytest.raises(DataError, match="2 shards were given, 1 of them a second time"):
        ShardSet([files[0], os.path.relpath(files[0])])
    with pytest.raises(DataError, match="0 shards were given"):
        ShardSet([])
    with pytest.raises(DataError, match=r"absent\.tar: cannot be read \(No such file"):
        ShardSet([tmp_path / "absent.tar"])


def test_a_shard_that_changes_or_vanishes_under_a_run_is_named(files):
    shard_set = ShardSet(files)
    os.utime(files[0], ns=(0, 0))
    with pytest.raises(DataError, match=r"shard-000000\.tar was changed while it is in use"):
        shard_set.read(0, "jpg")
    files[1].unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar cannot be read \(No such file"):
        shard_set.read(3, "jpg")
    assert shard_set.read(6, "json") == SAMPLES[6]["json"]
    os.truncate(files[2], 600)
    with pytest.raises(DataError, match=r"shard-000002\.tar ends at byte 600, inside a member"):
        shard_set.read(6, "jpg")


def test_a_source_names_its_shards_in_order(tmp_path, monkeypatch):
    names = [f"shard-{number:06d}.tar" for number in (10, 2, 0, 1)]
    for name in names:
        make_tar(tmp_path / name, [("0.jpg", b"x")])
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "folder.tar").mkdir()
    expected = [tmp_path / name for name in sorted(names)]
    assert shard_files(tmp_path) == shard_files(str(tmp_path)) == expected
    assert shard_files(tmp_path / "shard-*.tar") == expected
    assert shard_files(tmp_path / names[0]) == [tmp_path / names[0]]
    assert shard_files(f"{tmp_path}/shard-{{000000..000002}}.tar") == expected[:3]
    assert shard_files(f"{tmp_path}/shard-{{000010,00000[01]}}.tar") == [expected[0], expected[1], expected[3]]
    assert shard_files(f"{tmp_path}/**/shard-000010.tar") == expected[3:]
    monkeypatch.chdir(tmp_path)
    assert shard_files("shard-{000000..000001}.tar") == [Path(names[2]), Path(names[3])]


@pytest.mark.parametrize("source", ["absent.tar", "*.tar", "s-{0..3}.tar", "s-{0..3.tar", ".", "http://host/s.tar"])
def test_a_source_without_shards_says_what_is_allowed(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        shard_files(source)
    for part in (source, "Shards are given as", "Correct the path", str(tmp_path)):
        assert part in str(error.value)


def test_a_brace_pattern_must_find_every_shard_it_names(files):
    with pytest.raises(DataError, match=r"nothing is at .*shard-000003\.tar, .*shard-000005\.tar and 4 more\."):
        shard_files(f"{files[0].parent}/shard-{{000000..000009}}.tar")


def test_a_pipe_is_a_missing_file_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nothing is at pipe:touch executed"):
        shard_files("pipe:touch executed")
    with pytest.raises(DataError, match="cannot be read"):
        ShardSet(["pipe:touch executed"])
    assert [file.is_file() for file in write_shards(SAMPLES, "pipe:touch executed;", pattern="%d.tar")] == [True]
    assert not (tmp_path / "executed").exists()


def test_the_same_samples_give_the_same_shard(tmp_path):
    one, other = (write_shards(SAMPLES, tmp_path / name) for name in ("a", "b"))
    assert one[0].read_bytes() == other[0].read_bytes()
    assert write_shards([], tmp_path / "none") == []


def test_writing_that_fails_leaves_complete_shards_only(tmp_path, capfd):
    def samples():
        yield from SAMPLES[:3]
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_shards(samples(), tmp_path, max_count=2)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"__key__": "a.b", "jpg": b""}, "a key is a string without a dot"),
        ({"__key__": "a/.b", "jpg": b""}, "would not be read back"),
        ({"__key__": "__meta__/a", "jpg": b""}, "would not be read back"),
        ({"__key__": 3, "jpg": b""}, "The sample 3 with jpg would not"),
        ({"jpg": b""}, "The sample None with jpg would not"),
        ({"__key__": "a", "JPG": b""}, "with JPG would not be read back so"),
        ({"__key__": "a", "jpg/x": b""}, "with jpg/x would not be read back so"),
        ({"__key__": "000", "jpg": b""}, "'000' with this key would not be read back so"),
        ({"__key__": "a", "json": {"id": 1}}, "the members {'json': 'dict'}; it must have one or more, all bytes"),
        ({"__key__": "a", "__url__": "x", "jpg": b""}, "'__url__': 'str'"),
        ({"__key__": "a"}, "the members {}"),
    ],
)
def test_a_sample_that_would_not_come_back_is_not_written(tmp_path, sample, reason):
    with pytest.raises(DataError) as error:
        write_shards([SAMPLES[0], sample], tmp_path)
    assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == []
