"""Data sets of image files, in small: whole, truncated, corrupt, incomplete."""

import shutil

import numpy as np
import pytest
from PIL import Image
from special_files import make_special

from fedprompt.data import load
from fedprompt.data.sources import folders
from fedprompt.errors import InputError

RNG = np.random.default_rng(0)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def save(path, size=(32, 32), value=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) if value is None else None
    image = Image.fromarray(pixels) if value is None else Image.new("RGB", size, value)
    image.convert(mode).save(path)
    return pixels


@pytest.fixture
def mnist_m(tmp_path):
    root, pixels = tmp_path / "mnist_m", {}
    for part, count in (("train", 5), ("test", 3)):
        names = [f"{i:08d}.png" for i in range(count)]
        pixels[part] = [save(root / f"mnist_m_{part}" / name) for name in names]
        lines = [f"{name} {9 - i}" for i, name in enumerate(names)]
        (root / f"mnist_m_{part}_labels.txt").write_text("\n".join(lines) + "\n")
    return tmp_path, pixels


def test_mnist_m_is_read(mnist_m):
    root, pixels = mnist_m
    found = load("mnist-m", str(root))
    np.testing.assert_array_equal(found.train.inputs.array, pixels["train"])
    assert found.train.labels.tolist() == [9, 8, 7, 6, 5]
    assert found.test.labels.tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    "line", ["00000001.png", "00000001.png 12", "../mnist_m_train/00000001.png 1", "00000001.png x"]
)
def test_a_bad_line_of_mnist_m_is_shown(mnist_m, line):
    root, _ = mnist_m
    (root / "mnist_m" / "mnist_m_test_labels.txt").write_text(f"00000000.png 3\n{line}\n")
    with pytest.raises(InputError, match=r"mnist_m_test_labels\.txt: the line") as caught:
        load("mnist-m", str(root))
    assert line in one_line(caught)


def test_damaged_images_are_named(mnist_m):
    root, _ = mnist_m
    victim = root / "mnist_m" / "mnist_m_test" / "00000001.png"
    whole = victim.read_bytes()
    for content in (b"", whole[:20], whole[:-200], b"<html></html>", whole[:60] + bytes(200) + whole[260:]):
        victim.write_bytes(content)
        with pytest.raises(InputError, match=r"00000001\.png: no readable image") as caught:
            load("mnist-m", str(root))
        one_line(caught)
    victim.unlink()
    with pytest.raises(InputError, match=r"00000001\.png: .*missing"):
        load("mnist-m", str(root))
    save(victim, (30, 32))
    with pytest.raises(InputError, match=r"00000001\.png: 30x32 pixels where the data set has 32x32"):
        load("mnist-m", str(root))


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n02", "n01"]
    for wnid in wnids:
        for i in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", (64, 64), "red" if wnid == "n02" else "blue")
    save(root / "val" / "images" / "val_0.JPEG", (64, 64), "blue")
    save(root / "val" / "images" / "val_1.JPEG", (64, 64), "red", mode="L")  # the original has grey images, too
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tpop bottle, soda bottle\n")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t32\t44\t62\nval_1.JPEG\tn02\t1\t2\t3\t4\n")
    return tmp_path


def test_tiny_imagenet_is_read_with_its_validation_set_as_test(tiny):
    found = load("tiny-imagenet", str(tiny))
    assert found.class_names == ("pop bottle", "goldfish")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [1, 0]
    assert (found.train.inputs.array[:2, 5, 5, 0] > 200).all()
    assert (found.train.inputs.array[2:, 5, 5, 2] > 200).all()
    assert found.test.inputs.array.shape == (2, 64, 64, 3)


def test_an_incomplete_tiny_imagenet_is_refused(tiny):
    root = tiny / "tiny-imagenet-200"
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match=r"val_annotations\.txt: the line 'val_0\.JPEG n77"):
        load("tiny-imagenet", str(tiny))
    (root / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(InputError, match=r"val_annotations\.txt: is empty"):
        load("tiny-imagenet", str(tiny))
    shutil.rmtree(root / "train" / "n01")
    with pytest.raises(InputError, match=r"n01/images: this folder of the data set is missing"):
        load("tiny-imagenet", str(tiny))


def test_cinic10_is_read_without_its_validation_third(tmp_path):
    for part, count in (("train", 2), ("valid", 3), ("test", 1)):
        for name in folders.CINIC_CLASSES:
            for i in range(count):
                save(tmp_path / "CINIC-10" / part / name / f"{name}-{i}.png")
    found = load("cinic10", str(tmp_path))
    assert np.bincount(found.train.labels).tolist() == [2] * 10
    assert np.bincount(found.test.labels).tolist() == [1] * 10
    assert found.train.inputs.array.shape == (20, 32, 32, 3)
    shutil.rmtree(tmp_path / "CINIC-10" / "train" / "ship")
    with pytest.raises(InputError, match="ship: this folder of the data set is missing"):
        load("cinic10", str(tmp_path))


def test_a_folder_of_any_sizes_is_cropped_to_the_centre(tmp_path):
    wide = Image.new("RGB", (400, 100), "red")
    wide.paste("lime", (150, 0, 250, 100))  # the centre square
    (tmp_path / "train" / "cat").mkdir(parents=True)
    wide.save(tmp_path / "train" / "cat" / "a.png")
    save(tmp_path / "train" / "dog" / "b.jpg", (300, 700), mode="L")
    save(tmp_path / "test" / "dog" / "c.png", (20, 10))
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    found = load("folder", str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.train.inputs.array.shape == (2, folders.SIDE, folders.SIDE, 3)
    assert found.test.labels.tolist() == [1]
    inside = found.train.inputs.array[0, :, 4:-4]
    assert (inside == (0, 255, 0)).all()
    assert found.domain_names == ("all",)
    assert found.domain_classes is None


def test_a_photo_is_turned_the_way_its_camera_says(tmp_path):
    image = Image.new("RGB", (300, 300), "red")
    image.paste("blue", (0, 0, 300, 150))  # blue above; orientation 3: show it turned by 180 degrees
    orientation = Image.Exif()
    orientation[0x0112] = 3
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        image.save(tmp_path / part / "cat" / "a.png", exif=orientation)
    shown = load("folder", str(tmp_path)).train.inputs.array[0]
    assert shown[20, 128].tolist() == [255, 0, 0]
    assert shown[-20, 128].tolist() == [0, 0, 255]


def test_a_folder_of_domains(tmp_path):
    for domain, classes in (("photo", ["cat", "dog"]), ("sketch", ["dog", "fox"])):
        for part in ("train", "test"):
            for name in classes:
                save(tmp_path / domain / part / name / "a.png", (16, 16))
    (tmp_path / "other").mkdir()
    found = load("folder", str(tmp_path))
    assert found.class_names == ("cat", "dog", "fox")
    assert found.domain_names == ("photo", "sketch")
    assert found.train.domains.tolist() == [0, 0, 1, 1]
    assert found.train.labels.tolist() == [0, 1, 1, 2]
    assert found.domain_classes.tolist() == [[True, True, False], [False, True, True]]


def test_a_folder_with_something_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.root: the data set 'folder' needs a folder"):
        load("folder")
    with pytest.raises(InputError, match="looked for train"):
        load("folder", str(tmp_path))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="train: no images"):
        load("folder", str(tmp_path))
    save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(InputError, match="test: this folder is missing"):
        load("folder", str(tmp_path))
    save(tmp_path / "test" / "dog" / "a.png")
    with pytest.raises(InputError, match="dog: class 'dog' has no folder in"):
        load("folder", str(tmp_path))


@pytest.fixture
def photos(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / part / name / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("train/cat/more/b.png", "folders within class folders (1, such as train/cat/more)"),
        ("train/cat/b.heic", "files of other endings (1, such as train/cat/b.heic)"),
        ("train/cat/b", "files of other endings (1, such as train/cat/b)"),
        ("train/cat/.b.png", "hidden or system files (1, such as train/cat/.b.png)"),
        ("train/dog/Thumbs.db", "hidden or system files (1, such as train/dog/Thumbs.db)"),
        ("train/__MACOSX/cat/._a.png", "hidden or system files (1, such as train/__MACOSX)"),
        ("train/.git/a.png", "hidden or system files (1, such as train/.git)"),
        ("__MACOSX/train/._a.png", "folders beside those of the data set (1, such as __MACOSX)"),
        ("val/cat/a.png", "folders beside those of the data set (1, such as val)"),
        ("train/b.png", "files beside class folders (1, such as train/b.png)"),
        ("b.png", "images outside of class folders (1, such as b.png)"),
        ("test/fox/", "has no folder in"),
        ("train/fox/", "fox: no image in this class folder, found: nothing;"),
        (
            "train/fox/b.heic",
            "found: files of other endings (1, such as train/fox/b.heic);",
        ),
        ("train/fox/red/b.png", "found: folders within class folders (1, such as train/fox/red);"),
        ("train/Cat/a.png", "the classes 'Cat' and 'cat' differ only in case"),
        ("train/cat\udcff/b.png", "the name is no UTF-8 text; rename this"),
        ("train/cat/B.PNG", None),
        ("train/cat/b.Jpeg", None),
    ],
)
def test_an_image_is_read_or_its_folder_is_told_in_one_line(photos, added, told):
    path = photos / added
    if added.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path, "PNG")
    try:
        found = load("folder", str(photos))
    except InputError as error:
        lines, images = [str(error)], 2
    else:
        lines, images = found.notes, len(found.train)
    assert len(lines) == (told is not None)
    assert all(told in line and "\n" not in line for line in lines)
    assert images == 2 + (told is None or "differ" in told)


def test_what_is_no_file_among_the_images_is_refused(photos):
    for kind in ("named pipe", "broken link", "circular link", "device", "socket"):
        make_special(kind, photos / "train" / "cat" / "b.png")
        with pytest.raises(InputError, match=r"b\.png: (is|cannot be read)") as caught:
            load("folder", str(photos))
        one_line(caught)
        (photos / "train" / "cat" / "b.png").unlink()


def test_images_after_the_first_of_a_file_and_classes_without_a_test_are_told(photos):
    frames = [Image.new("L", (32, 32), value) for value in (0, 255)]
    frames[0].save(photos / "train" / "cat" / "b.gif", save_all=True, append_images=frames[1:])
    (photos / "test" / "dog" / "a.png").unlink()
    found = load("folder", str(photos))
    assert found.notes == (
        f"{photos}: not read: images after the first of their file (1, such as train/cat/b.gif); "
        "class folders without an image (1, such as test/dog)",
    )


def test_images_that_other_sources_do_not_read_are_told_too(mnist_m, tiny):
    root, _ = mnist_m
    save(root / "mnist_m" / "mnist_m_train" / "z.png")
    assert "images that are not in the list of files (1, such as mnist_m_train/z.png)" in one(
        load("mnist-m", str(root)).notes
    )
    save(tiny / "tiny-imagenet-200" / "val" / "images" / "z.JPEG", (64, 64))
    save(tiny / "tiny-imagenet-200" / "train" / "n01" / "images" / "more" / "z.JPEG", (64, 64))
    told = one(load("tiny-imagenet", str(tiny)).notes)
    assert "folders within class folders (1, such as train/n01/images/more)" in told
    assert "images that are not in the list of files (1, such as val/images/z.JPEG)" in told


def one(lines):
    (line,) = lines
    return line


def test_the_size_of_the_files_is_known_beside_that_of_the_pixels(photos):
    save(photos / "train" / "cat" / "b.png", (640, 480))
    save(photos / "train" / "cat" / "c.png", (640, 480))
    save(photos / "train" / "cat" / "d.png", (640, 480))
    assert load("folder", str(photos)).pixels == (640, 480)
    assert load("digits").pixels is None
