"""`run.model`, `fedprompt predict` and `fedprompt export`: what was trained can be used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from api_settings import settings
from commands import cli
from PIL import Image
from safetensors.torch import load_file

import fedprompt as fp
from fedprompt.algorithms.base import State
from fedprompt.client.evaluate import predict
from fedprompt.client.examples import Examples
from fedprompt.data.inputs import ImageInputs
from fedprompt.runtime.build import build_model, divided_data
from fedprompt.runtime.checkpoints.store import store_of

ROOT = Path(__file__).parents[2]
KINDS = ("prompt", "deep", "pool", "none")
# timm as fedprompt gets it where torch and torchvision do not match; the example itself needs timm alone
TIMM = "from fedprompt.models.weights.timm_import import import_timm; import_timm(); import runpy, sys\n"


def one_round(folder, *overrides):
    """A run of one round."""
    return fp.run(settings("federation.rounds=1", *overrides), output=folder, local=True)


@pytest.fixture
def files(tmp_path, images):
    """The images as files, with something that is none beside them."""
    folder = tmp_path / "images" / "below"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:02d}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_model_scores_the_test_set_as_the_run_did(finished):
    data, model = divided_data(finished.config), finished.model("last")
    split = data.test.take(np.arange(len(data.test)))
    labels, probabilities = model.predict(split.inputs.pixels())
    right = np.mean([label == data.class_names[true] for label, true in zip(labels, split.labels, strict=True)])
    assert right == pytest.approx(finished.result["final"]["accuracy"])
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert model.classes == data.class_names
    assert not model.training
    assert isinstance(model, torch.nn.Module)


def test_the_best_round_is_the_default_and_only_kept_rounds_are_there(finished):
    assert finished.model().round == finished.result["best"]["round"]
    assert finished.model("last").round == 3
    assert finished.model(2).round == 2
    assert set(finished.rounds) <= {1, 2, 3}
    for wrong in (0, 99, "worst", None, True):
        with pytest.raises(fp.InputError, match=r"^round: found .*allowed: best, last"):
            finished.model(wrong)


def test_arrays_pictures_and_files_give_the_same_predictions(finished, images, files):
    model = finished.model()
    _, expected = model.predict(images)
    paths = sorted(files.glob("*.png"))
    grey, opened = images[..., 0], [Image.open(path) for path in paths]
    for same in (grey, torch.from_numpy(images), list(images), opened, paths, [str(path) for path in paths]):
        np.testing.assert_allclose(model.predict(same)[1], expected, atol=1e-6)
    larger = np.zeros((1, 40, 30, 3), dtype=np.uint8)
    _, mixed = model.predict([*images[:2], larger[0]])  # of different sizes
    assert mixed.shape == (3, 10)
    assert model.predict([]) == ([], pytest.approx(np.zeros((0, 10))))
    for wrong in (images.astype(float), images[0, 0, 0], [np.zeros((4, 4, 2), np.uint8)], [files / "notes.txt"]):
        with pytest.raises(fp.InputError):
            model.predict(wrong)


def test_clients_have_models_of_their_own_where_the_run_gave_them_some(tmp_path, finished, images):
    personal = one_round(tmp_path / "r", "algorithm.name=fedavg", "head.personal=true")
    state: State = store_of(None, personal.folder).latest().state
    client, store = next((client, store) for client, store in state.clients.items() if store)
    own = personal.model("last", client=client)
    assert own.client == client
    assert all(torch.equal(own.params[name].cpu(), value) for name, value in store.items() if name in own.params)
    assert not np.allclose(own.predict(images)[1], personal.model("last").predict(images)[1])
    with pytest.raises(fp.InputError, match=r"^client: found 6; allowed: 0 to 5"):
        personal.model(client=6)
    with pytest.raises(fp.InputError, match=r"^client: 0, but 'fedavg' has one model for all"):
        finished.model(client=0)
    local = one_round(tmp_path / "local", "algorithm.name=local")
    with pytest.raises(fp.InputError, match=r"^client: 'local' trains a model per client"):
        local.model()
    assert local.model("last", client=1).predict(images)[1].shape == (20, 10)


def test_prototypes_and_black_boxes_predict_too(tmp_path, images):
    run = one_round(tmp_path / "r", "algorithm.name=fedbbpt", "prompt.channels=2")
    labels, _ = run.model("last").predict(images)
    model = build_model(run.config, 10, divided_data(run.config).public.take(np.arange(80)))
    none = np.zeros(20, dtype=np.int64)
    params = store_of(None, run.folder).latest().state.params
    said = predict(model, params, Examples(none, none, ImageInputs(images)), run.config.local.batch_size)
    assert labels == [str(i) for i in said.predicted]


def test_predict_prints_a_line_per_image(finished, files, images, capsys):
    assert cli("predict", finished.folder, files.parent, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels, probabilities = finished.model().predict(images)
    assert [line["label"] for line in lines] == labels
    np.testing.assert_allclose([line["probability"] for line in lines], probabilities.max(1), atol=1e-5)
    assert cli("predict", finished.folder, files / "00.png", "--round", "last") == 0
    assert str(files / "00.png") in capsys.readouterr().out


def test_predict_names_what_is_no_image_and_predicts_the_rest(finished, files, capsys):
    assert cli("predict", finished.folder, files / "notes.txt", files / "01.png") == 2
    out, err = capsys.readouterr()
    assert "01.png" in out
    assert len(err.splitlines()) == 1
    assert "notes.txt: no readable image" in err
    empty = files / "empty"
    empty.mkdir()
    for wrong, line in ((files / "none.png", "no such file"), (empty, "no image in it or below")):
        assert cli("predict", finished.folder, wrong) == 2
        assert line in capsys.readouterr().err
    assert cli("predict", files, files / "01.png") == 2
    assert "no run in it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_predicts_alike_in_plain_torch_and_timm(tmp_path, kind, images):
    method = "pfpt" if kind == "pool" else "fedavg"
    head = "linear" if kind == "deep" else "mlp"
    small = ("prompt.length=3", f"prompt.kind={kind}", f"head.kind={head}", f"algorithm.name={method}")
    run = one_round(tmp_path / "r", *small)
    assert cli("export", run.folder, "--output", tmp_path / "e") == 0
    np.save(tmp_path / "images.npy", images)
    exported, given, said = (str(tmp_path / name) for name in ("e", "images.npy", "said.npz"))
    code = TIMM + (
        f"module = runpy.run_path({str(ROOT / 'examples' / 'load_export.py')!r})\n"
        "import numpy as np\n"
        f"names, shares = module['ExportedModel']({exported!r}).predict(np.load({given!r}))\n"
        f"np.savez({said!r}, names=names, shares=shares)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    labels, probabilities = run.model().predict(images)
    answer = np.load(said)
    assert list(answer["names"]) == labels
    np.testing.assert_allclose(answer["shares"], probabilities, atol=1e-5)
    assert "fedprompt" not in (ROOT / "examples" / "load_export.py").read_text().partition('"""\n')[2]


def test_an_export_of_a_pooled_model_predicts_alike_and_others_are_refused(tmp_path, images):
    code = (
        TIMM
        + "module = runpy.run_path(sys.argv[1]); import numpy as np; model = module['ExportedModel'](sys.argv[2])\n"
    )
    code += "np.save(sys.argv[3], model(np.load(sys.argv[4])).numpy())\n"
    np.save(tmp_path / "images.npy", images)
    for name, size, allowed in (("test_vit3", 32, True), ("eva02_tiny_patch14_224", 28, False)):
        backbone = (f"backbone.name={name}", f"backbone.image_size={size}")
        run = one_round(tmp_path / name, *backbone, "prompt.kind=deep", "prompt.length=3", "algorithm.name=fedavg")
        assert cli("export", run.folder, "--output", tmp_path / f"{name}-e") == 0
        files = [
            ROOT / "examples" / "load_export.py",
            tmp_path / f"{name}-e",
            tmp_path / "said",
            tmp_path / "images.npy",
        ]
        done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True)
        assert (done.returncode == 0) == allowed, done.stderr
        if allowed:
            expected = run.model()(images).cpu().numpy()
            np.testing.assert_allclose(np.load(tmp_path / "said.npy"), expected, atol=1e-4)
        else:
            assert "allowed: those of timm's class VisionTransformer" in done.stderr


def test_an_export_tells_what_it_is_and_replaces_only_its_own(tmp_path, finished, capsys):
    output = tmp_path / "e"
    assert cli("export", finished.folder, "--output", output) == 0
    assert cli("export", finished.folder, "--output", output, "--round", "last") == 0
    about, card = json.loads((output / "model.json").read_text()), (output / "README.md").read_text()
    assert about["round"] == 3
    assert about["classes"] == list("0123456789")
    for told in ("fedavg", "digits", "3 of 3", f"{finished.result['final']['accuracy']:.1%}"):
        assert told in card
    trained = load_file(output / "trained.safetensors")
    assert trained.keys() == finished.model().params.keys()
    shutil.rmtree(output)
    output.mkdir()
    (output / "README.md").write_text("mine")
    assert cli("export", finished.folder, "--output", output) == 2
    assert (output / "README.md").read_text() == "mine"
    assert "README.md was not written by fedprompt export" in capsys.readouterr().err
