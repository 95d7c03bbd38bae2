"""The benchmark for GPUs runs on what a plain installation of torch and timm has, and what it claims holds."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.gpu_clock import waits_per_step
from fedprompt.client.examples import prepare
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.errors import InputError
from fedprompt.models import linear
from fedprompt.models.backbones.compiled import compile_blocks
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.weights.named import create_backbone

# Names under which `import` finds nothing: the rest of fedprompt needs them, this benchmark must not.
ABSENT = ("ray", "pydantic", "click", "pandas", "matplotlib", "sklearn", "scipy", "tensorboard")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what happens without a GPU")


def test_the_quick_version_runs_without_what_torch_and_timm_lack_and_its_numbers_agree(tmp_path):
    hide = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    start = f"sys.argv = ['gpu', '--quick', '--json', {str(tmp_path / 'gpu.json')!r}]"
    code = f"{hide}; {start}; import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["quick"]
    assert [(row["clients"], row["way"]) for row in result["rows"]][:2] == [(2, "as it is"), (3, "as it is")]
    flops = gpu.flops_per_image(ViT(create_backbone("test_vit", "random", 32), 32), gpu.PROMPTS)
    for row in result["rows"]:
        seconds, images = np.median(row["seconds"]), row["clients"] * 32
        assert row["error"] is None
        assert row["images_per_second"] == pytest.approx(images / seconds)
        assert row["utilisation"] == pytest.approx(flops * row["images_per_second"] / result["matrix_tflops"] / 1e12)
        slow = result["obvious"][row["model"]]
        assert row["ratio_to_obvious"] == {p: pytest.approx(row["images_per_second"] / s) for p, s in slow.items()}
        assert f"{row['images_per_second']:.1f}" in done.stdout


@without_gpu
def test_without_a_gpu_it_ends_with_one_line_and_code_2():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "fedprompt: benchmarks.gpu: torch finds no CUDA GPU; allowed: a machine with one, or --quick on any\n"
    )


def test_results_that_could_not_be_written_are_refused_before_anything_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--json", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fedprompt: --json: {tmp_path}: Is a directory; allowed: a file that can be written\n"


@without_gpu
def test_compiling_without_a_gpu_is_refused():
    pytest.importorskip("pydantic")  # all else in this file runs where only torch, timm and pytest are
    from fedprompt.config.parsing import load
    from fedprompt.runtime.build import build_model

    with pytest.raises(InputError, match=r"^runtime\.compile: true needs a GPU"):
        build_model(load(None, ["runtime.compile=true"]), classes=10)


def test_a_row_that_does_not_fit_or_compile_says_so_and_others_go_on():
    def fails(error):
        def measure(row):
            raise error

        return measure

    row = gpu.Row("test_vit", 32, 2, gpu.COMPILED)
    assert gpu._guarded(row, fails(torch.cuda.OutOfMemoryError("much too large"))).error == "out of memory"
    assert gpu._guarded(row, fails(RuntimeError("no compiler\nat all"))).error == "RuntimeError: no compiler"
    with pytest.raises(RuntimeError, match="a mistake"):
        gpu._guarded(gpu.Row("test_vit", 32, 2), fails(RuntimeError("a mistake")))


def test_the_count_of_operations_is_torchs_own(make_vit, monkeypatch):
    monkeypatch.setattr(linear, "_ONEDNN", None)  # torch does not count what oneDNN computes
    backbone = ViT(make_vit(embed_dim=64, depth=3), 28)
    images = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
    prompts = torch.randn(2, 5, 64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # math: plain products, all counted
        backbone.features_from(backbone.embed((images,)).with_prompts(prompts, 1), 0).sum().backward()
    assert 2 * gpu.flops_per_image(backbone, 5) == pytest.approx(counter.get_total_flops(), rel=1e-6)


# --- the hot loop --------------------------------------------------------------------------------------------------

SIZES = (23, 16, 7)  # batches of 8: clients leave at different steps, most batches are ragged


def model_on(vit, device, kind="pool", layer=0):
    options = PromptOptions(kind, length=4, layer=layer, pool_size=6, top_k=3)
    return PromptedModel(ViT(vit, 28, device=device), options, HeadOptions(hidden=16), 5)


class Counting:
    """A rule that counts its steps."""

    def __init__(self):
        self.rule, self.steps = make_rule(LocalOptions()), 0

    def start(self, *given):
        return self.rule.start(*given)

    def step(self, *given):
        self.steps += 1
        return self.rule.step(*given)

    def finish(self, *given):
        return self.rule.finish(*given)


def work(model, make_examples, epochs, keep_tokens=False):
    """Tasks, data and training of three clients; the features are computed on the CPU."""
    start = model.init(np.random.default_rng(0))
    data = [prepare(model, make_examples(n, seed=n), keep_tokens) for n in SIZES]
    tasks = [Task(client, start, epochs) for client in range(len(SIZES))]
    return tasks, data, Training(Counting(), 8, lambda name: True, seed=0, round=0)


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool", "adapter"])
def test_no_step_reads_anything_back_from_the_device(make_vit, make_examples, kind):
    """On the meta device nothing can be read back: the loop must get to its end before it stumbles."""
    tasks, data, training = work(model_on(make_vit(), "cpu", kind), make_examples, epochs=2)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        train_group(model_on(make_vit(), "meta", kind), tasks, data, training)
    assert training.rule.steps == 6  # two epochs of three batches of the largest client


def test_no_step_sends_anything_to_the_device(make_vit, make_examples, monkeypatch):
    model = model_on(make_vit(), "cpu", layer=1)  # tokens are kept: images on the CPU are read where they lie
    sent = []
    for name in ("tensor", "from_numpy", "as_tensor"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: sent.append(1) or original(*a, **k))
    counts = []
    for epochs in (1, 4):
        tasks, data, training = work(model, make_examples, epochs, keep_tokens=True)
        sent.clear()
        train_group(model, tasks, data, training)
        counts.append(len(sent))
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_groups_train_to_the_cpus_params_and_no_step_waits(make_vit, make_examples, compiled):
    on_cpu, on_gpu = model_on(make_vit(), "cpu", "prompt"), model_on(make_vit(), "cuda", "prompt")
    if compiled:
        compile_blocks(on_gpu.backbone)
    expected, updates = (train_group(model, *work(model, make_examples, epochs=2)) for model in (on_cpu, on_gpu))
    for one, other in zip(expected, updates, strict=True):
        for name, value in one.params.items():
            torch.testing.assert_close(value, other.params[name], atol=2e-4, rtol=0)
    assert waits_per_step(lambda epochs: train_group(on_gpu, *work(on_gpu, make_examples, epochs)), steps=1) == 0


def test_compiled_blocks_train_to_the_same_params_in_groups_that_shrink(make_vit, make_examples):
    """By the tracing half of torch.compile, which needs no GPU; the generated kernels are torch's own affair."""
    plain, compiled = model_on(make_vit(), "cpu"), model_on(make_vit(), "cpu")
    runs = []
    compile_blocks(compiled.backbone, backend=(seen := Backend()))
    for model in (plain, compiled):
        runs.append(train_group(model, *work(model, make_examples, epochs=2)))
    assert 0 < seen.graphs <= 4  # not one for each of the many numbers of images
    for one, other in zip(*runs, strict=True):
        for name, value in one.params.items():
            torch.testing.assert_close(value, other.params[name], atol=2e-5, rtol=0)


class Backend:
    """Runs what torch.compile traced as it is, and counts the graphs."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph
