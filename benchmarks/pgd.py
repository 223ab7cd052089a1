"""PGD against torchattacks, foolbox and a plain loop: the same attack on the same network, from a zero start.

    python benchmarks/pgd.py [--quick] [--device cpu] [--threads 1] [--seed 0]

The network is timm's ResNet-18 with our small stem, in eval mode, on 3x32x32 images (channels last). All ascend the
cross-entropy under L-infinity, 8/255, in 10 steps. The floor is 10 forward passes and 10 backward passes to the
images, each of the price of a forward one: 20. Parameter gradients, which nobody asked for, would cost 10 more.

torchattacks pins an old requests, so it is in no lock file: `pip install --no-deps torchattacks==3.5.1`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from timing import hardware_line, interleaved, options
from torch import Tensor
from torch.nn.functional import cross_entropy

from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.core.device import Machine
from advml.models.memory_format import place
from advml.models.network import Architecture, Network, build
from advml.training.tasks import classification_objective

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
    import foolbox

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
OURS = "advml"
FLOOR = 2 * STEPS  # forward passes
HAS_TORCHATTACKS = importlib.util.find_spec("torchattacks") is not None
Attack = Callable[[], Tensor]


def plain(network: Network, images: Tensor, labels: Tensor) -> Attack:
    """The loop of many a paper's code: `loss.backward()`, which fills the gradients of all parameters too."""

    def attack() -> Tensor:
        delta = torch.zeros_like(images, requires_grad=True)
        for _ in range(STEPS):
            cross_entropy(network(images + delta), labels).backward()
            with torch.no_grad():
                moved = (delta + STEP_SIZE * delta.grad.sign()).clamp(-EPSILON, EPSILON)
                delta.copy_((images + moved).clamp(0, 1) - images)
            delta.grad.zero_()
        return (images + delta).detach()

    return attack


def attacks(network: Network, images: Tensor, labels: Tensor) -> dict[str, Attack]:
    """The same attack several times over."""
    ours = Adversary(ThreatModel("linf", EPSILON), steps=STEPS, step_size=STEP_SIZE, random_start=False, keep="last")
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
    listed = {
        OURS: lambda: ours.attack(network, lambda: classification_objective(network, labels), images, generator=torch.Generator()),
        "foolbox": lambda: theirs.run(wrapped, images, labels, epsilon=EPSILON),
        "plain loop, backward()": plain(network, images, labels),
    }
    if HAS_TORCHATTACKS:
        import torchattacks

        peer = torchattacks.PGD(network, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS, random_start=False)
        listed["torchattacks"] = lambda: peer(images, labels)
    return listed


def compare(batch: int, rounds: int, *, machine: Machine, seed: int) -> None:
    channel = (0.5, 0.5, 0.5)
    architecture = Architecture("resnet18", "small", {}, 3, 32, channel, channel, 10, None, False, False)
    network = place(build(architecture, seed=seed), machine.device).eval()
    generator = torch.Generator().manual_seed(seed)
    images = machine.images(torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator))
    labels = torch.randint(0, 10, (batch,), generator=generator).to(machine.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return network(images)

    listed = attacks(network, images, labels)
    expected = listed[OURS]()
    times = interleaved({"one forward pass": forward, **listed}, rounds)
    print(f"| PGD-{STEPS}, ResNet-18, batch {batch} | milliseconds | times ours | in forward passes (floor {FLOOR}) | pixels as ours, % |")
    print("|---|---|---|---|---|")
    for name, timing in times.items():
        same = f"{((listed[name]() - expected).abs() < 1e-5).float().mean():.2%}".rstrip("%") if name in listed else "-"
        print(f"| {name} | {timing.milliseconds} | {timing.over(times[OURS])} | {timing.over(times['one forward pass'])} | {same} |")
    if not HAS_TORCHATTACKS:
        print("\ntorchattacks is left out; for its row: pip install --no-deps torchattacks==3.5.1")
    fastest = min((name for name in listed if name != OURS), key=lambda name: times[name].median)
    print(f"\nTarget: no slower than the fastest peer ({fastest}); ours takes {times[OURS].over(times[fastest])} of its time.")


def main() -> None:
    parser = options("PGD against its peers.", quick="a small batch and few rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, rounds = (8, 2) if arguments.quick else (64, 5)
    packages = ("timm", "foolbox", *(["torchattacks"] if HAS_TORCHATTACKS else []))
    print(f"## PGD\n\n{hardware_line(*packages)}; device {arguments.device}; seed {arguments.seed}.")
    print(f"Median (quartiles) of {rounds} interleaved rounds.\n")
    compare(batch, rounds, machine=Machine(arguments.device), seed=arguments.seed)


if __name__ == "__main__":
    main()
