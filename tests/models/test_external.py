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
from advml.core.errors import UserError
from advml.data.datasets import Dataset, Split
from advml.evaluation import samples
from advml.models.backbones import create_encoder
from advml.models.external import Given, LoadOptions, load
from advml.models.network import save
from advml.pipeline.stages import evaluate, finetune, pretrain
from advml.report.show import flags_of

SPEC = config.Model(backbone="resnet18", stem="small", options={}, projection_size=8, normalize_logits=False, batch_norm="single")
MODULE = """
import types
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

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(65, 4))

def number():
    return 7

class Wrapped(Reshaping):
    def __init__(self, within):
        super().__init__()
        self.within = within

    def forward(self, images):
        return self.within(super().forward(images))

def thing():
    return Wrapped(lambda logits: types.SimpleNamespace(loss=None, logits=logits))

def logits_key():
    return Wrapped(lambda logits: {"features": logits[:, :2], "logits": logits})

def out_key():
    return Wrapped(lambda logits: {"out": logits})

def first():
    return Wrapped(lambda logits: (logits, logits.flip(1)))

def second():
    return Wrapped(lambda logits: (logits[:, :2], logits))

def scores():
    return Wrapped(lambda logits: {"scores": logits})

def hooked():
    model = scores()
    model.register_forward_hook(lambda model, inputs, output: output["scores"])
    return model

def double():
    return reshaping().double()

def half():
    return reshaping().to(torch.bfloat16)

def nowhere():
    return reshaping().to("meta")

def broken():
    raise RuntimeError("no such\\nfile")
"""


def found(target: str, dataset: Dataset, **how) -> Given:
    return load(target, LoadOptions(**how), spec=SPEC, dataset=dataset)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("somebodys", None)


def test_a_function_gives_a_model_in_eval_mode_with_a_digest_of_its_weights(here, dataset):
    path, given = list(sys.path), found("somebodys:good", dataset)
    assert given.name == "somebodys-good" and not given.network.training and sys.path == path and given.origin["mode"] == "training"
    assert given.digest == found("somebodys:good", dataset).digest and given.scheme is None
    with torch.no_grad():
        given.network.module[1].weight[0, 0] += 1
    from advml.models.external import _digest

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
        "somebodys:scores": r"returns dict, in which logits are looked for as .*; wrap it: def wrapped\(\): model = make\(\);",
        "somebodys:second": r"gives \(2, 2\) for 2 images; .* wrap it: def wrapped\(\)",
        "somebodys:nowhere": "somebodys:nowhere .* no values",
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


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("thing", "output.logits"),
        ("logits_key", "output['logits']"),
        ("out_key", "output['out']"),
        ("first", "output[0]"),
        ("hooked", None),
    ],
)
def test_logits_within_something_else_are_found_and_recorded(here, dataset, name, reading):
    given, plain = found(f"somebodys:{name}", dataset), found("somebodys:reshaping", dataset)
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    logits = given.network(images)
    assert torch.equal(logits, plain.network(images)) and given.origin["behaviour"] == plain.origin["behaviour"]
    assert torch.autograd.grad(logits.sum(), images)[0].abs().sum() > 0
    assert given.origin.get("reading") == reading and any(str(reading) in line for line in given.remarks) == bool(reading)


@pytest.mark.parametrize(("name", "dtype"), [("double", "torch.float64"), ("half", "torch.bfloat16")])
def test_a_model_of_another_type_gets_images_of_its_type_and_gives_float32(here, dataset, name, dtype):
    given, plain = found(f"somebodys:{name}", dataset), found("somebodys:reshaping", dataset)
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    logits = given.network(images)
    assert logits.dtype == torch.float32 and torch.allclose(logits, plain.network(images), atol=0.05)
    assert torch.autograd.grad(logits.sum(), images)[0].dtype == torch.float32 and given.origin["dtype"] == dtype


BINARY = """
import torch
from torch import nn

class One(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, images):
        return self.last(20 * (images.mean((1, 2, 3)) - 0.5))

def column():
    return One(lambda z: z[:, None])

def flat():
    return One(lambda z: z)

def squeezed():
    return One(lambda z: z[:, None].squeeze())

def probability():
    return One(torch.sigmoid)
"""


@pytest.fixture
def two(here, dataset):
    """Dark and bright images, and a module that tells them apart by one logit."""
    (here / "binary.py").write_text(BINARY)
    images = torch.cat([torch.full((8, 1, 8, 8), level, dtype=torch.uint8) for level in (90, 110, 150, 190)])
    split = Split(images, torch.tensor([0] * 16 + [1] * 16))
    yield replace(dataset, train=split, validation=split, test=split, classes=("dark", "bright"))
    sys.modules.pop("binary", None)


@pytest.mark.parametrize("name", ["column", "flat", "squeezed"])
def test_one_logit_of_two_classes_is_that_of_the_second(two, name):
    given = found(f"binary:{name}", two)
    images = two.test.images / 255
    logits, z = given.network(images), 20 * (images.mean((1, 2, 3)) - 0.5)
    assert torch.allclose(logits.softmax(1)[:, 1], torch.sigmoid(z)) and torch.equal(logits.argmax(1), two.test.labels)
    assert given.network(images[:1]).shape == (1, 2) and given.origin["binary"] and "'bright'" in given.remarks[0]
    wanted = nn.functional.binary_cross_entropy_with_logits(z, two.test.labels.float())
    assert torch.allclose(nn.functional.cross_entropy(logits, two.test.labels), wanted)


def test_the_class_of_the_one_logit_is_the_second_of_the_names_given(two):
    given, images = found("binary:flat", two, classes="bright,dark"), two.test.images / 255
    assert "'dark'" in given.remarks[0] and torch.equal(given.network(images), found("binary:flat", two).network(images).flip(1))


def test_one_probability_of_two_classes_is_no_logit(two):
    with pytest.raises(UserError, match=r"binary:probability .* def wrapped\(\)"):
        found("binary:probability", two)


def test_one_logit_of_more_classes_is_refused(here, dataset):
    (here / "binary.py").write_text(BINARY)
    with pytest.raises(UserError, match=r"\(2, 1\) .*\(2, 4\)"):
        found("binary:column", dataset)


def test_a_module_gets_images_under_the_constants_that_were_asked_for(here, dataset):
    images, plain = torch.rand(3, 1, 8, 8), found("somebodys:reshaping", dataset).network
    for mean, std, (m, s) in (("half", None, (0.5, 0.5)), ("0.25", "0.5", (0.25, 0.5)), ("data", None, (dataset.mean[0], dataset.std[0]))):
        given = found("somebodys:reshaping", dataset, mean=mean, std=std)
        assert torch.allclose(given.network(images), plain((images - m) / s), atol=1e-5)
        assert given.origin["mean"] == [m] and given.origin["std"] == [s] and given.constants == ((m,), (s,))
    with pytest.raises(UserError, match="--mean timm"):
        found("somebodys:reshaping", dataset, mean="timm")


def test_logits_are_put_into_the_order_of_the_data_by_name(here, dataset):
    names = ("dogwood", "ash", "cedar", "birch")
    given, plain = found("somebodys:reshaping", dataset, classes=",".join(names)), found("somebodys:reshaping", dataset)
    images = torch.rand(3, 1, 8, 8)
    for label, name in enumerate(dataset.classes):
        assert torch.equal(given.network(images)[:, label], plain.network(images)[:, names.index(name)])
    assert given.classes == names and "reordered to the data's classes" in given.remarks[0]
    assert found("somebodys:reshaping", dataset, classes="ash,birch,cedar,dogwood").origin["behaviour"] == plain.origin["behaviour"]
    with pytest.raises(UserError, match=r"'oak'.*nearest: '"):
        found("somebodys:reshaping", dataset, classes="oak,birch,cedar,dogwood")


def test_classes_that_sort_as_text_are_told_unless_names_are_given(here, dataset):
    numbered = replace(dataset, classes=("1", "10", "2", "3"))
    (line,) = found("somebodys:reshaping", numbered).remarks
    assert "1, 10, 2" in line and "1, 2, 3" in line and "--classes natural" in line
    assert "--classes" not in str(found("somebodys:reshaping", numbered, classes="natural").remarks)


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
        "cut": "is not a safetensors file",
        "other": "does not fit test_resnet with 4 classes, 1 channels and stem small; .* -S model.stem=native",
        "missing": "cannot be read: No such file",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=rf"{name}.safetensors {words}") as stopped:
            found("test_resnet", dataset, weights=tmp_path / f"{name}.safetensors")
        assert "\n" not in str(stopped.value)


def test_a_prefix_of_all_weights_is_stripped_told_and_recorded(weights, dataset, tmp_path):
    network, _ = weights
    save_file({f"module.{name}": tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "parallel.safetensors")
    given = found("test_resnet", dataset, weights=tmp_path / "parallel.safetensors")
    assert given.origin["prefix"] == "module." and "'module.'" in given.remarks[0]
    assert given.origin["behaviour"] == found("test_resnet", dataset, weights=weights[1]).origin["behaviour"]


def test_a_pickle_in_place_of_a_model_is_told_how_to_convert(dataset, tmp_path):
    for target, how in ((str(tmp_path / "w.pth"), {}), ("test_resnet", {"weights": tmp_path / "w.pth"})):
        (tmp_path / "w.pth").write_bytes(b"PK")
        with pytest.raises(UserError, match=r"advml import .*w\.pth --backbone"):
            found(target, dataset, **how)


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
    record = json.loads(study.workspace.record("evaluate", f"somebodys-{name}").read_text())
    assert "accuracy/worst_case" in metrics and record["figures"]["accuracy/threat_model_2"]["forward"] > 0
    assert ("dead_gradients" in {flag["name"] for flag in record["diagnostics"]["flags"]}) == (name == "rounding")


def test_anyones_model_gets_the_figures_of_the_grid_but_threat_model_1(make_study, here, dataset):
    study = make_study("given")
    context = study.context()
    given = found("somebodys:good", context.dataset)
    metrics = evaluate.run_given(context, given)
    folder = study.workspace.report("somebodys-good")
    record = json.loads(study.workspace.record("evaluate", "somebodys-good").read_text())
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
    with pytest.raises(UserError, match=r"CL-ST-s0 .*--name"):
        evaluate.run_given(context, given)
    assert evaluate.run_given(context, replace(given, name="other")) == metrics


def saved(folder, network, dataset, **record) -> str:
    about = {"classes": list(dataset.classes), "input": list(dataset.shape), "data": {"digest": dataset.digest}}
    save(network, folder, about | record)
    return str(folder)


def test_our_model_of_the_same_classes_in_another_order_is_measured_by_their_names(dataset, make_network, tmp_path):
    network, names = make_network().eval(), ["dogwood", "ash", "cedar", "birch"]
    given = found(saved(tmp_path / "other", network, dataset, classes=names, data={"digest": "elsewhere"}), dataset)
    images = torch.rand(3, 1, 8, 8)
    for label, name in enumerate(dataset.classes):
        assert torch.equal(given.network(images)[:, label], network(images)[:, names.index(name)])
    assert given.classes == tuple(names) and given.network.embed(images).shape == (3, 16)  # for threat model I
    order, other_data = given.remarks
    assert "reordered to the data's classes" in order and "trained on other data" in other_data


def test_names_that_are_not_as_many_as_logits_are_refused(here, dataset, make_network):
    """Four of more logits would pass for logits of the four classes."""
    names, folder = ",".join(dataset.classes), saved(here / "other", make_network(classes=5), dataset, classes=list("abcde"))
    for target, count in (("somebodys:wide", 9), ("somebodys:narrow", 3), (folder, 5)):
        with pytest.raises(UserError, match=rf" 4 classes.* {count} logits"):
            found(target, dataset, classes=names)


@pytest.mark.parametrize("names", [["oak", "birch", "cedar", "dogwood"], ["ash", "birch", "cedar"]], ids=["another", "fewer"])
def test_our_model_of_other_classes_is_refused_by_name_unless_names_are_given(dataset, make_network, tmp_path, names):
    folder = saved(tmp_path / "other", make_network(), dataset, classes=names)
    with pytest.raises(UserError, match=r"other name \d classes, .*--classes"):
        found(folder, dataset)
    assert found(folder, dataset, classes="ash,birch,cedar,dogwood").remarks == ()


def test_our_model_that_a_function_returns_is_adapted_as_any_other(here, dataset, make_network):
    saved(here / "other", make_network().eval(), dataset)
    (here / "loading.py").write_text("import advml\n\ndef make():\n    return advml.load_model('other')\n")
    given, folder = found("loading:make", dataset, mean="half"), found(str(here / "other"), dataset)
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(given.network(images), folder.network((images - 0.5) / 0.5), atol=1e-5)
    sys.modules.pop("loading", None)


def test_our_model_of_other_sizes_is_measured_with_a_remark(dataset, make_network, tmp_path):
    given = found(saved(tmp_path / "other", make_network(), dataset, input=[1, 16, 16]), dataset)
    assert any("1 x 16 x 16" in line and "1 x 8 x 8" in line for line in given.remarks)


def test_a_model_that_expects_other_input_is_told_before_the_attacks_and_flagged_in_the_record(make_study, here, capsys, monkeypatch):
    study = make_study("expecting")
    context = study.context("diagnostics.images=0", "corruptions.names=none")
    images, labels = context.dataset.train.images / 255, context.dataset.train.labels
    means = torch.stack([(255 * images[labels == label]).mean(0).flatten() for label in range(4)])
    (here / "levels.py").write_text(LEVELS)
    torch.save(means, here / "means.pt")
    given = found("levels:make", context.dataset)
    attacked = evaluate.evaluation.evaluate

    def attacks(*given: object, **how: object) -> object:
        print("attacks", file=sys.stderr)
        return attacked(*given, **how)

    monkeypatch.setattr(evaluate.evaluation, "evaluate", attacks)
    metrics = evaluate.run_given(context, given)
    said = capsys.readouterr().err
    assert 0 < said.index("--mean levels") < said.index("attacks") and metrics["diagnostics/flags"] == 2
    record = json.loads(study.workspace.record("evaluate", "levels-make").read_text())
    assert {flag["name"] for flag in record["diagnostics"]["flags"]} == {"other_normalization", "at_chance"}
    assert record["expected"]["accuracy"]["levels"]["as given"] > 0.9
    assert any("other_normalization" in line for line in flags_of(record))
    assert "other_normalization" not in str(evaluate.run_given(context, found("levels:make", context.dataset, mean="levels")))
    assert capsys.readouterr().err.count("--mean") == 0
    sys.modules.pop("levels", None)


LEVELS = """
import torch
from torch import nn

def make():
    means = torch.load("means.pt", weights_only=True)
    linear = nn.Linear(64, 4)
    linear.weight.data, linear.bias.data = means, -means.square().sum(1) / 2
    return nn.Sequential(nn.Flatten(), linear)
"""
