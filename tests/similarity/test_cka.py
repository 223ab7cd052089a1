"""Linear CKA against the four-tuple statistic, a slow transcription in double precision, and what it must not change under."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from advml.models.network import Network
from advml.similarity import cka
from advml.similarity.cka import Similarity, centred_gram, measure
from advml.similarity.layers import Layer, layers

CLEAN, NOISE = ("net", "clean"), ("net", "noise")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hsic(first: Tensor, second: Tensor) -> float:
    """HSIC_1 from centred Gram matrices."""
    n = len(first)
    return float(2 * centred_gram(first) @ centred_gram(second)) / (n * (n - 3))


def cka_of(*features: Tensor, batches: int = 1, gram: str = "float32") -> np.ndarray:
    """CKA of feature matrices (n, p) with one another: each is the only layer of a network of its own."""
    networks = {str(number): nn.Sequential(nn.Identity()) for number in range(len(features))}
    rows = {name: [Layer("0", "Identity", ())] for name in networks}
    parts = zip(*(part.chunk(batches) for part in features), strict=True)
    given = [{(name, ""): part for name, part in zip(networks, batch, strict=True)} for batch in parts]
    similarity = measure(networks, rows, given, gram=gram)
    return np.array([[similarity.cka((a, ""), (b, ""))[0, 0] for b in networks] for a in networks])


@pytest.fixture
def lively(make_network: Callable[..., Network]) -> Callable[..., Network]:
    """A network at 1 x 32 x 32 none of whose layers is dead: timm starts the last norm of every block at zero."""

    def make(*, seed: int = 0, **changes: object) -> Network:
        return enlivened(make_network(seed=seed, image_size=32, **changes), images(32, seed=9), seed=seed)

    return make


def enlivened(network: nn.Module, inputs: Tensor, *, seed: int = 0, momentum: float = 0.1) -> nn.Module:
    """With batch norms that have random weights and have seen images; `momentum` 1: those alone, so what tells images apart stays."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
            module.momentum = momentum
    with torch.no_grad():
        getattr(network.train(), "run_all", network)(inputs)
    return network.eval()


def images(count: int, *, seed: int = 0) -> Tensor:
    """Blurred noise: neighbouring pixels go together, as in photographs."""
    rough = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(rough, size=(32, 32), mode="bilinear")


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with instructions for it; PyTorch multiplies as such a one does, slowly."""
    monkeypatch.setattr(cka, "_multiplies_bfloat16", lambda device: True)


def rows_of(network: nn.Module) -> list[Layer]:
    return layers(network, images(2), select=["all"])


def measured(network: nn.Module, *, sizes: tuple[int, ...] = (16, 16), gram: str = "float32") -> Similarity:
    """All layers of one network on clean and on unrelated images."""
    given = [{CLEAN: images(n, seed=number), NOISE: images(n, seed=number + 50)} for number, n in enumerate(sizes)]
    return measure({"net": network}, {"net": rows_of(network)}, given, gram=gram)


# The estimator


def test_hsic_equals_the_brute_force_four_tuple_statistic():
    """Song et al. 2012: the mean over all ordered quadruples of different images of k_ij (l_ij + l_qr - 2 l_iq)."""
    x, y = gaussian(7, 5, seed=1), gaussian(7, 3, seed=2)
    k, l = (x @ x.T).double().tolist(), (y @ y.T).double().tolist()  # noqa: E741
    terms = [k[i][j] * (l[i][j] + l[q][r] - 2 * l[i][q]) for i, j, q, r in itertools.permutations(range(7), 4)]
    expected = math.fsum(terms) / len(terms)
    assert abs(expected) > 0.1
    assert hsic(x, y) == pytest.approx(expected, rel=1e-5)
    terms = [k[i][j] * (k[i][j] + k[q][r] - 2 * k[i][q]) for i, j, q, r in itertools.permutations(range(7), 4)]
    assert hsic(x, x) == pytest.approx(math.fsum(terms) / len(terms), rel=1e-5)


def slow_cka(batches: list[list[Tensor]]) -> np.ndarray:
    """The formula of cka.py, a layer and a batch at a time, from features in double precision as they are, uncentred."""
    total = 0
    for features in batches:
        centred = []
        for x in features:
            n = len(x)
            k = (x @ x.T).fill_diagonal_(0)
            r = k @ torch.ones(n, dtype=torch.float64) / (n - 2)
            r = r - r.sum() / (2 * (n - 1))
            centred.append((k - r[:, None] - r[None, :]).fill_diagonal_(0))
        total = total + torch.tensor([[(a * b).sum() for b in centred] for a in centred])
    return (total / torch.sqrt(total.diagonal()[:, None] * total.diagonal()[None, :])).numpy()


def test_all_layers_of_a_backbone_equal_a_slow_transcription_in_double_precision(lively):
    network, batches = lively(), []
    similarity, rows = measured(network), rows_of(network)
    modules, seen = dict(network.named_modules()), []
    handles = [modules[row.name].register_forward_hook(lambda m, i, out: seen.append(out.double().flatten(1).clone())) for row in rows]
    for number in range(2):
        seen.clear()
        with torch.no_grad():
            network.run_all(images(16, seed=number))
        batches.append(list(seen))
    for handle in handles:
        handle.remove()
    assert len(rows) > 40 and all(len(batch) == len(rows) for batch in batches)
    np.testing.assert_allclose(similarity.cka(CLEAN, CLEAN), slow_cka(batches), atol=1e-6, rtol=0)


def test_unrelated_features_give_zero_on_average_and_negative_values_stay_negative():
    values = np.array([cka_of(gaussian(12, 20, seed=2 * draw), gaussian(12, 20, seed=2 * draw + 1))[0, 1] for draw in range(600)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)) < 0.05  # the biased estimate would be near 0.6
    assert 0.4 < (values < 0).mean() < 0.65 and values.min() < -0.1


def test_hsic_of_dependent_features_is_unbiased_too():
    """A small batch gives on average what one huge batch gives."""
    x, mix = gaussian(4000, 4, seed=3), gaussian(4, 4, seed=4)
    y = x @ mix + 0.5 * gaussian(4000, 4, seed=5)
    small = np.array([hsic(a, b) for a, b in zip(x.split(5), y.split(5), strict=True)])
    assert abs(small.mean() - hsic(x[:2000], y[:2000])) < 4 * small.std() / math.sqrt(len(small)) < 0.5 * small.mean()


def test_batches_are_weighted_as_a_ratio_of_sums():
    """Not as a mean of ratios, nor of every batch alike: the loud batch counts for more."""
    x, y = gaussian(16, 4, seed=6), gaussian(16, 4, seed=7)
    y[8:] = x[8:] + 0.1 * y[8:]
    x, y = x * torch.tensor([1.0, 3.0]).repeat_interleave(8)[:, None], y * torch.tensor([1.0, 3.0]).repeat_interleave(8)[:, None]
    cross = [hsic(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)]
    own = [[hsic(a, a) for a in each.split(8)] for each in (x, y)]
    assert cka_of(x, y, batches=2)[0, 1] == pytest.approx(sum(cross) / math.sqrt(sum(own[0]) * sum(own[1])), abs=1e-6)
    assert cka_of(x, y, batches=2)[0, 1] > 0.9 > np.mean([c / math.sqrt(a * b) for c, a, b in zip(cross, *own, strict=True)])


def test_rotation_scale_and_offset_change_nothing():
    x, y = gaussian(32, 40, seed=1), gaussian(32, 40, seed=2)
    y = y + x
    rotation = torch.linalg.qr(gaussian(40, 40, seed=3)).Q
    changed = [x @ rotation, 1e-6 * x, 1e6 * x, x + 100 * gaussian(1, 40, seed=4).sign(), -x, 1e-6 * (x @ rotation) + 1e-4]
    row = cka_of(x, y, *changed)[1]
    assert 0.2 < row[0] < 0.9
    np.testing.assert_allclose(row[2:], row[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-17, 1e17, 1e30])
@pytest.mark.parametrize("gram", ["float32", "bfloat16"])
def test_squares_out_of_float32s_range_change_nothing(scale, gram, with_bfloat16):
    x, y = gaussian(16, 5000, seed=1), gaussian(16, 5000, seed=2)
    y = x + 0.5 * y
    np.testing.assert_allclose(cka_of(x, scale * y, gram=gram), cka_of(x, y), atol=5e-4, rtol=0)


def test_one_feature_alive_among_many_constants_is_no_dead_layer():
    x = gaussian(16, 1, seed=1)
    constants = torch.full((16, 20_000), 1000.0)
    constants[:, [7]] += 0.01 * x  # of this the offset leaves two digits
    np.testing.assert_allclose(cka_of(x, constants), 1, atol=1e-3)


def test_channels_last_features_give_the_same():
    """Images of one batch; the columns of the feature matrix come in another order, as in memory."""
    x = gaussian(8, 6, 5, 5, seed=1)
    tensors = [x, x.to(memory_format=torch.channels_last), x.permute(0, 3, 1, 2), x.transpose(0, 1).contiguous().transpose(0, 1)]
    grams = [centred_gram(tensor) for tensor in tensors]
    for gram in grams[1:]:
        torch.testing.assert_close(gram, grams[0], atol=1e-4, rtol=1e-6)


def test_a_permutation_of_the_images_changes_nothing_but_of_one_side_everything():
    x, order = gaussian(64, 8, seed=1), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    y = x + 0.3 * gaussian(64, 8, seed=2)
    assert cka_of(x[order], y[order])[0, 1] == pytest.approx(cka_of(x, y)[0, 1], abs=1e-6)
    assert abs(cka_of(x[order], y)[0, 1]) < 0.2 < cka_of(x, y)[0, 1]


def test_bfloat16_gram_matrices_of_a_backbone_are_off_by_less_than_5e_4(lively, with_bfloat16):
    network = lively(backbone="resnet18")
    exact, rounded = measured(network, sizes=(32,)), measured(network, sizes=(32,), gram="bfloat16")
    for pair in [(CLEAN, CLEAN), (CLEAN, NOISE)]:
        difference = np.abs(exact.cka(*pair) - rounded.cka(*pair)).max()
        assert 1e-7 < difference < 5e-4  # not zero: it must have been used


def test_a_device_that_cannot_multiply_bfloat16_is_not_made_to(monkeypatch):
    monkeypatch.setattr(cka, "_multiplies_bfloat16", lambda device: False)
    x, y = gaussian(16, 5000, seed=1), gaussian(16, 5000, seed=2)
    np.testing.assert_array_equal(cka_of(x, x + y, gram="bfloat16"), cka_of(x, x + y))


def test_bfloat16_survives_an_offset_that_it_cannot_hold(with_bfloat16):
    """Centred before rounding: 1000 and 1001 are the same number in bfloat16."""
    x, y = (gaussian(32, 8, seed=seed) @ gaussian(8, 5000, seed=seed + 1) for seed in (1, 3))
    y = x + 2 * y
    assert cka_of(x + 1000, y, gram="bfloat16")[0, 1] == pytest.approx(cka_of(x, y)[0, 1], abs=5e-4)


# What is recorded


def test_in_place_layers_are_recorded_before_the_next_layer_overwrites_them(lively):
    network = lively()
    clone = copy.deepcopy(network)
    for module in clone.modules():
        if hasattr(module, "inplace"):
            module.inplace = not module.inplace
    changed = [module.inplace for module in network.modules() if hasattr(module, "inplace")]
    assert len(changed) > 5 and any(changed)
    pair = [measured(each).cka(CLEAN, CLEAN) for each in (network, clone)]
    assert [row.name for row in rows_of(network)] == [row.name for row in rows_of(clone)]
    np.testing.assert_array_equal(*pair)
    names = [row.name for row in rows_of(network)]
    before, after = (names.index(f"encoder.layer1.0.{name}") for name in ("bn1", "act1"))
    assert pair[0][before, after] < 0.99


def test_other_images_are_not_the_same_as_clean_ones(lively):
    """One model hooked twice would compare the second pass with itself and say 1."""
    similarity = measured(lively())
    assert similarity.cka(CLEAN, NOISE).max() < 0.6
    assert np.abs(similarity.cka(CLEAN, CLEAN) - similarity.cka(NOISE, NOISE)).max() > 1e-3


@pytest.mark.parametrize("tail", [1, 2, 3, 4])
def test_a_tail_batch_too_small_for_the_estimator_is_left_out_and_counted(lively, tail):
    network = lively()
    similarity, alone = measured(network, sizes=(8, tail)), measured(network, sizes=(8,))
    assert (similarity.sizes, similarity.left_out) == (((8, 4), 0) if tail == 4 else ((8,), tail))
    same = np.array_equal(similarity.cka(CLEAN, NOISE), alone.cka(CLEAN, NOISE))
    assert same == (tail < 4) and np.isfinite(similarity.cka(CLEAN, NOISE)).all()


def test_batches_that_are_all_too_small_are_refused(lively):
    with pytest.raises(ValueError, match="no batch has 4 or more"):
        measured(lively(), sizes=(3, 2))


def test_batches_need_the_same_keys_and_as_many_images_under_each(lively):
    network, x = lively(), images(8)
    arguments = ({"net": network}, {"net": rows_of(network)})
    with pytest.raises(ValueError, match="same images"):
        measure(*arguments, [{CLEAN: x, NOISE: x[:6]}])
    with pytest.raises(ValueError, match="same images"):
        measure(*arguments, [{CLEAN: x}, {NOISE: x}])


@pytest.mark.parametrize("constant", [0.0, 5.0, 1e4])
def test_dead_layers_are_nan_and_spoil_no_others(constant):
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
    nn.init.zeros_(parts[1].weight)
    nn.init.constant_(parts[1].bias, constant)
    network = Branches(*parts)
    x = gaussian(24, 6)
    rows = [Layer(f"parts.{number}", "Linear", (6,)) for number in range(3)]
    similarity = measure({"net": network}, {"net": rows}, [{CLEAN: x[:12], NOISE: x[12:]}])
    healthy = measure({"net": network}, {"net": [rows[0], rows[2]]}, [{CLEAN: x[:12], NOISE: x[12:]}])
    for pair in [(CLEAN, CLEAN), (CLEAN, NOISE)]:
        cka = similarity.cka(*pair)
        assert np.isnan(cka[1]).all() and np.isnan(cka[:, 1]).all()
        np.testing.assert_array_equal(cka[np.ix_([0, 2], [0, 2])], healthy.cka(*pair))


def test_what_differs_by_rounding_alone_is_dead():
    constant = torch.full((12, 300), 0.1)
    rounded = torch.where(gaussian(12, 300) > 0, constant, torch.nextafter(constant, constant + 1))
    cka = cka_of(rounded, gaussian(12, 4), constant)
    assert np.isnan(cka[[0, 2]]).all() and cka[1, 1] == pytest.approx(1)


def test_a_layer_of_nan_spoils_no_others():
    network = Branches(nn.Linear(6, 6), nn.Linear(6, 6))
    nn.init.constant_(network.parts[0].bias, float("nan"))
    rows = [Layer(f"parts.{number}", "Linear", (6,)) for number in range(2)]
    cka = measure({"net": network}, {"net": rows}, [{CLEAN: gaussian(12, 6)}]).cka(CLEAN, CLEAN)
    assert np.isnan(cka[0]).all() and np.isnan(cka[:, 0]).all() and cka[1, 1] == pytest.approx(1)


class Branches(nn.Module):
    """Every part sees the input."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def test_nothing_of_an_activation_is_kept(lively):
    """Not after the pass, and not within it: when the last layer runs, only the tensors the network itself holds are alive."""
    network, seen, alive = lively(), [], []
    rows = rows_of(network)
    handles = [
        module.register_forward_hook(lambda m, i, out: seen.append(weakref.ref(out)))
        for name, module in network.named_modules()
        if name.startswith("encoder.")
    ]
    handles.append(network.classifier.register_forward_hook(lambda m, i, out: alive.append(sum(ref() is not None for ref in seen))))
    similarity = measure({"net": network}, {"net": rows}, [{CLEAN: images(8)}])
    for handle in handles:
        handle.remove()
    assert len(seen) > 40 and alive[0] <= 6  # the pooled output, under the names of its aliases
    assert not any(ref() is not None for ref in seen)
    assert sum(array.size for array in similarity.products.values()) == len(rows) ** 2


def test_images_weights_and_modes_are_left_as_they_were(lively):
    network, x = lively().train(), images(8)
    before, copied = {name: value.clone() for name, value in network.state_dict().items()}, x.clone()
    measure({"net": network}, {"net": rows_of(network)}, [{CLEAN: x}])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and torch.equal(x, copied)
    assert all(module.training for module in network.modules())


# Several models and pairs


@pytest.fixture
def trio(lively) -> tuple[dict[str, Network], dict[str, list[Layer]], list[dict]]:
    """Three networks, one of another family, and two batches of clean and other images for each."""
    networks = {"a": lively(seed=0), "b": lively(seed=1), "c": lively(backbone="test_vit", stem="native")}
    rows = {name: rows_of(network)[:: 1 + (name == "b")] for name, network in networks.items()}
    kinds = {"clean": 0, "noise": 50}
    given = [{(name, kind): images(8, seed=seed + kinds[kind]) for name in networks for kind in kinds} for seed in (1, 2)]
    return networks, rows, given


def test_blocks_between_models_equal_those_of_a_pass_of_the_two_alone(trio):
    networks, rows, given = trio
    whole = measure(networks, rows, given)
    for first, second in itertools.combinations(networks, 2):
        pair = measure(networks, rows, [{key: x for key, x in batch.items() if key[0] in (first, second)} for batch in given])
        found = whole.cka((first, "noise"), (second, "noise"))
        assert found.shape == (len(rows[first]), len(rows[second]))
        np.testing.assert_array_equal(found, pair.cka((first, "noise"), (second, "noise")))
    assert whole.cka(("a", "clean"), ("b", "clean")).max() < 0.999


def test_either_order_of_a_pair_can_be_asked_for(trio):
    similarity = measure(*trio)
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    forwards, backwards = (("a", "clean"), ("b", "noise")), (("b", "noise"), ("a", "clean"))
    np.testing.assert_array_equal(similarity.cka(*backwards), similarity.cka(*forwards).T)
    drawn = similarity.cka(*backwards, weights=weights)
    np.testing.assert_array_equal(drawn, similarity.cka(*forwards, weights=weights).swapaxes(1, 2))
    np.testing.assert_allclose(drawn[0], similarity.cka(*backwards), atol=1e-12)
    alone = measure(*trio[:2], trio[2][1:])
    np.testing.assert_allclose(drawn[2], alone.cka(*backwards), atol=1e-12)


def test_pairs_restrict_what_is_kept(trio):
    wanted = [(("a", "clean"), ("c", "noise")), (("b", "clean"), ("b", "clean"))]
    whole, part = measure(*trio), measure(*trio, pairs=wanted)
    assert list(part.products) == wanted
    for pair in wanted:
        np.testing.assert_array_equal(part.cka(*pair), whole.cka(*pair))
    with pytest.raises(KeyError):
        part.cka(("a", "clean"), ("b", "clean"))


def test_pytorch_cka_agrees_where_nothing_is_overwritten():
    """On a network without layers in place, whose tensors that library may keep; in float64, as it does not centre features."""
    import cka

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()
    data = [images(16, seed=seed)[:, :, :8, :8].double() for seed in range(4)]
    rows = layers(network, data[0][:2], select=["all"])
    ours = measure({"net": network}, {"net": rows}, [{CLEAN: batch} for batch in data]).cka(CLEAN, CLEAN)
    names = [row.name for row in rows]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(data)), batch_size=16)
    (theirs,) = cka.compute_cka(network, network, loader, layers=names, device="cpu", progress=False)
    assert len(names) >= 5 and np.abs(ours - theirs.numpy()).max() < 1e-6


# Families outside ResNet, random weights

FAMILIES = {
    "swin_tiny_patch4_window7_224": {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "num_heads": (1, 2, 2, 2)},
    "mobilenetv4_conv_small_035": {},
    "repvgg_a0": {},
    "convnext_atto": {},
    "mixer_s32_224": {"img_size": 64},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "ghostnet_050": {},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2, "cls_attn_layers": 1},
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)},
    "efficientvit_b0": {},
}


@pytest.mark.parametrize(("name", "options"), FAMILIES.items(), ids=FAMILIES)
def test_other_families_equal_a_slow_transcription_in_double_precision(name, options):
    torch.manual_seed(0)
    side = int(np.atleast_1d(options.get("img_size", 32))[0])
    inputs = torch.nn.functional.interpolate(torch.rand(8, 3, 8, 8), size=(side, side), mode="bilinear")
    network = enlivened(timm.create_model(name, pretrained=False, num_classes=4, **options), inputs, momentum=1)
    found = layers(network, inputs[:2], select=["all"])
    rows = found[:: -(-len(found) // 30)]
    counts, seen = Counter(), {}

    def keep(name: str, output: object) -> None:
        counts[name] += 1
        seen[name if counts[name] == 1 else f"{name}#{counts[name]}"] = (
            output.double().flatten(1).clone() if torch.is_tensor(output) else None
        )

    handles = [module.register_forward_hook(lambda m, i, out, name=name: keep(name, out)) for name, module in network.named_modules()]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    similarity = measure({"net": network}, {"net": rows}, [{CLEAN: inputs}])
    expected = slow_cka([[seen[row.name] - seen[row.name].mean(0) for row in rows]])
    alive = np.isfinite(similarity.cka(CLEAN, CLEAN).diagonal())
    assert len(rows) >= 15 and alive.sum() >= 0.8 * len(rows)
    np.testing.assert_allclose(similarity.cka(CLEAN, CLEAN)[alive][:, alive], expected[alive][:, alive], atol=1e-4, rtol=0)
