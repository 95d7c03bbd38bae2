"""The tracking room: what is written can be read back, and a resume leaves no trace of what no longer counts."""

import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY

from fedprompt.config.parsing import load
from fedprompt.config.schema import Config, TrackingSection
from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking import Progress, Tracker, files, metrics, plots, progress, tracker
from fedprompt.tracking.plots import accuracy_figure, partition_figure, pixels, save, trajectory_figure
from fedprompt.tracking.pools import SNAPSHOTS, PoolSnapshots, load_pools
from fedprompt.tracking.tensorboard import scalar_tags
from fedprompt.tracking.tracking import Tracking

COUNTS = np.array([[5, 0, 2], [0, 7, 0], [1, 1, 40], [0, 0, 3]])
NAMES = ["coat", "bag", "boot"]


def evaluation(accuracy):
    return {"accuracy": accuracy, "balanced_accuracy": accuracy / 2, "macro_f1": 0.1, "loss": 1.5}


def record(round):
    """A full record whose numbers tell its round."""
    return {
        "round": round,
        "cohort": [4, 7],
        "train": {"loss": 2.0 / (round + 1), "penalty": 0.01},
        "aggregate": {"pool_size": 6.0 + round, "drift": 0.25},
        "validation": evaluation(0.05 * round),
        "test": {**evaluation(0.06 * round), "per_class": [0.0, 0.5, math.nan]},
        "clients": {"mean_accuracy": 0.4, "worst_decile_accuracy": None},
        "communication": {"up_bytes": 100 * round, "down_bytes": 1},
        "seconds": {"train": 1.0, "total": 3.0},
        "warnings": ["the pool has grown"] if round == 2 else [],
    }


def pool_of(round):
    """A pool [6 + round, 8] whose prompts are all different."""
    return torch.arange((6 + round) * 8, dtype=torch.float32).reshape(-1, 8).sin() + round


def track(output, rounds, resume_round=None, finish=True, config=Config()):  # noqa: B008
    tracker = Tracking(output, config, resume_round=resume_round)
    tracker.start(COUNTS, NAMES, "seed: 0")
    for round in rounds:
        tracker.round(record(round), {"pool": pool_of(round), "query_proj": torch.eye(8)})
    if finish:
        tracker.finish({"algorithm": "pfpt", "final": {"accuracy": np.float32(0.5), "loss": math.nan}})
    else:
        tracker.close()
    return tracker


def events(output):
    accumulator = EventAccumulator(str(output / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0})
    return accumulator.Reload()


def steps_and_values(output, tag):
    return [(event.step, event.value) for event in events(output).Scalars(tag)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    track(output, range(4))
    return output


# --- metrics.jsonl


def test_a_record_is_read_back_as_written_with_nan_as_null(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"round": 1, "test": {"accuracy": np.float64(0.25), "per_class": np.array([0.5, math.inf])}})
    file.append({"round": np.int64(2), "train": {"loss": math.nan, "penalty": torch.tensor(3.0)}})
    assert metrics.read(file.path) == [
        {"round": 1, "test": {"accuracy": 0.25, "per_class": [0.5, None]}},
        {"round": 2, "train": {"loss": None, "penalty": 3.0}},
    ]


def test_each_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    for round in range(3):
        file.append({"round": round})
        assert [line["round"] for line in map(json.loads, file.path.read_text().splitlines())] == list(range(round + 1))


@pytest.mark.parametrize("torn", ['{"round": 3, "train": {"lo', "{", '{"round": 3, "name": "caf\udcc3', "17"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 1}\n{"round": 2}\n' + torn.encode(errors="surrogateescape"))
    assert [line["round"] for line in metrics.read(path)] == [1, 2]


def test_a_corrupt_line_elsewhere_is_an_input_error_that_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: found .*rou"):
        metrics.read(path)


def test_a_missing_metrics_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: not found"):
        metrics.read(tmp_path / "nowhere.jsonl")


def test_resume_drops_later_rounds_and_the_torn_line_and_then_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n{"round": 1}\n{"round": 2, "old": 1}\n{"round": 3}\n{"rou')
    metrics.MetricsFile.resume(path, last_round=1).append({"round": 2, "old": 0})
    assert metrics.read(path) == [{"round": 0}, {"round": 1}, {"round": 2, "old": 0}]
    assert path.read_text().count("\n") == 3


# --- TensorBoard


def test_every_number_of_a_record_has_a_tidy_tag_and_none_is_left_out():
    assert scalar_tags(files.plain(record(3))) == {
        "loss/train": 0.5,
        "penalty/train": 0.01,
        "pool/size": 9.0,
        "matching/drift": 0.25,
        "accuracy/validation": pytest.approx(0.15),
        "balanced_accuracy/validation": pytest.approx(0.075),
        "macro_f1/validation": 0.1,
        "loss/validation": 1.5,
        "accuracy/test": pytest.approx(0.18),
        "balanced_accuracy/test": pytest.approx(0.09),
        "macro_f1/test": 0.1,
        "loss/test": 1.5,
        "clients/mean_accuracy": 0.4,
        "communication/up_bytes": 300,
        "communication/down_bytes": 1,
        "seconds/train": 1.0,
        "seconds/total": 3.0,
    }


def test_scalars_are_in_the_event_file_at_their_rounds(finished):
    assert steps_and_values(finished, "accuracy/test") == [(r, pytest.approx(0.06 * r)) for r in range(4)]
    assert steps_and_values(finished, "pool/size") == [(r, 6.0 + r) for r in range(4)]
    assert "clients/worst_decile_accuracy" not in events(finished).Tags()["scalars"]


def test_prompt_histograms_count_every_value_of_the_pool(finished):
    histograms = events(finished).Histograms("prompts/pool")
    assert [event.step for event in histograms] == [0, 1, 2, 3]
    for round, event in enumerate(histograms):
        values = pool_of(round)
        histogram = event.histogram_value
        assert sum(histogram.bucket) == histogram.num == values.numel()
        assert (histogram.min, histogram.max) == (
            pytest.approx(values.min().item()),
            pytest.approx(values.max().item()),
        )
    assert len(events(finished).Histograms("prompts/query_proj")) == 4
    per_class = events(finished).Histograms("per_class_accuracy/test")[0].histogram_value
    assert per_class.num == 2, "the class without a test image (NaN) has no accuracy"


def test_figures_are_images_in_tensorboard(finished):
    for tag, step in (("partition", 0), ("accuracy", 3), ("trajectory", 3)):
        (image,) = events(finished).Images(f"figures/{tag}")
        with Image.open(finished / f"{tag}.png") as png:
            assert (image.step, image.width, image.height) == (step, *png.size)


def test_configuration_and_warnings_are_text(finished):
    def texts(tag):
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events(finished).Tensors(tag)]

    assert texts("warnings/text_summary") == [(2, "the pool has grown")]
    ((step, text),) = texts("config/text_summary")
    assert step == 0
    assert "seed: 0" in text


def test_the_projector_holds_the_prompts_of_all_rounds_with_their_labels(finished):
    folder = finished / "tensorboard"
    config = (folder / "projector_config.pbtxt").read_text()
    assert '"projector/tensors.tsv"' in config
    assert '"projector/metadata.tsv"' in config
    expected = np.concatenate([pool_of(round).numpy() for round in range(4)])
    np.testing.assert_allclose(np.loadtxt(folder / "projector/tensors.tsv"), expected, rtol=1e-4)
    header, *labels = (folder / "projector/metadata.tsv").read_text().splitlines()
    assert header == "round\tprompt"
    assert labels == [f"{round}\t{prompt}" for round in range(4) for prompt in range(6 + round)]


def test_prompts_that_are_not_finite_do_not_stop_the_tracker(tmp_path):
    tracker = Tracking(tmp_path, Config())
    tracker.round({"round": 0}, {"pool": torch.full((3, 8), math.nan)})
    tracker.round({"round": 1}, {"pool": torch.cat([torch.full((1, 8), math.inf), torch.eye(8)[:3]])})
    tracker.finish({})
    assert len((tmp_path / "tensorboard/projector/metadata.tsv").read_text().splitlines()) == 1 + 3
    assert [event.step for event in events(tmp_path).Histograms("prompts/pool")] == [1]


# --- resume


def test_a_resumed_run_reads_like_one_that_was_never_interrupted(tmp_path):
    track(tmp_path / "whole", range(6))
    broken = tmp_path / "broken"
    tracker = track(broken, range(3), finish=False)
    lost = Tracking(broken, Config(), resume_round=2)  # these two rounds came after the last checkpoint
    for round in (3, 4):
        lost.round({"round": round, "train": {"loss": -1.0}}, {"pool": pool_of(0) - 100})
    lost.close()
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"round": 5, "tr')
    tracker = track(broken, range(3, 6), resume_round=2)

    whole = tmp_path / "whole"
    assert metrics.read(tracker.output / "metrics.jsonl") == metrics.read(whole / "metrics.jsonl")
    for tag in events(whole).Tags()["scalars"]:
        assert steps_and_values(broken, tag) == steps_and_values(whole, tag)
    assert [event.step for event in events(broken).Histograms("prompts/pool")] == list(range(6))
    assert [event.step for event in events(broken).Images("figures/partition")] == [0]
    for name in ("projector/tensors.tsv", "projector/metadata.tsv"):
        assert (broken / "tensorboard" / name).read_bytes() == (whole / "tensorboard" / name).read_bytes()
    assert np.array_equal(np.asarray(Image.open(broken / "trajectory.png")), Image.open(whole / "trajectory.png"))


def test_starting_afresh_removes_what_an_earlier_run_left_and_nothing_else(tmp_path):
    track(tmp_path, range(5))
    (tmp_path / "notes.txt").write_text("mine")
    track(tmp_path, range(2), finish=False)
    assert [line["round"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1]
    assert [step for step, _ in steps_and_values(tmp_path, "accuracy/test")] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "pools").iterdir()) == ["round_0000.npy", "round_0001.npy"]
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- pool snapshots


def test_snapshots_are_bounded_and_evenly_spread_and_keep_both_ends(tmp_path):
    snapshots = PoolSnapshots(tmp_path, None)
    for round in range(200):
        if round == 137:
            snapshots = PoolSnapshots(tmp_path, 136)
        snapshots.add(round, np.full((2, 3), round))
    pools = load_pools(tmp_path)
    rounds = sorted(pools)
    assert len(rounds) == len(list(tmp_path.iterdir())) == SNAPSHOTS
    assert (rounds[0], rounds[-1]) == (0, 199)
    assert np.diff(rounds).max() <= 2 * 200 / SNAPSHOTS
    assert all((pool == round).all() for round, pool in pools.items())


def test_a_resume_drops_the_snapshots_of_later_rounds(tmp_path):
    snapshots = PoolSnapshots(tmp_path, None)
    for round in range(5):
        snapshots.add(round, np.ones((2, 3)))
    PoolSnapshots(tmp_path, 2)
    assert list(load_pools(tmp_path)) == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_snapshot_warns_and_is_left_out(tmp_path):
    snapshots = PoolSnapshots(tmp_path, None)
    snapshots.add(0, np.ones((2, 3)))
    snapshots.add(1, np.ones((2, 3)))
    (tmp_path / "round_0000.npy").write_bytes(b"\x93NUMPY")
    with pytest.warns(UserWarning, match=r"round_0000\.npy cannot be read"):
        assert list(load_pools(tmp_path)) == [1]


# --- result.json and failing disks


def test_result_json_holds_plain_numbers(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result == {"algorithm": "pfpt", "final": {"accuracy": 0.5, "loss": None}}


def test_a_full_disk_leaves_the_old_result_whole_and_surfaces_as_os_error(tmp_path, monkeypatch):
    tracker = track(tmp_path, range(2))
    before = (tmp_path / "result.json").read_bytes()
    tracker = Tracking(tmp_path, Config(), resume_round=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tracker.finish({"algorithm": "another"})
    assert (tmp_path / "result.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' always-full device")
def test_a_metrics_line_that_does_not_fit_surfaces_as_os_error(tmp_path):
    tracker = Tracking(tmp_path, Config())
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        tracker.round(record(1), {})


def test_an_output_that_cannot_be_a_folder_surfaces_as_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Tracking(tmp_path / "file" / "run", Config())


# --- a run without prompts, or without rounds


def test_a_method_without_prompts_has_no_trajectory(tmp_path):
    tracker = Tracking(tmp_path, Config())
    tracker.round({"round": 1, "cohort": [0], "train": {"loss": 1.0}}, {})
    tracker.finish({})
    assert (tmp_path / "accuracy.png").exists()
    assert not (tmp_path / "trajectory.png").exists()


def test_deep_half_precision_prompts_are_kept_as_rows(tmp_path):
    tracker = Tracking(tmp_path, Config())
    tracker.round({"round": 0}, {"prompt": torch.ones(3, 2, 8, dtype=torch.bfloat16, requires_grad=True)})
    tracker.close()
    assert np.load(tmp_path / "pools" / "round_0000.npy").shape == (6, 8)


# --- progress


def run_progress(enabled):
    code = (
        "from fedprompt.tracking import Progress\n"
        f"p = Progress(10, enabled={enabled})\n"
        "p.update({'round': 4, 'test': {'accuracy': 0.712}, 'aggregate': {'pool_size': 17.0}})\n"
        "p.note('pool fell to k')\n"
        "p.update({'round': 5, 'warnings': ['w']})\n"
        "p.close()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_progress_says_nothing_but_notes_where_there_is_no_terminal():
    done = run_progress(enabled=None)
    assert done.stdout == ""
    assert done.stderr == "pool fell to k\nfedprompt: round 5: w\n"


def test_a_warning_is_printed_once_while_it_lasts(capsys):
    progress = Progress(9, enabled=False)
    shrunk = "the pool has shrunk to {} prompts"
    rounds = [[shrunk.format(4)], [shrunk.format(3), "w"], ["w"], [], ["w"], [shrunk.format(3)]]
    for round, warnings in enumerate(rounds):
        progress.update({"round": round, "warnings": warnings})
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "fedprompt: round 0: the pool has shrunk to 4 prompts",
        "fedprompt: round 1: w",
        "fedprompt: round 4: w",
        "fedprompt: round 5: the pool has shrunk to 3 prompts",
    ]


@pytest.fixture
def lines():
    """Lines of a run of 10 rounds, and the clock that they read; ``clock.said``: what they say."""

    class Clock:
        now = 0.0

    clock = Clock()
    clock.said = []
    return progress.Lines(10, clock.said.append, clock=lambda: clock.now), clock


def test_every_stage_before_the_first_round_is_a_line(lines):
    told, clock = lines
    told.stage("loading the data")
    told.stage("loading the model")
    assert clock.said == ["loading the data", "loading the model"]


@pytest.mark.parametrize(("seconds", "said"), [(10, [6]), (25, [2, 5]), (60, [1, 2, 3, 4, 5, 6, 7]), (0.1, [])])
def test_a_line_per_round_or_minute_whichever_is_rarer(lines, seconds, said):
    told, clock = lines
    for round in range(1, 8):
        clock.now += seconds / 2
        told.tick()
        clock.now += seconds / 2
        told.update({"round": round}, {"test": "50.0%"})
    rounds = [line for line in clock.said if "under way" not in line]
    assert [int(line.removeprefix("round ").partition("/")[0]) for line in rounds] == said
    assert all("test 50.0%" in line for line in rounds)
    assert len(clock.said) <= clock.now / 60


def test_a_round_longer_than_a_minute_is_told_of_once_a_minute(lines):
    told, clock = lines
    told.update({"round": 1}, {})
    for _ in range(200):
        clock.now += 1
        told.tick()
    assert clock.said == ["round 1/10", "round 2/10: under way for 2 min", "round 2/10: under way for 3 min"]


def test_a_line_says_how_much_time_is_left(lines):
    told, clock = lines
    for round in (4, 5, 6):  # of a run that was resumed
        told.update({"round": round}, {})
        clock.now += 90
    assert clock.said[-1] == "round 6/10, about 6 min left"


def test_a_bar_names_the_stage_until_the_first_round(capsys):
    bar = Progress(10, enabled=True)
    bar.stage("loading the data")
    assert "loading the data" in capsys.readouterr().err.split("\r")[-1]
    bar.update({"round": 0})
    bar.close()
    assert "loading" not in capsys.readouterr().err.split("\r")[-1]


def test_progress_shows_round_accuracy_and_pool_size():
    done = run_progress(enabled=True)
    assert done.stdout == ""
    assert "pool fell to k\n" in done.stderr
    last = done.stderr.split("\r")[-1]
    for shown in ("5/10", "test=71.2%", "pool=17"):
        assert shown in last, f"{shown} of an earlier round is still shown"


def test_progress_follows_a_run_that_restarts_from_a_checkpoint(capsys):
    bar = Progress(10, enabled=True)
    for round in (1, 2, 3, 2):
        bar.update({"round": round})
    bar.close()
    assert "2/10" in capsys.readouterr().err.split("\r")[-1]


# --- figures


@pytest.mark.parametrize(("clients", "classes"), [(5, 10), (200, 10), (20, 100), (1, 1)])
def test_a_partition_figure_colours_a_cell_where_there_are_samples(clients, classes):
    counts = np.zeros((clients, classes), dtype=int)
    counts[-1, 0] = 9
    figure = partition_figure(counts, [f"class {index}" for index in range(classes)])
    heat = figure.axes[1]
    shown = heat.images[0].get_array()
    assert shown.shape == (classes, clients)
    assert np.argwhere(~np.ma.getmaskarray(shown)).tolist() == [[0, clients - 1]]
    assert [bar.get_height() for bar in figure.axes[0].patches] == counts.sum(1).tolist()
    assert pixels(figure).std() > 0


@pytest.mark.filterwarnings("error")
def test_class_names_are_drawn_letter_by_letter(tmp_path):
    names = ["$x^_$", "$10", "a\\$b", "\\", "two\nlines", "x" * 500, "\N{DOG FACE}", "犬", "\udcff", "", "_", "%s {0}"]
    figure = partition_figure(np.ones((3, len(names)), dtype=np.int64), names)
    save(figure, tmp_path / "partition.png")
    drawn = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert drawn[:5] == [r"\$x^_\$", r"\$10", r"a\\$b", "\\", r"two\nlines"]  # \$ is drawn as $
    assert len(set(drawn)) == len(names)
    assert max(map(len, drawn)) <= 40


def test_the_accuracy_figure_draws_what_there_is():
    figure = accuracy_figure([{"round": 0, "test": evaluation(0.1)}, record(1), {"round": 2, "train": {"loss": 1.0}}])
    accuracy, loss, pool_size = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines == {"test": [[0, 10.0], [1, 6.0]], "validation": [[1, 5.0]]}
    assert loss.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.0]]
    assert pool_size.lines[0].get_xydata().tolist() == [[1, 7.0]]
    assert len(accuracy_figure([{"round": 0, "test": evaluation(0.1)}]).axes) == 1
    assert len(accuracy_figure([]).axes) == 1


def test_the_trajectory_keeps_the_distances_of_prompts_that_lie_in_a_plane():
    random = np.random.default_rng(0)
    plane, _ = np.linalg.qr(random.normal(size=(16, 2)))
    flat = {round: random.normal(size=(4 + round, 2)) for round in range(3)}
    figure = trajectory_figure({round: points @ plane.T for round, points in flat.items()})
    drawn, expected = np.asarray(figure.axes[0].collections[0].get_offsets()), np.concatenate(list(flat.values()))
    distances = [np.linalg.norm(points[:, None] - points[None], axis=-1) for points in (drawn, expected)]
    np.testing.assert_allclose(*distances, atol=1e-9)
    assert figure.axes[0].collections[0].get_array().tolist() == [0] * 4 + [1] * 5 + [2] * 6


@pytest.mark.filterwarnings("error")
def test_prompts_that_are_all_alike_can_be_drawn():
    pixels(trajectory_figure({0: np.ones((2, 8)), 1: np.ones((2, 8))}))


def test_saved_figures_have_the_size_of_the_figure(tmp_path):
    records = [record(round) for round in range(5)]
    figure, drawn = accuracy_figure(records), accuracy_figure(records)  # a second drawing may move by less than a pixel
    save(figure, tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.format == "PNG"
        assert image.size == tuple(np.rint(figure.get_size_inches() * figure.dpi).astype(int)) == (960, 792)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels(drawn))


def test_drawing_leaves_the_users_matplotlib_alone():
    code = (
        "import sys, matplotlib; matplotlib.use('svg'); matplotlib.rcParams['font.size'] = 7\n"
        "import numpy as np\n"
        "from fedprompt.tracking.plots import partition_figure, pixels\n"
        "pixels(partition_figure(np.eye(3, dtype=int), list('abc')))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'ray' not in sys.modules\n"
        "assert matplotlib.get_backend() == 'svg' and matplotlib.rcParams['font.size'] == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- trackers of other packages


def broken_tracker(function):
    """A registered tracker of which one function raises; it notes what it is told."""
    told = []

    def raising(self, *given):
        raise ConnectionError("no answer\nfrom anywhere")

    def noting(name):
        return lambda self, *given: told.append((name, *given))

    functions = {name: noting(name) for name in ("start", "round", "finish", "close")}
    tracker("theirs", "one of theirs")(type("Theirs", (Tracker,), {**functions, function: raising}))
    return told


def with_theirs():
    return Config(tracking=TrackingSection(trackers=("theirs",)))


def test_a_tracker_gets_the_folder_the_configuration_and_each_round(registries, tmp_path):
    told = broken_tracker("nothing")
    track(tmp_path, range(2), config=with_theirs())
    assert [name for name, *_ in told] == ["start", "round", "round", "finish", "close"]
    assert told[1][1]["test"]["per_class"] == [0.0, 0.5, None]
    assert told[3][1]["final"]["loss"] is None


@pytest.mark.parametrize("function", ["__init__", "start", "round", "finish", "close"])
def test_what_a_foreign_tracker_raises_ends_the_run_with_a_line_that_names_it(registries, tmp_path, function):
    broken_tracker(function)
    with pytest.raises(
        RunFailed, match=rf"tracker 'theirs' .*: {function} raised ConnectionError: no answer from"
    ) as end:
        track(tmp_path, range(2), config=with_theirs())
    assert "\n" not in str(end.value)
    assert "raise ConnectionError" in (tmp_path / "error.txt").read_text()


def test_a_run_with_a_broken_tracker_keeps_its_rounds_and_goes_on_without_it(registries, tmp_path):
    broken_tracker("finish")
    overrides = [*TINY, "algorithm.name=head", "tracking.trackers=[theirs]"]
    with pytest.raises(RunFailed, match="tracker 'theirs'"):
        list(run_in_process(load(None, overrides), tmp_path))
    whole = list(run_in_process(load(None, [*overrides, "tracking.trackers=[]"]), tmp_path))
    assert whole[-1]["result"]["rounds"] == 2
    assert [record["round"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_the_key_of_tensorboard_adds_and_takes_away_that_tracker():
    for given, trackers in {
        "tracking.tensorboard=false": ("figures",),
        "tracking.tensorboard=true": ("figures", "tensorboard"),
        "tracking.trackers=[]": (),
    }.items():
        tracking = load(None, [given]).tracking
        assert (tracking.trackers, tracking.tensorboard) == (trackers, None)
    with pytest.raises(
        InputError, match=r"tracking\.trackers: unknown tracker 'tensorbord' \(did you mean 'tensorboard'"
    ):
        load(None, ["tracking.trackers=[tensorbord]"])
    with pytest.raises(InputError, match="'figures' is there twice"):
        load(None, ["tracking.trackers=[figures,figures]"])


def test_the_figures_of_a_run_are_drawn_once_for_all_trackers(tmp_path, monkeypatch):
    drawn_figures = []

    def counted(name):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *given: drawn_figures.append(name) or draw(*given))

    names = ("partition_figure", "accuracy_figure", "trajectory_figure")
    for name in names:
        counted(name)
    tracking = Tracking(tmp_path, load(None, []))
    tracking.start(np.eye(3, dtype=int), list("abc"), "seed: 0")
    tracking.round(record(1), {"pool": torch.eye(4)})
    tracking.finish({})
    assert {"figures", "tensorboard"} <= set(load(None, []).tracking.trackers)
    assert sorted(drawn_figures) == sorted(names)
    assert {f"{name.removesuffix('_figure')}.png" for name in names} <= {path.name for path in tmp_path.iterdir()}
