"""Anyone's model can be evaluated: ours from elsewhere, timm's with weights, a function's; what does not fit is one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advml import config
from advml.data.datasets import Dataset
from advml.errors import UserError
from advml.evaluation import samples
from advml.networks.backbones import create_encoder
from advml.networks.given import Given, Wishes, load
from advml.stages import evaluate, finetune, pretrain

SPEC = config.Model(backbone="resnet18", stem="small", options={}, projection_size=8, normalize_logits=False, batch_norm="single")
MODULE = """
import torch
from torch import nn

def good():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).train()

def normed():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))

class Reshaping(nn.Module):
    encoder = "a word"

    def __init__(self, temperature=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.temperature = nn.Linear(64, 4), temperature

    def forward(self, images):
        return self.linear(images.view(len(images), -1)) / self.temperature

def reshaping():
    return Reshaping()

def colder():
    return Reshaping(0.1)

class Rounding(Reshaping):
    def forward(self, images):
        images.mul_(4).round_()
        return super().forward(images.long().float())

def rounding():
    return Rounding()

def leaving():
    raise SystemExit("bye")

def lost():
    return {}["key"]

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

def nothing():
    class Nothing(Reshaping):
        def forward(self, images):
            return super().forward(images) * float("nan")
    return Nothing()

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(65, 4))

def number():
    return 7

def broken():
    raise RuntimeError("no such\\nfile")
"""


def found(target: str, dataset: Dataset, **how) -> Given:
    return load(target, Wishes(**how), spec=SPEC, dataset=dataset)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("somebodys", None)


def test_a_function_gives_a_model_in_eval_mode_with_a_digest_of_its_weights(here, dataset):
    path, given = list(sys.path), found("somebodys:good", dataset)
    assert given.name == "somebodys-good" and not given.network.training and sys.path == path
    assert given.digest == found("somebodys:good", dataset).digest and given.scheme is None
    with torch.no_grad():
        given.network.module[1].weight[0, 0] += 1
    from advml.networks.given import _digest

    assert _digest(given.network) != given.digest


@pytest.mark.parametrize(
    ("target", "said"),
    {
        "somebodys:nobody": "gives no model: AttributeError",
        "nowhere:good": "gives no model: ModuleNotFoundError",
        "somebodys:broken": "gives no model: RuntimeError: no such file",
        "somebodys:leaving": "gives no model: SystemExit: bye",
        "somebodys:lost": "gives no model: KeyError",
        "somebodys:lazy": "uninitialised parameters; call it on some images",
        "somebodys:nothing": "nothing but NaN or infinities",
        "somebodys:number": "returns int; it must return a torch module",
        "somebodys:narrow": r"gives \(2, 3\) for 2 images; the prepared data need \(2, 4\)",
        "somebodys:large": "somebodys:large fails on a batch of 2x1x8x8 images",
        "nonsense": "there is no model 'nonsense'; give a folder",
        "resnet18": "add --weights",
    }.items(),
)
def test_what_is_no_model_or_does_not_fit_is_one_line(here, dataset, target, said):
    with pytest.raises(UserError, match=said) as stopped:
        found(target, dataset)
    assert "\n" not in str(stopped.value)


@pytest.fixture
def weights(tmp_path):
    network, _ = create_encoder("test_resnet", stem="small", channels=1, image_size=8, options={}, classes=4)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "mine.safetensors")
    return network.eval(), tmp_path / "mine.safetensors"


@pytest.mark.parametrize(("name", "mean", "std"), [("none", 0.0, 1.0), ("data", None, None), ("timm", 0.5, 0.5)])
def test_a_timm_model_is_built_around_its_weights_and_its_normalisation(weights, dataset, name, mean, std):
    network, file = weights
    given = found("test_resnet", dataset, weights=file, mean=name)
    images = torch.rand(3, 1, 8, 8)
    mean, std = (dataset.mean[0], dataset.std[0]) if mean is None else (mean, std)
    with torch.no_grad():
        assert torch.allclose(given.network(images), network((images - mean) / std), atol=1e-5)
    assert given.name == "test_resnet-mine" and given.origin["mean"] == [pytest.approx(mean)]


def test_weights_that_do_not_fit_are_one_line(weights, dataset, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights[1].read_bytes()[:100])
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    said = {
        "cut": "is no safetensors file",
        "other": "does not fit test_resnet with 4 classes, 1 channels and stem small; .* -S model.stem=native",
        "missing": "cannot be read: No such file",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=rf"{name}.safetensors {words}") as stopped:
            found("test_resnet", dataset, weights=tmp_path / f"{name}.safetensors")
        assert "\n" not in str(stopped.value)


def test_the_same_weights_under_other_code_are_another_model(here, dataset):
    one, same, other = (found(f"somebodys:{name}", dataset) for name in ("reshaping", "reshaping", "colder"))
    assert one.digest == other.digest and one.origin["behaviour"] == same.origin["behaviour"] != other.origin["behaviour"]


# As a stage


@pytest.mark.parametrize("name", ["normed", "reshaping", "rounding"])
def test_strangers_that_need_contiguous_images_change_them_or_have_no_gradient_are_measured(make_study, here, name):
    """And one without a gradient gets the flag that says so."""
    study = make_study(name)
    context = study.context("diagnostics.images=40")
    metrics = evaluate.run_given(context, found(f"somebodys:{name}", context.dataset))
    record = json.loads((study.workspace.report(f"somebodys-{name}") / "evaluation.json").read_text())
    assert "accuracy/worst_case" in metrics and record["figures"]["accuracy/threat_model_2"]["forward"] > 0
    assert ("dead_gradients" in {flag["name"] for flag in record["diagnostics"]["flags"]}) == (name == "rounding")


@pytest.mark.parametrize("name", ["../../models", "a/b", ".hidden", "", "CL-AT-s7", "SL-st-s0", "transfer", "compare", "tune"])
def test_a_name_that_leads_elsewhere_or_is_taken_is_refused(make_study, here, name):
    study = make_study("named")
    context = study.context()
    before = sorted(study.root.rglob("*"))
    with pytest.raises(UserError, match=r"is no name; use|is a name of this study"):
        evaluate.run_given(context, replace(found("somebodys:good", context.dataset), name=name))
    assert sorted(study.root.rglob("*")) == before


def test_anyones_model_gets_the_figures_of_the_grid_but_threat_model_1(make_study, here, dataset):
    study = make_study("given")
    context = study.context()
    given = found("somebodys:good", context.dataset)
    metrics = evaluate.run_given(context, given)
    folder = study.workspace.report("somebodys-good")
    record = json.loads((folder / "evaluation.json").read_text())
    assert json.loads((folder / "metrics.json").read_text()) == metrics == record["metrics"]
    names = {f"accuracy/{name}" for name in ("clean", "threat_model_2", "threat_model_2_half", "worst_case")}
    assert set(record["figures"]) == names == {name for name in metrics if name.startswith("accuracy/") and name.count("/") == 1}
    assert record["digest"] == given.digest and record["origin"]["function"] == "somebodys:good" and record["trained_on"] is None
    table, about = samples.read(folder / "samples.parquet")
    assert table.num_rows == len(context.dataset.test) and about["test_digest"] == record["test_digest"]
    assert not list(study.workspace.scratch("x").parent.glob("evaluate-*"))
    assert ("somebodys-good", "FINISHED") in study.runs()


def test_our_model_from_elsewhere_gives_the_very_figures_of_its_stage(make_study):
    study = make_study("own")
    context = study.context()
    pretrain.run(context, scheme="CL", phase="st", seed=0)
    finetune.run(context, scheme="CL", regime="ST", seed=0)
    metrics = evaluate.run(context, scheme="CL", regime="ST", seed=0)
    folder = study.workspace.model("CL-ST-s0")
    assert evaluate.of_study(study.workspace, str(folder)) == {"scheme": "CL", "regime": "ST", "seed": 0}
    assert evaluate.of_study(study.workspace, "CL-ST-s0") and evaluate.of_study(study.workspace, "resnet18") is None
    given = found(str(folder), context.dataset)
    with pytest.raises(UserError, match=r"CL-ST-s0 is a name of this study.*--name"):
        evaluate.run_given(context, given)
    assert evaluate.run_given(context, replace(given, name="other")) == metrics


def test_a_module_that_cannot_be_copied_is_measured_and_judged_all_the_same(make_study):
    class Stubborn(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :4]

        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    context = make_study("stubborn").context()
    metrics = evaluate.run_given(context, Given("stubborn", Stubborn(), "0", {}))
    assert "accuracy/worst_case" in metrics and "diagnostics/flags" in metrics
    record = json.loads((context.workspace.report("stubborn") / "evaluation.json").read_text())
    assert "not_copied" in [flag["name"] for flag in record["diagnostics"]["flags"]]
