"""The command line: one command per DVC stage, and what people do beside the pipeline.

Nothing heavy is imported up here: `advml --help` must answer at once. Commands import what they need.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer

from advml import __version__, cli_tune
from advml.config import PhaseName, RegimeName, SchemeName, dump, load
from advml.errors import Failure, UserError
from advml.paths import Workspace, model_name, pretraining_name

if TYPE_CHECKING:
    from advml.config import Config
    from advml.stages.context import Context

app = typer.Typer(
    help="Robustness and representations of supervised and contrastive networks. Start with: advml preset digits > params.yaml",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
STAGES, EVERYDAY = "Stages of the pipeline (dvc repro runs them)", "Beside the pipeline"

app.add_typer(cli_tune.app, name="tune", rich_help_panel=EVERYDAY)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a parameter, e.g. -S threat_model.epsilon=8/255.")
]
Params = Annotated[Path, typer.Option("--params", help="The configuration file.")]
Scheme = Annotated[
    SchemeName, typer.Argument(help="SL supervised, CL contrastive (SimCLR), SCL supervised contrastive (SupCon).", show_default=False)
]
Regime = Annotated[
    RegimeName, typer.Argument(help="Standard or adversarial training; Partial-AT and Full-AT fine-tune under attack.", show_default=False)
]
Phase = Annotated[PhaseName, typer.Argument(help="st: standard, at: adversarial.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights, batches, views and random starts.")]
PARAMS = Path("params.yaml")


def _context(params: Path, overrides: list[str] | None) -> Context:
    configuration = load(params, overrides or [])
    print(f"# resolved configuration\n{dump(configuration)}", file=sys.stderr, flush=True)
    from advml.stages.context import Context

    return Context(configuration, Workspace(params.parent))


def _say(outputs: str, next_command: str) -> None:
    print(f"wrote {outputs}\nnext: {next_command}", flush=True)


def _percent(metrics: dict[str, float]) -> str:
    shown = {
        name.removeprefix("accuracy/").replace("corruption/mean", "corrupted"): value
        for name, value in metrics.items()
        if (name.startswith("accuracy/") or name == "corruption/mean") and name.count("/") == 1
    }
    return "  ".join(f"{name} {100 * value:.1f} %" for name, value in shown.items())


@app.command(rich_help_panel=STAGES)
def prepare(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Turn images of any source into tensors with fixed splits.

    Writes data/prepared/ ({train,validation,test}.safetensors, dataset.json). Next: advml pretrain SL st
    """
    context = _context(params, overrides)
    from advml.stages import prepare as stage

    dataset = stage.run(context)
    counts = ", ".join(f"{len(getattr(dataset, split).labels)} {split}" for split in ("train", "validation", "test"))
    skipped = f"; {len(dataset.skipped)} unreadable images left out" if dataset.skipped else ""
    print(f"{dataset.source}: {counts} images of {len(dataset.classes)} classes{skipped}")
    _say(str(context.workspace.prepared), "advml pretrain SL st")


@app.command(rich_help_panel=STAGES)
def pretrain(scheme: Scheme, phase: Phase, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Train an encoder with its scheme's own head, with or without an adversary.

    Writes models/pretrain/<SCHEME>-<PHASE>-s<SEED>/ and its curves in reports/. Next: advml finetune SCHEME REGIME
    """
    context = _context(params, overrides)
    from advml.stages import pretrain as stage
    from advml.training.regimes import REGIMES

    stage.run(context, scheme=scheme, phase=phase, seed=seed)
    regimes = [name for name, regime in REGIMES.items() if regime.pretraining == phase]
    _say(str(context.workspace.pretrained(pretraining_name(scheme, phase, seed))), f"advml finetune {scheme} {regimes[-1]} --seed {seed}")


@app.command(rich_help_panel=STAGES)
def finetune(scheme: Scheme, regime: Regime, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Make a classifier from a pretrained encoder.

    Writes models/finetune/<SCHEME>-<REGIME>-s<SEED>/ and its curves in reports/. Next: advml evaluate SCHEME REGIME
    """
    context = _context(params, overrides)
    from advml.stages import finetune as stage

    stage.run(context, scheme=scheme, regime=regime, seed=seed)
    _say(str(context.workspace.model(model_name(scheme, regime, seed))), f"advml evaluate {scheme} {regime} --seed {seed}")


@app.command(rich_help_panel=STAGES)
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCHEME|MODEL",
            help="SL, CL or SCL, with a regime. Or anyone's model: a folder with model.json, a timm name, or module:function.",
            show_default=False,
        ),
    ],
    regime: Annotated[RegimeName | None, typer.Argument(help="Of the scheme's model.", show_default=False)] = None,
    seed: Seed = 0,
    weights: Annotated[Path | None, typer.Option(help="Of a timm model: a safetensors file with timm's own names.")] = None,
    normalize: Annotated[
        Literal["timm", "data", "none"], typer.Option(help="A timm model expects images less timm's mean, the data's, or as they are.")
    ] = "timm",
    name: Annotated[str | None, typer.Option(help="Of anyone's model, for its files.")] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure clean, robust and worst-case accuracy on the test split.

    Writes reports/<MODEL>/metrics.json and samples.parquet, records/evaluate/<MODEL>.json. Next: advml show MODEL
    """
    if target in get_args(SchemeName) and regime is None:
        raise UserError(f"evaluate {target}: which regime? Choose from {', '.join(get_args(RegimeName))}")
    context = _context(params, overrides)
    from advml.stages import evaluate as stage

    own = {"scheme": target, "regime": regime, "seed": seed} if regime else stage.of_study(context.workspace, target)
    if own is None or name:
        return _evaluate_given(target, weights, normalize, name, context)
    metrics = stage.run(context, **own)
    model = model_name(**own)
    print(f"{model}: {_percent(metrics)}")
    _show_flags(context.workspace.record("evaluate", model))
    return _say(str(context.workspace.report(model)), f"advml show {model}")


def _show_flags(record: Path) -> None:
    from json import loads

    from advml.show import flags_of

    print("\n".join(flags_of(loads(record.read_text(encoding="utf-8")))))


def _evaluate_given(target: str, weights: Path | None, normalize: Any, name: str | None, context: Context) -> None:
    from dataclasses import replace

    from advml.networks.given import load
    from advml.stages import evaluate as stage

    given = load(target, weights=weights, normalization=normalize, spec=context.config.model, dataset=context.dataset)
    given = replace(given, name=name) if name else given
    if given.data and given.data != context.dataset.digest:
        print(f"{given.name} was trained on other data: test images may be among those it has learnt from", file=sys.stderr)
    metrics = stage.run_given(context, given)
    print(f"{given.name}: {_percent(metrics)}")
    _show_flags(context.workspace.report(given.name) / "evaluation.json")
    _say(f"{context.workspace.report(given.name)}/metrics.json, evaluation.json, samples.parquet", "make ui")


@app.command(rich_help_panel=STAGES)
def represent(scheme: Scheme, regime: Regime, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Measure how alike a model's layers are (CKA), clean and attacked, and what linear probes read from them.

    Writes reports/<MODEL>/: cka.npz, cka.json, cka.png, layers.png, metrics.json. Next: advml compare
    """
    context = _context(params, overrides)
    from advml.stages import represent as stage

    metrics = stage.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    told = {
        label: metrics.get(f"cka/{key}") for label, key in (("redundancy", "redundancy"), ("clean-adversarial CKA", "clean_adversarial"))
    }
    print(f"{name}: {'  '.join(f'{label} {value:.3f}' for label, value in told.items() if value is not None)}")
    _say(f"{context.workspace.report(name)}/cka.npz, cka.json, cka.png, layers.png", "advml compare")


@app.command(rich_help_panel=STAGES)
def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Names or folders of models, each compared with each; none: the panels of the paper.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="reports/compare")] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure how alike the layers of different models are (CKA), on clean and on adversarial images.

    Writes reports/compare/: cka.npz, cka.json, clean.png, adversarial.png. Next: advml report
    """
    context = _context(params, overrides)
    from advml.stages import compare as stage

    out = out or context.workspace.reports / ("compare" if not models else "compare-" + "-".join(Path(model).name for model in models))
    stage.run(context, chosen=tuple(models or ()), out=out)
    _say(f"{out}/cka.npz, cka.json, clean.png, adversarial.png", f"open {out}/clean.png" if models else "advml report")


@app.command(rich_help_panel=STAGES)
def transfer(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Score the adversarial images of each model of the grid on every other model of its seed.

    Writes reports/transfer/: transfer.json, transfer.csv, transfer.png. Next: advml report
    """
    context = _context(params, overrides)
    from advml.evaluation.transfer_files import NOBODY
    from advml.stages import transfer as stage

    blocks = stage.run(context)
    for block in blocks:
        flagged = ", ".join(flag["model"] for flag in block["flags"]) or "none"
        print(f"seed {block['seed']}: {len(block['models'])} models; flagged because of others' images: {flagged}")
    files = ", ".join(stage.FILES) if blocks else f"{stage.FILES[0]} ({NOBODY})"
    _say(f"{context.workspace.report('transfer')}/{files}", "advml report")


@app.command(rich_help_panel=STAGES)
def report(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Gather all measured models into a table, test the paper's claims on them, and tell it all on one page.

    Writes reports/report.html, claims.json, summary.csv, summary.md and summary.png. Next: make ui
    """
    context = _context(params, overrides)
    from advml.stages import report as stage

    table = stage.run(context)
    _show_table(context.config, context.workspace)
    _say(
        f"{context.workspace.reports}/report.html, claims.json, summary.csv, summary.md, summary.png",
        "make ui   (compare the runs in MLflow), or: advml show " + table[-1]["model"],
    )


def _show_table(configuration: Config, workspace: Workspace) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.table import Table

    from advml.report.table import COLUMNS, NORM_NAMES, cell, footnote, grid_rows

    norm, epsilon = NORM_NAMES[configuration.threat_model.norm], configuration.attacked_epsilon
    title = f"Accuracy in %, 95 % intervals; threat models I and II, and the worst case over all attacks, at {norm} epsilon {epsilon:.4g}"
    shown = Table(title=title)
    for header in ("model", *COLUMNS):
        shown.add_column(header, justify="left" if header == "model" else "right")
    rows = grid_rows(configuration, workspace)
    for row in rows:
        shown.add_row(row["model"], *(cell(row, metric) for metric in COLUMNS.values()))
    if note := footnote(rows):
        shown.caption, shown.caption_justify = note, "left"
    Console(width=None if sys.stdout.isatty() else 178).print(shown)
    return rows


@app.command(rich_help_panel=EVERYDAY)
def train(scheme: Scheme, regime: Regime, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Do for one model what prepare, pretrain, finetune and evaluate do; what is up to date is not done again.

    Writes what those stages write. Next: advml show MODEL
    """
    context = _context(params, overrides)
    from advml.stages import train as everything

    metrics = everything.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    print(f"{name}: {_percent(metrics)}")
    _say(f"{context.workspace.model(name)}, {context.workspace.report(name)}", f"advml show {name}")


@app.command(rich_help_panel=EVERYDAY)
def show(
    model: Annotated[str, typer.Argument(help="A model's name (CL-Full-AT-s0) or folder.", show_default=False)],
    params: Annotated[
        Path, typer.Option("--params", help="The configuration file beside the models' folder; only its place counts.")
    ] = PARAMS,
) -> None:
    """Print a model's record: what it was made from, how, and how well it does.

    Writes nothing. Next: advml attack IMAGE --model MODEL
    """
    from advml.show import record_of

    print(record_of(Workspace(params.parent), model))
    print(f"next: advml attack IMAGE --model {model}")


@app.command(rich_help_panel=EVERYDAY)
def attack(
    image: Annotated[Path, typer.Argument(help="Any image file.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's name (CL-Full-AT-s0) or folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("attack.png"),
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Attack one image and draw what happened: original, perturbation, adversarial image, predictions.

    Writes attack.png. Next: the same image against a model of another regime
    """
    context = _context(params, overrides)
    from advml.picture import attack_picture

    told = attack_picture(context, image, model=model, out=out)
    print(told)
    _say(str(out), f"advml show {model}")


@app.command(rich_help_panel=EVERYDAY)
def preset(
    name: Annotated[str, typer.Argument(help="digits, cifar10, cifar100 or folder.", show_default=False)],
    protocol: Annotated[str, typer.Option(help="corrected (ours) or paper.")] = "corrected",
    overrides: Overrides = None,
) -> None:
    """Print a complete params.yaml.

    Writes to standard output. Next: advml preset cifar10 > params.yaml && dvc repro
    """
    from advml.presets import preset as text

    print(text(name, protocol=protocol, overrides=overrides or ()), end="")


@app.command(rich_help_panel=EVERYDAY)
def sync(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Rebuild MLflow runs that are missing, from files: after dvc pull, a run-cache hit, or a server's outage.

    Writes to the MLflow store only. Next: make ui
    """
    configuration = load(params, overrides or [])
    from advml import tracking

    made = tracking.sync(configuration, root=params.parent)
    print(f"{len(made)} runs rebuilt{': ' if made else ''}{', '.join(made)}\nnext: make ui")


@app.command(rich_help_panel=EVERYDAY)
def link(
    port: Annotated[int, typer.Option(help="Of the local server.")] = 5000, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Print the address of this study's runs in the MLflow UI.

    Writes nothing. Next: make ui
    """
    configuration = load(params, overrides or [])
    from advml import tracking

    print(f"MLflow: {tracking.ui_link(configuration, root=params.parent, port=port)}", flush=True)


@app.command(rich_help_panel=EVERYDAY)
def ui(
    port: Annotated[int, typer.Option(help="Of the local server.")] = 5000, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Open MLflow on this study's runs until Ctrl-C, and print the link to their table.

    Writes nothing. Next: the link, in a browser
    """
    configuration = load(params, overrides or [])
    from advml import tracking

    command = tracking.ui_command(configuration, root=params.parent, port=port)  # before the store is opened, which quietens MLflow
    print(f"MLflow: {tracking.ui_link(configuration, root=params.parent, port=port)}", flush=True)
    if command is None:
        print("this is a server's address: open it in a browser")
    else:
        arguments, environment = command
        os.execve(arguments[0], arguments, environment)


@app.command(rich_help_panel=EVERYDAY)
def repro(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Stages at a time.")] = 2,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Run what has changed, as dvc repro does, several stages at a time; end with the table.

    Writes what the stages write. Next: make ui
    """
    if overrides or params.name != PARAMS.name:
        raise UserError(
            "advml repro runs the pipeline, and DVC reads params.yaml: edit that, or try a variation with: dvc exp run -S key=value"
        )
    configuration = load(params)  # a mistake in it should not wait for the first stage that reads it
    from advml.repro import repro as run

    started = time.monotonic()
    ran = run(params.parent, jobs=jobs)
    print(f"{len(ran)} stages ran in {time.monotonic() - started:.0f} s" if ran else "everything is up to date")
    rows = _show_table(configuration, Workspace(params.parent))
    print("next: open reports/report.html     the whole study on one page")
    print("      make ui                      compare the runs in MLflow")
    print(f"      advml show {rows[-1]['model']:18}what a model was made from, and how well it does")
    print("      dvc plots show               training curves and the result chart as a page")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"advml {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main() -> None:
    """Entry point: one line for every foreseeable error; exit code 2 for the user's mistakes, 1 for failures."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    guarded(lambda: app(args=sys.argv[1:] or ["--help"], standalone_mode=False))


def guarded(command: Callable[[], Any]) -> None:
    """Run `command`, turning what people can understand into one line on stderr."""
    interrupted = "interrupted; the same command continues from the last finished epoch"
    try:
        code = command()
    except typer.TyperException as error:  # a wrong argument or option
        _fail(" ".join(error.format_message().split()), code=error.exit_code)
    except UserError as error:
        _fail(str(error), code=2)
    except Failure as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        _fail(interrupted, code=130)
    except MemoryError:
        _fail("out of memory; lower batch_size in params.yaml", code=1)
    except Exception as error:
        if (line := _known(error)) is None:
            raise
        _fail(line, code=1)
    if code == 130:  # typer turns Ctrl-C into this exit code
        _fail(interrupted, code=130)
    sys.exit(code if isinstance(code, int) else 0)


def _known(error: Exception) -> str | None:
    """A line for errors of the machine that surface under several types."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "the disk is full; free some space and run the same command again: it continues from the last finished epoch"
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "out of memory; lower batch_size in params.yaml (the phase's section, or evaluate) or use a smaller model.backbone"
    if isinstance(error, PermissionError):
        return f"no permission: {error}"
    return None


def _fail(line: str, *, code: int) -> NoReturn:
    print(f"advml: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
