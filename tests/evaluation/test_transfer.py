"""Adversarial examples of each model on every other: against a loop over single images, and flags where they are due."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from advml.config import Config, load
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.data import adversarial
from advml.data.datasets import Split
from advml.evaluation import samples
from advml.evaluation.records import NO_PAIRS, read_transfer, transfer_rows, write_transfer
from advml.evaluation.run_attacks import Outcome
from advml.evaluation.transfer import FLAG, RULE, Breaks, Evaluated, Transfer, breaks, describe, evaluated, evaluated_models, transfer

CPU = Machine(torch.device("cpu"))
LINF = ("linf", 0.1)


def linear(seed: int) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
        network[1].bias.zero_()
    return network


def split(count: int) -> Split:
    drawn = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (count, 1, 2, 2), generator=drawn, dtype=torch.uint8)
    return Split(images, torch.randint(0, 3, (count,), generator=drawn))


def stored(tmp_path, test: Split, number: int, *, count: int, threat: tuple[str, float] = LINF) -> Evaluated:
    """A linear model with adversarial images that were drawn at random: a matrix needs no good attack."""
    name, network = f"model-{number}", linear(number)
    images = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(100 + number))
    attack = {"model": name, "digest": name, "norm": threat[0], "epsilon": threat[1]}
    adversarial.write(adversarial.AdversarialImages(images, attack), tmp_path / name)
    clean = network(test.images.float() / 255).argmax(1) == test.labels
    return Evaluated(name, name, network, tmp_path / name, clean, clean, threat)


def test_the_matrix_is_that_of_a_loop_over_single_images(tmp_path):
    test, counts = split(23), (23, 17, 5)
    models = [stored(tmp_path, test, number, count=count) for number, count in enumerate(counts)]
    told = []
    found = transfer(models, test, CPU, batch_size=4, on_pair=lambda *pair: told.append(pair))
    assert told == [(source.name, target.name) for source in models for target in models]
    for s, source in enumerate(models):
        images = adversarial.read(source.stored, digest=source.digest).images
        for t, target in enumerate(models):
            expected = []
            for number in range(counts[s]):
                with torch.no_grad():
                    verdicts = (target.network(x).argmax(1).item() for x in (images[number, None], test.images[number, None].float() / 255))
                    expected.append(all(verdict == test.labels[number].item() for verdict in verdicts))
            assert found.right[s][t].tolist() == expected
    block = describe(found, seed=3)
    assert block["n"] == list(counts) and block["correct"][1][2] == int(found.right[1][2].sum())
    assert len({count for row in block["correct"] for count in row}) > 3  # the numbers are not all alike
    assert block["accuracy"][0][1] == block["correct"][0][1] / 23
    table = transfer_rows([block])
    assert [(row["source"], row["target"]) for row in table] == told
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["seed"] == 3 for row in table)


def test_logits_that_are_no_numbers_are_wrong(tmp_path):
    test = split(6)
    model = stored(tmp_path, test, 0, count=6)
    with torch.no_grad():
        model.network[1].bias.fill_(torch.nan)
    assert not transfer([model], test, CPU, batch_size=6).right[0][0].any()


@pytest.mark.parametrize("count", [24, 0])
def test_images_that_cannot_be_of_these_test_images_are_refused(tmp_path, count):
    model = stored(tmp_path, split(23), 0, count=count)
    with pytest.raises(UserError, match=r"model-0 contains images .*advml evaluate"):
        transfer([model], split(23), CPU, batch_size=8)


# Breaks and flags


def planted(survived: list[bool], verdicts: dict[str, list[bool]], *, threats: dict[str, tuple[str, float]] | None = None) -> Transfer:
    """A target whose attacks leave `survived`, and what others' examples leave right on it."""
    own = torch.tensor(survived)
    target = Evaluated("target", "d", nn.Identity(), None, torch.ones_like(own), own, LINF)
    models = [target, *(Evaluated(name, name, nn.Identity(), None, own, own, LINF) for name in verdicts)]
    names = [model.name for model in models]
    attacks = [dict(zip(("norm", "epsilon"), (threats or {}).get(name, LINF), strict=True)) for name in names]
    right = [[own] * len(models), *([torch.tensor(verdict)] * len(models) for verdict in verdicts.values())]
    return Transfer(models, attacks, right)


def test_breaks_are_images_that_survive_all_own_attacks_and_no_foreign_one():
    survived = [True, True, True, True, False]
    found = planted(survived, {"a": [True, False, True, True, False], "b": [True, False, False, True, True], "c": [True] * 5})
    assert breaks(found, 0) == Breaks("target", 4, 2, {"b": 2, "a": 1})  # the second image counts once, the last one not at all


def test_only_images_that_were_attacked_count_as_surviving():
    found = planted([True] * 5, {"short": [False, True, True]})
    assert breaks(found, 0) == Breaks("target", 3, 1, {"short": 1})


@pytest.mark.parametrize("threat", [("l2", 0.1), ("linf", 0.2)])
def test_attacks_of_another_norm_or_size_prove_nothing(threat):
    """A larger ball breaks more; that says nothing about the gradients."""
    verdicts = {"strange": [False] * 50, "same": [False, *[True] * 49]}
    assert breaks(planted([True] * 50, verdicts, threats={"strange": threat}), 0) == Breaks("target", 50, 1, {"same": 1})
    assert breaks(planted([True] * 50, {"strange": [False] * 50}, threats={"strange": threat}), 0) == Breaks("target", 0, 0, {})


@pytest.mark.parametrize(
    ("broken", "survived", "flagged"),
    [
        (0, 0, False),
        (2, 2, False),  # an anecdote
        (3, 3, True),
        (4, 200, False),  # what PGD alone leaves of honest models trained on digits
        (7, 200, True),
        (100, 10_000, False),
        (125, 10_000, True),
    ],
)
def test_a_flag_needs_more_breaks_than_chance_and_a_few_misses_explain(broken, survived, flagged):
    flag = Breaks("target", survived, broken, {"a": broken}).flag
    assert (flag is not None) == flagged
    if flag:
        assert flag.name == FLAG and f"{broken} of {survived}" in flag.saw and f"a {broken}" in flag.saw and flag.try_


def test_a_planted_flag_names_its_model_and_no_other():
    found = planted([True] * 40, {"a": [False] * 10 + [True] * 30, "b": [True] * 40})
    found.right[1][1:] = [torch.ones(40, dtype=torch.bool)] * 2  # but the others hold
    block = describe(found, seed=0)
    assert [flag["model"] for flag in block["flags"]] == ["target"]
    assert block["breaks"][0] == {"model": "target", "survived": 40, "transfer_breaks": 10, "sources": {"a": 10}}
    assert {row["transfer_breaks"] for row in transfer_rows([block]) if (row["source"], row["target"]) == ("a", "target")} == {10}


def test_saturated_gradients_are_flagged_and_the_honest_model_is_not(tmp_path):
    """Logits times 10000: cross-entropy is flat in float32 where the model is right, so its gradient is 0; its twin's examples find it."""
    test, honest = split(60), linear(1)
    with torch.no_grad():
        honest[1].bias.copy_(-honest[1].weight.sum(1) / 2)  # every class has its share of the images
    masked = nn.Sequential(*honest, Scaled())
    images = test.images.float() / 255
    test.labels.copy_(honest(images).argmax(1))
    models = []
    for name, network in (("honest", honest), ("masked", masked)):
        x = images.clone().requires_grad_()
        nn.functional.cross_entropy(network(x), test.labels, reduction="sum").backward()
        attacked = (images + 0.3 * x.grad.sign()).clamp(0, 1)
        record = {"digest": name, "norm": "linf", "epsilon": 0.3}
        adversarial.write(adversarial.AdversarialImages(attacked, record), tmp_path / name)
        survived = network(attacked).argmax(1) == test.labels
        models.append(Evaluated(name, name, network, tmp_path / name, torch.ones(60, dtype=torch.bool), survived, ("linf", 0.3)))
    assert models[1].survived.sum() > models[0].survived.sum() + 10  # it looks more robust
    flags = describe(transfer(models, test, CPU, batch_size=16), seed=0)["flags"]
    assert [flag["model"] for flag in flags] == ["masked"] and "honest" in flags[0]["saw"]


class Scaled(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return 1e4 * logits


# Files


ABOUT = {"digest": "weights", "norm": "linf", "epsilon": 0.1}


def write_samples(workspace: Workspace, name: str, test: Split, **about: object) -> None:
    right = torch.tensor([True, True, False])
    nothing = torch.zeros(3)
    clean = Outcome(torch.arange(3), right, torch.where(right, test.labels, 7), nothing.nan_to_num() * torch.nan, nothing, nothing)
    attack = Outcome(torch.arange(3), torch.tensor([True, False, False]), test.labels, nothing, nothing, nothing)
    table = samples.table({"accuracy/clean": clean, "accuracy/threat_model_2": attack}, test, about=about)
    samples.write(table, workspace.samples(name))


def test_what_an_evaluation_found_out_comes_from_its_samples(tmp_path):
    workspace, test = Workspace(tmp_path), split(3)
    write_samples(workspace, "m", test, **ABOUT, test_digest=samples.digest_of(test))
    found = evaluated(workspace, "m", nn.Identity(), test, digest="weights")
    assert found.clean.tolist() == [True, True, False] and found.survived.tolist() == [True, False, False] and found.threat == LINF


@pytest.mark.parametrize("fault", [{"digest": "older"}, {"test_digest": "other images"}, {"norm": None, "epsilon": None}])
def test_samples_of_other_weights_or_images_are_refused_in_one_line(tmp_path, fault):
    workspace, test = Workspace(tmp_path), split(3)
    write_samples(workspace, "m", test, **(ABOUT | {"test_digest": samples.digest_of(test)} | fault))
    with pytest.raises(UserError, match=r"samples\.parquet .*advml evaluate") as refused:
        evaluated(workspace, "m", nn.Identity(), test, digest="weights")
    assert "\n" not in str(refused.value)


def put(path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_models_are_those_of_one_seed_that_are_trained_and_measured(tmp_path, params):
    workspace = Workspace(tmp_path)
    for name in ("SL-AT-s0", "CL-AT-s0", "CL-AT-s1", "SCL-AT-s0"):
        put(workspace.model(name) / "model.json", {})
        if name != "SCL-AT-s0":
            put(workspace.record("evaluate", name), {"model": name, "metrics": {}})
    put(workspace.record("evaluate", "SL-ST-s0"), {"model": "SL-ST-s0", "metrics": {}})
    assert evaluated_models(params.grid, workspace, 0) == ["SL-AT-s0", "CL-AT-s0"]
    assert evaluated_models(params.grid, workspace, 1) == ["CL-AT-s1"]


@pytest.fixture
def params(request) -> Config:
    return load(request.config.rootpath / "params.yaml")


@pytest.fixture
def written(tmp_path) -> tuple[Workspace, dict]:
    workspace, block = Workspace(tmp_path), describe(planted([True] * 4, {"a": [True, False, True, True]}), seed=0)
    for name, digest in block["digests"].items():
        put(workspace.record("evaluate", name), {"model": name, "metrics": {}, "digest": digest})
    write_transfer(workspace, [block], rule=RULE, picture=b"picture", made_by={})
    return workspace, block


def test_what_was_written_reads_back_and_nobody_leaves_no_older_picture(written):
    workspace, block = written
    assert read_transfer(workspace) == {"rule": RULE, "seeds": [block]}
    assert {path.name for path in workspace.report("transfer").iterdir()} == {"transfer.json", "transfer.csv", "transfer.png"}
    write_transfer(workspace, [], rule=RULE, picture=None, made_by={})
    assert read_transfer(workspace) is None
    assert [path.name for path in workspace.report("transfer").iterdir()] == ["transfer.json"]
    assert json.loads((workspace.report("transfer") / "transfer.json").read_text())["reason"] == NO_PAIRS


def test_what_was_measured_on_other_weights_is_left_out(written):
    workspace, _ = written
    put(workspace.record("evaluate", "a"), {"model": "a", "metrics": {}, "digest": "newer"})
    assert read_transfer(workspace) is None
    workspace.record("transfer", "matrix").unlink()
    assert read_transfer(workspace) is None


@pytest.mark.parametrize(
    ("file", "content"), [("json", None), ("json", "{"), ("json", '{"seeds": []}'), ("record", "[]"), ("record", '{"transfer": 1}')]
)
def test_damaged_files_are_one_line(written, file, content):
    workspace, _ = written
    path = workspace.report("transfer") / "transfer.json" if file == "json" else workspace.record("transfer", "matrix")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"transfer\.json .*advml transfer") as refused:
        read_transfer(workspace)
    assert "\n" not in str(refused.value)
