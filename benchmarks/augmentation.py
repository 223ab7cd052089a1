"""What a batched view costs: against the transforms of other libraries, and as a share of a training step.

    python benchmarks/augmentation.py [--quick] [--device cpu] [--threads 1] [--seed 0]

Every implementation starts from uint8 images and ends with a float batch in [0, 1]. torchvision runs image by image,
on tensors and on PIL images (converted beforehand) on the CPU; kornia runs its own batched transforms. The training step is SGD
on a CIFAR-size ResNet-18: timm's, with a 3x3 stem of stride 1 and no pooling. Its forward pass is the floor.
"""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as kornia
import timm
import torch
import torchvision.transforms.v2 as torchvision
from timing import hardware_line, interleaved, options
from torch import Tensor, nn

from advml.config import View
from advml.data.augment import view

BATCH = 128
TARGET = 0.15  # of a training step
OURS = "advml, batched"
JITTER = (0.4, 0.4, 0.4, 0.1)
VIEWS = {
    "supervised, 3x32x32": View(pad=4, flip=0.5),
    "SimCLR, 3x32x32": View(resized_crop=(0.2, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2),
    "digits, 1x8x8": View(rotation=20, scale=(0.8, 1.2), shift=0.15, brightness=0.4),
}
TORCHVISION = {
    "supervised, 3x32x32": [torchvision.RandomCrop(32, padding=4), torchvision.RandomHorizontalFlip()],
    "SimCLR, 3x32x32": [
        torchvision.RandomResizedCrop(32, scale=(0.2, 1)),
        torchvision.RandomHorizontalFlip(),
        torchvision.RandomApply([torchvision.ColorJitter(*JITTER)], p=0.8),
        torchvision.RandomGrayscale(p=0.2),
    ],
    "digits, 1x8x8": [
        torchvision.RandomAffine(20, translate=(0.15, 0.15), scale=(0.8, 1.2), interpolation=torchvision.InterpolationMode.BILINEAR),
        torchvision.ColorJitter(brightness=0.4),
    ],
}
KORNIA = {
    "supervised, 3x32x32": [kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()],
    "SimCLR, 3x32x32": [
        kornia.RandomResizedCrop((32, 32), scale=(0.2, 1)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(*JITTER, p=0.8),
        kornia.RandomGrayscale(p=0.2),
    ],
    "digits, 1x8x8": [
        kornia.RandomAffine(20, translate=(0.15, 0.15), scale=(0.8, 1.2), p=1.0),
        kornia.RandomBrightness((0.6, 1.4), p=1.0),
    ],
}


def implementations(name: str, generator: torch.Generator, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The same view four times over, each a call from uint8 images to a float batch."""
    shape = (1, 8, 8) if "1x8x8" in name else (3, 32, 32)
    images = torch.randint(0, 256, (BATCH, *shape), dtype=torch.uint8, generator=generator)
    pictures = [torchvision.functional.to_pil_image(image) for image in images]
    to_float = torchvision.ToDtype(torch.float32, scale=True)
    per_image = torchvision.Compose([*TORCHVISION[name], to_float])
    per_picture = torchvision.Compose([*TORCHVISION[name], torchvision.ToImage(), to_float])
    batched = nn.Sequential(*KORNIA[name])
    on_device = images.to(device)
    return {
        OURS: lambda: view(on_device.float() / 255, VIEWS[name], generator=generator),
        "torchvision, tensors": lambda: torch.stack([per_image(image) for image in images]),
        "torchvision, PIL": lambda: torch.stack([per_picture(picture) for picture in pictures]),
        "kornia, batched": lambda: batched(on_device.float() / 255),
    }


def resnet18() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def step_tasks(generator: torch.Generator, device: torch.device) -> dict[str, Callable[[], object]]:
    """One forward pass, one training step, and the two CIFAR views of the same batch."""
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(BATCH, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (BATCH,), generator=generator).to(device)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    views = {name: (lambda spec=spec: view(images, spec, generator=generator)) for name, spec in VIEWS.items() if "32x32" in name}
    return {"forward": forward, "step": step, **views}


def compare(rounds: int, generator: torch.Generator, device: torch.device) -> None:
    print("| view of 128 images | implementation | milliseconds | times ours |\n|---|---|---|---|")
    for name in VIEWS:
        times = interleaved(implementations(name, generator, device), rounds, warm_up=2)
        for who, timing in times.items():
            print(f"| {name} | {who} | {timing.milliseconds} | {timing.over(times[OURS])} |")


def share(rounds: int, generator: torch.Generator, device: torch.device) -> None:
    times = interleaved(step_tasks(generator, device), rounds)
    print("| ResNet-18, batch 128 of 3x32x32 | milliseconds | share of a step, % | in forward passes |\n|---|---|---|---|")
    for name, timing in times.items():
        part = timing.over(times["step"]).show(unit=0.01)
        print(f"| {name} | {timing.milliseconds} | {part} | {timing.over(times['forward'])} |")
    for name in VIEWS:
        if name not in times:
            continue
        part = times[name].over(times["step"]).median
        verdict = "met" if part <= TARGET else "missed"
        print(f"\nTarget for the view {name}: at most {TARGET:.0%} of a step; {verdict} with {part:.2%}.")


def main() -> None:
    parser = options("What a batched view costs.", quick="fewer rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)  # torchvision and kornia draw from the global generator
    generator = torch.Generator().manual_seed(arguments.seed)
    rounds, steps = (5, 2) if arguments.quick else (30, 7)
    print(f"## Augmentation\n\n{hardware_line('torchvision', 'kornia', 'timm')}; device {arguments.device}; seed {arguments.seed}.")
    print(f"Median (quartiles) of {rounds} interleaved rounds; {steps} for the training step.\n")
    compare(rounds, generator, arguments.device)
    print()
    share(steps, generator, arguments.device)


if __name__ == "__main__":
    main()
