"""`advml import`: a published checkpoint becomes a model that evaluate, represent, compare, attack and fine-tuning accept."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import advml as library
from advml.core.errors import UserError
from advml.models import network
from advml.pipeline.any_networks import represent_model
from advml.pipeline.attack_demo import attack_picture
from advml.pipeline.checkpoint_import import import_checkpoint
from advml.pipeline.stages import compare


@pytest.fixture
def study(make_study):
    return make_study("study", "worst_case.attacks=[]", "corruptions.names=none", "similarity.layers=blocks")


@pytest.fixture
def checkpoint(make_network, tmp_path):
    """A file of a network's encoder and classifier under a wrapper, and the network."""
    one = make_network(seed=3)
    named = {f"module.{key}": value for key, value in one.encoder.state_dict().items()}
    named |= {f"module.fc.{key}": value for key, value in one.classifier.state_dict().items()}
    torch.save({"state_dict": named}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth", one.eval()


def norms(one):
    return {"mean": str(one.architecture.mean[0]), "std": str(one.architecture.std[0])}


def test_evaluate_represent_compare_and_attack_accept_it(study, checkpoint, dataset, advml):
    file, one = checkpoint
    options = [word for key, value in norms(one).items() for word in (f"--{key}", value)]
    done = advml("import", str(file), "--backbone", "test_resnet", "--classes", ",".join(dataset.classes), *options, cwd=study.root)
    assert done.returncode == 0 and "fc is its classifier" in done.stderr and "wrote models/imported/theirs" in done.stdout
    folder = study.workspace.imported("theirs")
    images = dataset.test.images.float() / 255
    with torch.no_grad():
        assert torch.allclose(library.load_model(folder)(images), one(images), atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]

    done = advml("evaluate", "theirs", cwd=study.root)  # by name
    assert done.returncode == 0 and "clean" in done.stdout
    record = json.loads(study.workspace.record("evaluate", "theirs").read_text())
    assert record["expected"]["accuracy"]  # the normalisation that somebody has said is tried against others
    assert "diagnostics" in record and "theirs" in advml("show", "theirs", cwd=study.root).stdout

    context = study.context()
    assert "cka/redundancy" in represent_model(context, str(folder)) and study.workspace.report("theirs").joinpath("cka.png").exists()
    network.save(one, study.root / "other", {"name": "other", "kind": "imported", "input": [1, 8, 8], "origin": {}})
    assert compare.run(context, chosen=("theirs", str(study.root / "other")), out=study.root / "compared") is not None
    Image.fromarray(dataset.test.images[0, 0].numpy()).save(study.root / "one.png")
    assert attack_picture(context, study.root / "one.png", model="theirs", out=study.root / "attack.png")


def test_what_was_used_for_what_is_recorded(study, checkpoint):
    file, _ = checkpoint
    made = import_checkpoint(study.workspace, file, "test_resnet", name="again")
    record = network.read_record(made.folder)
    assert (
        record["origin"]["prefix"] == "module." and record["origin"]["classifier"] == "fc" and record["origin"]["normalization"] == "none"
    )
    assert any("no normalisation" in remark for remark in made.remarks) and record["input"] == [1, 8, 8] and "classes" not in record


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"classes": "a,b"}, "--classes names 2"),
        ({"name": "CL-AT-s0"}, "reserved for models of this study"),
        ({"name": "../up"}, "--name"),
        ({"stem": "native"}, "stem native"),
        ({"mean": "imagenett"}, "imagenet"),
    ],
)
def test_a_wrong_wish_is_refused_and_nothing_is_written(study, checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        import_checkpoint(study.workspace, checkpoint[0], "test_resnet", **options)
    assert not study.workspace.imported("x").parent.exists()


def test_without_prepared_data_the_size_must_be_said(tmp_path, checkpoint):
    from advml.core.paths import Workspace

    with pytest.raises(UserError, match="--image-size"):
        import_checkpoint(Workspace(tmp_path / "empty"), checkpoint[0], "test_resnet")
    assert import_checkpoint(Workspace(tmp_path / "empty"), checkpoint[0], "test_resnet", image_size=16).architecture.image_size == 16
