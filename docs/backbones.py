"""Writes docs/backbones.md: which timm networks train on which sizes of images, each tried in a process of its own.

python docs/backbones.py                            # all of them: about an hour of one core, and 8 GB of memory
python docs/backbones.py swin_tiny_patch4_window7_224 repvgg_a0     # prints the rows of these alone
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from advml.core.errors import UserError
from advml.models.bn_folding import folded
from advml.models.layers import dual
from advml.models.memory_format import place
from advml.models.network import Architecture, Network, build, load, save
from advml.models.trial_step import try_step
from advml.similarity.layers import layers

PAGE = Path(__file__).with_suffix(".md")
SIZES = (32, 64, 224)
SECONDS = 900  # for one network at all sizes

# timm's module -> a small network of it, or several of different kinds. deepseek_vit's smallest, of 412 million weights, is left out.
NETWORKS = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet26t botnet26t_256 lambda_resnet26t",
    "byobnet": "test_byobnet repvgg_a0 mobileone_s0 gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet efficientnet_b0 mobilenetv2_035 mnasnet_small",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256",
    "metaformer": "poolformerv2_s12 caformer_s18",
    "mlp_mixer": "gmlp_ti16_224 mixer_s32_224 resmlp_12_224",
    "mobilenetv3": "lcnet_035 mobilenetv3_small_050 mobilenetv4_conv_small_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet resnet18",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p16_224",
}
HEAD = """# Backbones

Networks of every module of timm {timm} with `model.stem: native`, tried with PyTorch {torch} on a CPU by [backbones.py](backbones.py) at
{sizes} pixels.

- "yes": the network is built, and an attacked training step runs: gradients with respect to images and weights.
- Numbers: `advml pretrain` refuses images of that size in one line, which names these sizes. They stand for others nearby.
- Remarks: what fails afterwards, of these: gradients in the network's memory layout are those of the contiguous one to 3 %, which is
  rounding and ReLUs near zero; a saved network loads; folded and dual batch norms; blocks for CKA.

Other networks of a module mostly do as their relatives do; `advml pretrain` tries a step of each before it trains.

| module | network | {columns} | remarks |
|---|---|{rules}---|
"""


def network(backbone: str, size: int) -> Network:
    return build(Architecture(backbone, "native", {}, 3, size, (0.5,) * 3, (0.3,) * 3, 10, None, False, False), seed=0)


def tried(backbone: str, size: int) -> tuple[str, Network | None]:
    """A cell of the table and, where it is "yes", the network."""
    try:
        built = network(backbone, size)
        try_step(built, count=2)
    except UserError as error:
        sizes = re.search(r"data.image_size = ([\d, ]+)", str(error))
        return (sizes[1] if sizes else "no"), None
    return "yes", built


def layout_error(built: Network) -> float:
    """Largest relative difference between the gradients in the network's layout and in the contiguous one.

    The smallest of three batches: rounding alone may take a ReLU across zero, but not each time.
    """
    batches = [torch.rand(4, *built.image_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [gradients(built.eval(), images) for images in batches]
    place(built, torch.device("cpu"))
    found = [gradients(built, images.to(memory_format=torch.channels_last)) for images in batches]
    return min(_difference(*pair) for pair in zip(found, expected, strict=True))


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    floor = 1e-5 * max(float(gradient.norm()) for gradient in expected)
    return max(float((one - other).norm()) / max(floor, float(other.norm())) for one, other in zip(found, expected, strict=True))


def gradients(built: Network, images: Tensor) -> list[Tensor]:
    """With respect to the images and to every weight that has a part in the logits."""
    images = images.clone().requires_grad_()
    built.eval().zero_grad()  # eval: layers drop what they keep of the last graph
    built(images).square().sum().backward()
    return [images.grad, *(parameter.grad.clone() for parameter in built.parameters() if parameter.grad is not None)]


def remarks(built: Network) -> list[str]:
    """What else a study does with a network: files, layers for CKA, folded and dual batch norms."""
    found = [f"WRONG gradients ({error:.0e})"] if (error := layout_error(built)) > 0.03 else []
    images = torch.rand(2, *built.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = built(images)
        with folded(built.encoder, built.image_shape):
            if not torch.allclose(built(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                found.append("folded batch norms change it")
    with tempfile.TemporaryDirectory() as folder:
        save(built, Path(folder), {})
        if not torch.allclose(load(folder).eval()(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            found.append("changes when saved")
    try:
        layers(built, images)
    except UserError:
        found.append("no blocks: set `similarity.layers`")
    try:
        dual(built.encoder).train()(built.normalize(images))
    except Exception as error:
        found.append(f"no dual batch norm ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
    return found


def row(backbone: str, connection: Connection) -> None:
    """Sends the cells, one by one, then the remarks."""
    warnings.simplefilter("ignore")
    first = None
    for size in SIZES:
        cell, built = tried(backbone, size)
        connection.send(cell)
        first = first or built
    connection.send("; ".join(remarks(first)) if first else "")


def cells(backbone: str) -> list[str]:
    """Of one network, from a process of its own: it may be killed by what it tries."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=row, args=(backbone, sender))
    process.start()
    sender.close()
    found: list[str] = []
    try:
        while len(found) <= len(SIZES) and receiver.poll(SECONDS):
            found.append(receiver.recv())
    except EOFError:
        pass
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
    return found + [f"DIES ({process.exitcode})"] * (len(SIZES) + 1 - len(found))


def main() -> None:
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    lines = []
    for module, names in NETWORKS.items():
        for backbone in names.split():
            if not chosen or backbone in chosen:
                lines.append(f"| {module} | {backbone} | {' | '.join(cells(backbone))} |")
                print(lines[-1], flush=True)
    if not chosen:
        head = HEAD.format(
            timm=version("timm"),
            torch=torch.__version__.partition("+")[0],
            sizes=", ".join(map(str, SIZES[:-1])) + f" and {SIZES[-1]}",
            columns=" | ".join(map(str, SIZES)),
            rules="---|" * len(SIZES),
        )
        PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
