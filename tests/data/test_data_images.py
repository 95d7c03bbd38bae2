"""Images that processes of one host share, and inputs that are copied only when picked."""

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fedprompt.data.images import Handle, NotHere, empty
from fedprompt.data.inputs import ImageInputs, gathered

needs_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
READ = """
import pickle, sys
images = pickle.load(sys.stdin.buffer).open()
assert not images.array.flags.writeable
print(len(images), images.shape, images.pixels()[:, 0, 0, 0].tolist(), images[1:].pixels()[:, 0, 0, 0].tolist())
"""


def shared(count=10):
    """Images that hold their number."""
    images = empty((count, 2, 2, 3))
    images[:] = np.arange(count)[:, None, None, None]
    return images


def test_inputs_are_the_images_in_the_order_of_their_indices():
    images = np.arange(10 * 2 * 2, dtype=np.uint8).reshape(10, 2, 2, 1)
    picked = ImageInputs(images)[np.array([7, 2, 7])]
    assert (len(picked), picked.shape) == (3, (2, 2, 1))
    np.testing.assert_array_equal(picked.pixels(), images[[7, 2, 7]])
    np.testing.assert_array_equal(picked[np.array([2, 1])].pixels(), images[[7, 2]])
    np.testing.assert_array_equal(picked[1:].pixels(), images[[2, 7]])
    np.testing.assert_array_equal(ImageInputs(images)[3:5].pixels(), images[3:5])


def test_only_taking_copies():
    images = ImageInputs(np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1))
    assert np.shares_memory(images[np.array([7, 2])].array, images.array)
    assert np.shares_memory(images[2:].pixels(), images.array)
    for copied in (images.copied(), images[2:].copied(), images[np.array([7, 2])].copied()):
        assert not np.shares_memory(copied.pixels(), images.array)
        assert len(copied.array) == len(copied)


def test_what_is_gathered_of_several_parts_stands_in_the_order_that_was_asked_for():
    whole = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1)
    parts = [ImageInputs(whole[:3]), ImageInputs(whole)[np.arange(3, 9)], ImageInputs(whole[9:])]
    for at in ([9, 0, 4, 3, 9, 2], [5], [1, 0], range(10)):
        np.testing.assert_array_equal(gathered(parts, np.array(at)).pixels(), whole[list(at)])


def test_equal_images_have_equal_digests_wherever_they_lie():
    def digest(inputs):
        state = hashlib.sha256()
        inputs.hash_into(state)
        return state.hexdigest()

    images = ImageInputs(np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1))
    assert digest(images[np.array([3, 4])]) == digest(images[3:5]) == digest(images[3:5].copied())
    assert digest(images[np.array([4, 3])]) != digest(images[3:5])


@needs_linux
def test_another_process_reads_the_same_memory():
    images = shared()
    sent = pickle.dumps(ImageInputs(images)[np.array([3, 7])].shared())
    assert len(sent) < 1000
    images[7] = 77  # after the handle was made: nothing was copied
    read = subprocess.run([sys.executable, "-c", READ], input=sent, capture_output=True)
    assert read.stdout.decode().split("\n")[0] == "2 (2, 2, 3) [3, 77] [77]", read.stderr.decode()


@needs_linux
def test_what_is_not_there_is_told():
    here = Handle.of(shared())
    for elsewhere in (replace(here, name="another"), replace(here, pid=2**22 + 1), replace(here, place=10**6)):
        with pytest.raises(NotHere):
            elsewhere.open()


@needs_linux
def test_the_memory_goes_with_the_array():
    images = shared()
    handle = Handle.of(images)
    path = f"/proc/self/fd/{handle.place}"
    assert handle.name in os.readlink(path)
    del images
    assert not os.path.exists(path) or handle.name not in os.readlink(path)


def test_only_whole_arrays_that_were_made_to_be_shared_have_a_handle():
    images = shared()
    assert Handle.of(np.zeros((4, 2, 2, 3), np.uint8)) is None
    assert Handle.of(images[:5]) is None
    assert Handle.of(images[::-1]) is None
    assert empty((0, 2, 2, 3)).shape == (0, 2, 2, 3)


def test_images_lie_in_ordinary_memory_where_the_system_has_no_other(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    images = shared()
    assert images[3].max() == 3
    assert Handle.of(images) is None
