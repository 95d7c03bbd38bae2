"""MNIST and Fashion-MNIST on small IDX files: whole, truncated, corrupt, mistaken; and where files are looked for."""

import gzip
import hashlib
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from special_files import SPECIAL, make_special

from fedprompt.data import available, load
from fedprompt.data.sources import idx
from fedprompt.errors import InputError

RNG = np.random.default_rng(0)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(params=["", ".gz"])
def idx_folder(request, tmp_path):
    pack = gzip.compress if request.param else bytes
    arrays = {}
    for part, (images, labels) in idx.FILES.items():
        count = {"train": 12, "test": 6}[part]
        arrays[part] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for stem, array in zip((images, labels), arrays[part]):
            (tmp_path / (stem + request.param)).write_bytes(pack(idx_bytes(array)))
    return tmp_path, request.param, arrays


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_they_were_written(idx_folder, name):
    folder, _, arrays = idx_folder
    found = load(name, str(folder))
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(found, part).inputs.array[..., 0], arrays[part][0])
        np.testing.assert_array_equal(getattr(found, part).labels, arrays[part][1])
    assert len(found.class_names) == 10


@pytest.mark.parametrize("victim", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_truncated_idx_file_is_named(idx_folder, victim):
    folder, end, _ = idx_folder
    path = folder / (victim + end)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated") as caught:
        load("mnist", str(folder))
    assert str(path) in one_line(caught)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"\0\0\x08\x03\0\0", b"<html>not found</html>", b"\0\0\x0d\x01\0\0\0\0"]
)
def test_a_file_that_is_no_idx_file_is_named(idx_folder, content):
    folder, end, _ = idx_folder
    path = folder / ("t10k-images-idx3-ubyte" + end)
    path.write_bytes(content if not end else gzip.compress(content))
    with pytest.raises(InputError) as caught:
        load("mnist", str(folder))
    assert str(path) in one_line(caught)


def test_a_damaged_gzip_file_is_named(idx_folder):
    folder, end, _ = idx_folder
    if not end:
        pytest.skip("only .gz carries a checksum")
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as caught:
        load("mnist", str(folder))
    assert str(path) in one_line(caught)


def test_idx_files_that_do_not_fit_together_are_refused(idx_folder):
    folder, end, _ = idx_folder
    pack = gzip.compress if end else bytes
    labels = folder / ("train-labels-idx1-ubyte" + end)
    labels.write_bytes(pack(idx_bytes(np.zeros(11, np.uint8))))
    with pytest.raises(InputError, match=r"\(12, 28, 28\).*\(11,\)"):
        load("mnist", str(folder))
    labels.write_bytes(pack(idx_bytes(np.full(12, 10, np.uint8))))
    with pytest.raises(InputError, match="label 10; allowed: 0 to 9"):
        load("mnist", str(folder))
    labels.unlink()
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\[\.gz\] is missing"):
        load("mnist", str(folder))


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ((2**20, 2**20, 2**20), b"", "asks for 1,152,921,504,606,846,976 bytes .*at most 1,073,741,824"),
        ((12, 28, 28), bytes(10_000_000), "more bytes than the header asks for .* 9,408"),
        ((12, 0, 0), b"", "each at least 1"),
        ((12, 28, 0), b"", "each at least 1"),
        ((0, 28, 28), b"", "each at least 1"),
        ((12, 28), bytes(12 * 28), r"\[n, H, W\]"),
    ],
)
def test_headers_that_promise_too_much_or_nothing_are_refused_with_no_more_read(idx_folder, shape, data, message):
    folder, end, _ = idx_folder
    pack = gzip.compress if end else bytes
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    (folder / ("train-images-idx3-ubyte" + end)).write_bytes(pack(header + data))
    with pytest.raises(InputError, match=message) as caught:
        load("mnist", str(folder))
    one_line(caught)


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_asks_for(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = struct.pack(">HBB3I", 0, 8, 3, 12, 28, 28)
    with gzip.open(path, "wb", compresslevel=1) as bomb:
        bomb.write(header)
        for _ in range(100):
            bomb.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(InputError, match="more bytes than the header asks for"):
        idx.read_array(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**21


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("stem", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_what_is_no_regular_idx_file_is_refused(idx_folder, kind, stem):
    folder, end, _ = idx_folder
    (folder / (stem + end)).unlink()
    make_special(kind, folder / (stem + end))
    with pytest.raises(InputError, match=stem) as caught:
        load("mnist", str(folder))
    one_line(caught)


def test_fashion_mnist_under_mnists_name_is_refused(idx_folder, monkeypatch):
    folder, _, arrays = idx_folder
    content = hashlib.sha256(idx_bytes(arrays["train"][0])).hexdigest()
    monkeypatch.setitem(idx.FASHION_SHA256, "train-images-idx3-ubyte", content)
    with pytest.raises(InputError, match=r"Fashion-MNIST's images.*data\.name=fashion-mnist"):
        load("mnist", str(folder))


def test_other_images_of_full_size_are_not_fashion_mnist(tmp_path):
    for stem, array in {
        "train-images-idx3-ubyte": np.zeros((60_000, 1, 1), np.uint8),
        "train-labels-idx1-ubyte": np.zeros(60_000, np.uint8),
        "t10k-images-idx3-ubyte": np.zeros((10_000, 1, 1), np.uint8),
        "t10k-labels-idx1-ubyte": np.zeros(10_000, np.uint8),
    }.items():
        (tmp_path / stem).write_bytes(idx_bytes(array))
    with pytest.raises(InputError, match=r"not Fashion-MNIST's images .*SHA-256"):
        load("fashion-mnist", str(tmp_path))
    assert len(load("mnist", str(tmp_path)).train) == 60_000


@pytest.mark.skipif(not os.path.isdir(idx.FASHION_FOLDER), reason="Debian's package dataset-fashion-mnist is not here")
def test_debians_fashion_mnist_is_read_and_recognised():
    found = load("fashion-mnist", idx.FASHION_FOLDER)
    assert np.bincount(found.train.labels).tolist() == [6000] * 10
    with pytest.raises(InputError, match="Fashion-MNIST's images"):
        load("mnist", idx.FASHION_FOLDER)


def test_missing_files_say_where_was_looked_and_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROMPT_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"data\.name: .*cs\.toronto\.edu.*data\.root=DIR") as caught:
        load("cifar10")
    assert str(tmp_path / "cifar10") in one_line(caught)
    with pytest.raises(InputError, match=r"data\.root: '.*nowhere' is no folder"):
        load("cifar10", str(tmp_path / "nowhere"))


def test_the_default_location_has_a_folder_per_data_set(idx_folder, monkeypatch):
    folder, _, arrays = idx_folder
    home = folder / "home"
    shutil.copytree(folder, home / "mnist")
    monkeypatch.setenv("FEDPROMPT_DATA", str(home))
    np.testing.assert_array_equal(load("mnist").test.labels, arrays["test"][1])
    assert {info.name: info.present for info in available()}["mnist"]
    monkeypatch.setenv("FEDPROMPT_DATA", str(folder))
    assert not {info.name: info.present for info in available()}["mnist"]
