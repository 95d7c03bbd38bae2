"""Files of tensors from elsewhere: nothing in them is executed, and they take no more memory than they are long."""

import io
import zipfile

import pytest
import torch
from torch.torch_version import TorchVersion

from fedprompt.errors import InputError
from fedprompt.models.weights.torch_files import load_plain
from fedprompt.runtime.checkpoints.file import Checkpoint, State, encoded
from fedprompt.runtime.checkpoints.store import CheckpointStore


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer


def rezipped(buffer, change):
    """The same archive with ``change(name, data) -> (name, data, compression)`` of every part."""
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(made, "w") as after:
        for entry in before.infolist():
            name, data, compression = change(entry.filename, before.read(entry))
            after.writestr(name, data, compression)
    return made


def compressed(name, data):
    return name, data, zipfile.ZIP_DEFLATED


def test_what_was_saved_comes_back():
    read = load_plain(saved({"a": torch.arange(3), "b": {"c": 1.5, "d": "text"}}))
    assert torch.equal(read["a"], torch.arange(3))
    assert read["b"] == {"c": 1.5, "d": "text"}


def test_an_archive_that_swells_when_it_is_read_is_refused():
    bomb = rezipped(saved({"a": torch.zeros(10_000_000)}), compressed)
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(ValueError, match="compressed"):
        load_plain(bomb)


def test_parts_that_lie_on_each_other_are_refused():
    content = bytearray(saved({"a": torch.zeros(1000), "b": torch.ones(1000)}).getvalue())
    directory = content.rfind(b"PK\x01\x02")  # the last entry of the directory: make it as long as two of them
    size = int.from_bytes(content[directory + 20 : directory + 24], "little")
    for at in (20, 24):
        content[directory + at : directory + at + 4] = (size + len(content)).to_bytes(4, "little")
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        load_plain(io.BytesIO(bytes(content)))


def test_damaged_values_are_noticed():
    content = bytearray(saved({"a": torch.rand(1000)}).getvalue())
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="wrong checksum"):
        load_plain(io.BytesIO(bytes(content)))


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1", "2.9.1+cu128"])
def test_a_torch_that_could_be_made_to_run_code_reads_no_file(monkeypatch, tmp_path, version):
    store = CheckpointStore(str(tmp_path))
    store.save(Checkpoint(1, State({"prompt": torch.zeros(2)})))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(InputError, match=rf"torch {version[:5]}.*; allowed: torch 2\.10 or newer"):
        store.latest()


def test_a_compressed_checkpoint_is_damaged(tmp_path):
    bomb = rezipped(io.BytesIO(encoded(Checkpoint(1, State({"prompt": torch.zeros(10**6)})))), compressed)
    (tmp_path / "round_000001.pt").write_bytes(bomb.getvalue())
    with pytest.raises(InputError, match=r"not a readable checkpoint .a part of it is compressed"):
        CheckpointStore(str(tmp_path)).latest()
