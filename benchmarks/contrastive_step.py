"""One contrastive adversarial training step: as our trainer takes it, and as the paper's public code does.

    python benchmarks/contrastive_step.py [--quick] [--device cpu] [--threads 1] [--seed 0]

The step: d = argmax L(x, x + d) in 5 steps of PGD, then descend L(x, x + d) + L(t1(x), t2(x)). Augmentation is measured
elsewhere: both sides get x itself for both views, the same loss function, Adam and network.

Floors count passes of N images in units of a forward one; a backward pass costs 1 to the images and 2 with all parameters.

| | ours | paper |
|---|---|---|
| attack | 1 clean + 5 * (1 forward + 1 backward) = 11 | 5 * (clean, adversarial: 2 forward + 4 backward) = 30 |
| two loss terms | 4 forward + 8 backward = 12 | 12 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import hardware_line, interleaved, options
from torch import Tensor
from torch.nn import functional as F

from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.config import View
from advml.core.device import Machine
from advml.models.memory_format import place
from advml.models.network import Architecture, Network, build
from advml.recipes import instances
from advml.training.tasks import Contrastive

EPSILON, STEPS, TEMPERATURE = 8 / 255, 5, 0.2
STEP_SIZE = 2.5 * EPSILON / STEPS
LOSSES = 4 + 8
ATTACK = {"ours": 1 + 2 * STEPS, "paper": 6 * STEPS}
FLOORS = {f"attack, {who}": passes for who, passes in ATTACK.items()} | {f"step, {who}": passes + LOSSES for who, passes in ATTACK.items()}
WANTED = {"attack": 0.33, "step": 0.55}


class Ours:
    """The trainer's step on a task of the library: attack in eval mode with a hoisted clean embedding, input gradients only."""

    def __init__(self, network: Network, images: Tensor, machine: Machine) -> None:
        place(network, machine.device)
        self.task = Contrastive(network, spec=View(), temperature=TEMPERATURE, groups=instances)
        self.adversary = Adversary(ThreatModel("linf", EPSILON), steps=STEPS, step_size=STEP_SIZE, random_start=True, keep="last")
        self.optimizer = torch.optim.Adam(self.task.learners(), lr=3e-4)
        self.images, self.labels = machine.images(images), torch.zeros(len(images), dtype=torch.int64, device=machine.device)
        self.generator = torch.Generator().manual_seed(0)
        self.task.train_mode()

    def attack(self) -> Tensor:
        make = lambda: self.task.objective(self.images, self.labels)  # noqa: E731
        return self.adversary.attack(self.task.network, make, self.images, generator=self.generator)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        views = self.task.views(self.images, generator=self.generator)
        self.task.clean_loss(views, self.labels, self.labels).mean().backward()
        self.task.adversarial_loss(self.images, self.attack(), self.labels).mean().backward()
        self.optimizer.step()


class Paper:
    """softsys4ai/CL-Robustness, line by line: train mode throughout, the clean embedding inside the loop, `loss.backward()`."""

    def __init__(self, network: Network, images: Tensor, machine: Machine) -> None:
        self.network = network.to(machine.device).train()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
        self.images = machine.images(images).contiguous()
        self.partners = torch.arange(2 * len(images), device=machine.device).roll(len(images))

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent (Chen et al. 2020, eq. 1): cross-entropy of each embedding's similarities; the other view is the target."""
        embeddings = torch.cat([first, second])
        itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
        similarity = (embeddings @ embeddings.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        return F.cross_entropy(similarity, self.partners)

    def attack(self) -> Tensor:
        delta = torch.zeros_like(self.images, requires_grad=True)
        for _ in range(STEPS):
            clean = self.network.embed(self.images)
            adversarial = self.network.embed(self.images + delta)
            self.loss(clean, adversarial).backward()
            with torch.no_grad():
                moved = (delta + STEP_SIZE * delta.grad.sign()).clamp(-EPSILON, EPSILON)
                delta.copy_((self.images + moved).clamp(0, 1) - self.images)
            delta.grad.zero_()
        return (self.images + delta).detach()

    def step(self) -> None:
        adversarial = self.attack()
        attacked = self.loss(self.network.embed(self.images), self.network.embed(adversarial))
        views = self.loss(self.network.embed(self.images), self.network.embed(self.images))
        self.optimizer.zero_grad()
        (attacked + views).backward()
        self.optimizer.step()


def compare(backbone: str, shape: tuple[int, int, int], batch: int, rounds: int, *, machine: Machine, seed: int) -> None:
    channels, side, _ = shape
    architecture = Architecture(backbone, "small", {}, channels, side, (0.5,) * channels, (0.25,) * channels, None, 100, False, False)
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ours, paper = (kind(build(architecture, seed=seed), images, machine) for kind in (Ours, Paper))

    def forward() -> Tensor:
        with torch.no_grad():
            return ours.task.network.embed(ours.images)

    tasks: dict[str, Callable[[], object]] = {"attack, ours": ours.attack, "attack, paper": paper.attack}
    tasks |= {"step, ours": ours.step, "step, paper": paper.step}
    times = interleaved({"forward": forward, **tasks}, rounds)
    print(f"| {backbone}, {batch} x {channels}x{side}x{side} | milliseconds | in forward passes | floor |\n|---|---|---|---|")
    for task in tasks:
        print(f"| {task} | {times[task].milliseconds} | {times[task].over(times['forward'])} | {FLOORS[task]} |")
    for part, wanted in WANTED.items():
        ratio, floor = times[f"{part}, ours"].over(times[f"{part}, paper"]), FLOORS[f"{part}, ours"] / FLOORS[f"{part}, paper"]
        met = "met" if ratio.median <= wanted else "missed"
        print(f"| {part}, ours / paper | {ratio}; wanted {wanted}: {met} | | {floor:.3g} |")
    print()


def main() -> None:
    parser = options("One contrastive adversarial training step.", quick="small batches and few rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"## Contrastive training step\n\n{hardware_line('timm')}; device {arguments.device}; seed {arguments.seed}.")
    print("Median (quartiles) of interleaved rounds; passes are of one batch, forward, in train mode without gradients.\n")
    machine = Machine(arguments.device)
    compare("test_resnet", (1, 8, 8), 128, 3 if arguments.quick else 15, machine=machine, seed=arguments.seed)
    compare("resnet18", (3, 32, 32), 8 if arguments.quick else 64, 1 if arguments.quick else 5, machine=machine, seed=arguments.seed)


if __name__ == "__main__":
    main()
