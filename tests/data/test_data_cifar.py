"""CIFAR on small pickles of the original kind: whole, truncated, corrupt, malicious; in a folder and in the archive."""

import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
from typing import ClassVar

import numpy as np
import pytest
from special_files import SPECIAL, make_special

from fedprompt.data import load
from fedprompt.data.sources import cifar
from fedprompt.errors import InputError

RNG = np.random.default_rng(0)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class Python2Pickler(pickle._Pickler):
    """Writes bytes the way that Python 2 wrote its strings, which is what the original files hold."""

    def save_string(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar = pickle._Pickler.dispatch | {bytes: save_string}


def python2_pickle(value) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(layout) -> dict[str, bytes]:
    classes = 10 if layout is cifar.CIFAR10 else 100
    files = {layout.meta: {layout.label_names: [b"class %d" % i for i in range(classes)]}}
    for i, name in enumerate((*layout.train, *layout.test)):
        data = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[name] = {b"data": data, layout.labels: [i, 1, 2, classes - 1], b"filenames": [b"x.png"] * 4}
    return files


@pytest.fixture(params=[cifar.CIFAR10, cifar.CIFAR100], ids=lambda layout: layout.name)
def cifar_folder(request, tmp_path):
    layout = request.param
    inner = tmp_path / layout.folder
    inner.mkdir()
    files = cifar_files(layout)
    for name, value in files.items():
        (inner / name).write_bytes(python2_pickle(value))
    return layout, tmp_path, files


def check_cifar(found, layout, files):
    data = np.concatenate([files[name][b"data"] for name in layout.train])
    assert found.train.inputs.array.shape == (len(data), 32, 32, 3)
    assert found.train.inputs.array.flags.c_contiguous
    row, col = 5, 7  # a pixel's colours lie 1,024 bytes apart
    np.testing.assert_array_equal(
        found.train.inputs.array[:, row, col], data[:, [32 * row + col + 1024 * c for c in range(3)]]
    )
    assert found.train.labels[:4].tolist() == files[layout.train[0]][layout.labels]
    assert found.test.labels.tolist() == files[layout.test[0]][layout.labels]
    assert found.class_names[3] == "class 3"


def test_cifar_folder_is_read(cifar_folder):
    layout, root, files = cifar_folder
    check_cifar(load(layout.name, str(root)), layout, files)
    check_cifar(load(layout.name, str(root / layout.folder)), layout, files)


def test_cifar_saved_again_by_python_3_is_read(cifar_folder):
    layout, root, files = cifar_folder
    for name, value in files.items():
        text_keys = {key.decode(): item for key, item in value.items()}
        (root / layout.folder / name).write_bytes(pickle.dumps(text_keys, protocol=4))
    check_cifar(load(layout.name, str(root)), layout, files)


def packed(layout, root):
    path = root / layout.archive
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / layout.folder, layout.folder)
    shutil.rmtree(root / layout.folder)
    return path


def test_cifar_archive_is_read_without_unpacking(cifar_folder, monkeypatch):
    layout, root, files = cifar_folder
    path = packed(layout, root)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    known = type(layout)(**(vars(layout) | {"md5": md5}))
    monkeypatch.setattr(cifar, layout.name.upper(), known)
    check_cifar(load(layout.name, str(root)), layout, files)
    assert [item.name for item in root.iterdir()] == [layout.archive]


def test_an_archive_that_is_not_the_published_one_is_refused(cifar_folder):
    layout, root, _ = cifar_folder
    path = packed(layout, root)
    with pytest.raises(InputError, match=layout.md5) as caught:
        load(layout.name, str(root))
    assert str(path) in one_line(caught)


def test_a_truncated_archive_of_the_right_name_is_refused(cifar_folder, monkeypatch):
    layout, root, _ = cifar_folder
    path = packed(layout, root)
    path.write_bytes(path.read_bytes()[:-200])
    known = type(layout)(**(vars(layout) | {"md5": hashlib.md5(path.read_bytes()).hexdigest()}))
    monkeypatch.setattr(cifar, layout.name.upper(), known)
    with pytest.raises(InputError, match="unpacked") as caught:
        load(layout.name, str(root))
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("keep", [0, 30, 6000])
def test_a_truncated_cifar_batch_is_named(cifar_folder, keep):
    layout, root, _ = cifar_folder
    path = root / layout.folder / layout.test[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated") as caught:
        load(layout.name, str(root))
    assert layout.test[0] in one_line(caught)


@pytest.mark.parametrize(
    "damage",
    [
        lambda batch, labels: batch.update({labels: [0, 1, 2]}),
        lambda batch, labels: batch.update({labels: [0, 1, 2, 100]}),
        lambda batch, labels: batch.update({labels: [0, 1, 2, -1]}),
        lambda batch, labels: batch.update({labels: [0, 1, 2, b"3"]}),
        lambda batch, labels: batch.pop(b"data"),
        lambda batch, labels: batch.update({b"data": np.zeros((4, 3071), np.uint8)}),
        lambda batch, labels: batch.update({b"data": np.zeros((4, 3072))}),
    ],
)
def test_a_batch_of_the_wrong_content_is_refused(cifar_folder, damage):
    layout, root, files = cifar_folder
    batch = dict(files[layout.test[0]])
    damage(batch, layout.labels)
    (root / layout.folder / layout.test[0]).write_bytes(python2_pickle(batch))
    with pytest.raises(InputError) as caught:
        load(layout.name, str(root))
    assert layout.test[0] in one_line(caught)


def test_a_missing_cifar_batch_is_named(cifar_folder):
    layout, root, _ = cifar_folder
    (root / layout.folder / layout.test[0]).unlink()
    with pytest.raises(InputError, match=f"{layout.test[0]} of {layout.name} is missing"):
        load(layout.name, str(root))


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("place", ["train", "test", "archive"])
def test_what_is_no_regular_file_is_not_taken_for_cifar(cifar_folder, kind, place):
    layout, root, _ = cifar_folder
    path = root / layout.archive if place == "archive" else root / layout.folder / getattr(layout, place)[0]
    if place == "archive":
        shutil.rmtree(root / layout.folder)
    else:
        path.unlink()
    make_special(kind, path)
    with pytest.raises(InputError, match=path.name) as caught:
        load(layout.name, str(root))
    one_line(caught)


def test_a_folder_of_images_is_not_taken_for_cifar100(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"'cifar100' not found.*/train is no file") as caught:
        load("cifar100", str(tmp_path))
    one_line(caught)
    (tmp_path / "train" / "cat").rmdir()
    (tmp_path / "train").rmdir()
    (tmp_path / "train").write_bytes(b"")
    for name in ("folder", "cinic10"):
        with pytest.raises(InputError, match=f"'{name}' not found.*/train is no folder"):
            load(name, str(tmp_path))


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(cifar_folder, tmp_path, protocol):
    layout, root, files = cifar_folder
    trace = tmp_path / "executed"
    attacks = [
        Malicious(os.mkdir, str(trace)),
        Malicious(eval, f"open({str(trace)!r}, 'w')"),
        Malicious(getattr, np.ndarray, "dump"),
        Malicious(np.load, str(trace)),
    ]
    for attack in attacks:
        value = dict(files[layout.test[0]]) | {b"data": attack}
        (root / layout.folder / layout.test[0]).write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(InputError, match="only NumPy arrays are admitted") as caught:
            load(layout.name, str(root))
        assert layout.test[0] in one_line(caught)
        assert not trace.exists()


def test_a_pickle_that_asks_for_more_memory_than_there_is_has_a_reason(cifar_folder):
    layout, root, _ = cifar_folder
    (root / layout.folder / layout.test[0]).write_bytes(pickle.dumps(Malicious(np.ndarray, (10**15,))))
    with pytest.raises(InputError, match=r"damaged \(\w") as caught:
        load(layout.name, str(root))
    one_line(caught)
