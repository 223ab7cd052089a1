"""`advml export`: what other tools load gives the model's own outputs."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch

from advml.core.errors import Failure, UserError
from advml.models import export, network
from advml.pipeline.checkpoint_export import export_model

KINDS = {
    "small stem": {},
    "two branches": {"dual_batch_norm": True},
    "native": {"stem": "native", "image_size": 32},
    "unit logits": {"normalize_logits": True},
    "no classifier": {"classes": None},
    "transformer": {"backbone": "test_vit"},
}


@pytest.fixture
def made(make_network, tmp_path):
    def make(**changes):
        one = make_network(seed=5, **changes)
        with torch.no_grad():
            for name, value in one.encoder.state_dict().items():
                value.add_(0.5 if name.endswith(("adversarial.bias", "running_mean")) else 0)
        network.save(one, tmp_path / "one", {"name": "one"})
        return one.eval()

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_plain_timm_loads_it_in_the_three_lines_that_are_printed(made, study, dataset, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda *of: None)
    one = made(**KINDS[kind])
    found = export_model(study.workspace, str(tmp_path / "one"))
    assert len(found.lines) == 3 and found.folder == study.workspace.exported("one")
    scope: dict = {}
    exec("\n".join(found.lines), scope)
    images = torch.rand(4, 1, one.architecture.image_size, one.architecture.image_size)
    with torch.no_grad():
        theirs = scope["model"]((images - dataset.mean[0]) / dataset.std[0])
        wanted = one.features(images) if one.classifier is None else one.classifier(one.features(images))
    assert torch.equal(theirs, wanted)
    about = json.loads((found.folder / "config.json").read_text())
    assert about["pretrained_cfg"]["mean"] == list(dataset.mean) and about["num_classes"] == (one.architecture.classes or 0)
    if one.architecture.stem == "native":
        hub = timm.create_model(f"local-dir:{found.folder}", pretrained=True).eval()
        assert torch.equal(hub((images - dataset.mean[0]) / dataset.std[0]), theirs)


def test_onnx_gives_the_logits_of_any_number_of_images_in_0_to_1(made, study, dataset, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    one = made()
    found = export_model(study.workspace, str(tmp_path / "one"))
    assert found.files == ("config.json", "model.onnx", "model.safetensors") and not found.remarks
    session = onnxruntime.InferenceSession(found.folder / "model.onnx")
    images = dataset.test.images[:5].float() / 255
    for count in (1, 5):
        (logits,) = session.run(None, {"images": images[:count].numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(logits), one(images[:count]), atol=1e-4)


def test_an_export_that_differs_is_refused_and_the_old_one_stays(made, study, tmp_path, monkeypatch):
    made()
    monkeypatch.setattr(export, "to_onnx", lambda *of: None)
    before = export_model(study.workspace, str(tmp_path / "one")).folder.joinpath("config.json").stat().st_mtime_ns
    monkeypatch.setattr(export, "create_encoder", lambda *of, **how: _off(*of, **how))
    with pytest.raises(Failure, match="gives other outputs"):
        export_model(study.workspace, str(tmp_path / "one"))
    assert study.workspace.exported("one").joinpath("config.json").stat().st_mtime_ns == before


def _off(*of, **how):
    from advml.models.backbones import create_encoder

    encoder, width = create_encoder(*of, **how)
    encoder.fc.register_forward_hook(lambda module, inputs, output: output + 0.01)
    return encoder, width


def test_without_the_library_there_is_no_onnx_and_a_line_says_so(made, study, tmp_path, monkeypatch):
    made()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = export_model(study.workspace, str(tmp_path / "one"))
    assert "model.onnx" not in found.files and any("advml[onnx]" in remark for remark in found.remarks)


def test_a_folder_is_written_over_only_if_nothing_but_an_export_is_lost(made, study, tmp_path, monkeypatch):
    made()
    monkeypatch.setattr(export, "to_onnx", lambda *of: None)
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # an empty folder, and an export
        assert export_model(study.workspace, str(tmp_path / "one"), out).files == ("config.json", "model.safetensors")
    (out / "tokenizer.json").write_text("{}")  # of a model from elsewhere, which has a config.json, too
    for taken in (out, out / "tokenizer.json"):
        with pytest.raises(UserError, match=r"contains tokenizer\.json"):
            export_model(study.workspace, str(tmp_path / "one"), taken)
