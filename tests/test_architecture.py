"""The rules of the house: imports point one way, heavy ones stay where they belong, every DVC stage is a command and a file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from advml.cli import app

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "advml"

# From the command line down. A module imports from its own layer or from lower ones, never upwards.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__", "cli"),
    ("api",),
    ("tuning",),
    ("pipeline",),
    ("engine", "servers"),
    ("claims", "report", "tracking"),
    ("similarity",),
    ("evaluation",),
    ("training",),
    ("attacks",),
    ("models", "data", "figures"),
    ("__init__", "config", "core", "recipes"),
)
EXCEPTIONS = {
    "advml.engine.fork_server": {"advml.cli"},  # a forked child runs the command line, as __main__ does
}
# Library -> the only modules that may import it, anywhere in the file.
OWNERS = {
    "mlflow": "tracking",
    "optuna": ("tuning", "figures"),
    "typer": "cli",
    "timm": "models",
    "matplotlib": ("api", "figures", "pipeline", "report"),
    "dvc": "engine",
    "distributed": ("engine", "pipeline"),
    "pyautoattack": "attacks",
    "foolbox": "attacks",
}
# Packages whose functions take sections and small values, never the whole of params.yaml.
RESOLVED = ("attacks", "claims", "evaluation", "figures", "models", "report", "servers", "similarity", "tracking", "training")
# What `advml --help` reads, in 0.3 s.
AT_ONCE = (
    "advml",
    "advml.cli",
    "advml.core.errors",
    "advml.core.messages",
    "advml.core.passwords",
    "advml.core.paths",
    "advml.engine.fork_server",
    "advml.recipes",
)
LIGHT = (*AT_ONCE, "advml.config", "advml.config.presets", "advml.core.progress", "advml.pipeline.repro", "advml.report.show")
# What is imported in functions, or for types alone, because it would take too long otherwise; all else is imported at the top.
LATE_LIBRARIES = {
    "dask, distributed": "1.4 s, for commands that run stages or trials",
    "eagerpy, foolbox, onnxruntime, onnxscript": "optional",
    "mlflow": "2 s, once a store is opened",
    "optuna": "its figures, 1 s",
    "pyarrow": "for types",
    "PIL": "where pictures are logged",
    "rich": "0.2 s, where something is drawn",
    "ruamel": "0.2 s, where YAML is read",
    "filelock, sqlalchemy": "0.6 s, where a database is opened",
    "sklearn": "2 s, for the digits",
    "torch": "2 s; for types, in modules that need no torch",
    "torchvision": "2 s, for a download",
    "werkzeug": "0.2 s, for the server's password",
}
LATE_MODULES = {
    "advml": "`import advml` takes no torch before a model is loaded",
    "advml.__main__": "a command is sent to the fork server, where there is one, before typer is imported",
    "advml.api.layers": "matplotlib, 0.5 s, where a heat map is drawn",
    "advml.cli": "`advml --help` answers in 0.3 s: a command imports what it runs",
    "advml.engine.fork_server": "what it imports is what it is a server of",
    "advml.engine.process_task": "for types: the engine's own parts, which import distributed",
    "advml.tracking.sync": "matplotlib, 0.5 s, once there are curves to log",
    "advml.tuning": "the driver of a search imports no torch, which trials do",
}
DRIVER = ("advml.tuning.attack_search", "advml.tuning.training_search", "advml.tuning.command")
HEAVY = ("torch", "torchvision", "timm", "mlflow", "kornia", "sklearn", "matplotlib", "pandas", "dvc", "numpy")


def name_of(path: Path) -> str:
    """src/advml/data/augment.py -> advml.data.augment"""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def top(module: str) -> str:
    """advml.data.augment -> data: what LAYERS speaks of."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports(module: str, *, for_types: bool = False) -> frozenset[str]:
    """Full names of what a module imports, in functions too; names imported from our packages are resolved to modules.

    Without `for_types`, blocks under `if TYPE_CHECKING` do not count: they are never executed.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    never = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not for_types
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in never:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            others = [alias for alias in node.names if f"{node.module}.{alias.name}" not in MODULES]
            found |= submodules | ({node.module} if others else set())
    return frozenset(found)


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if top(module) in names)


def test_every_module_has_a_layer():
    placed = [name for names in LAYERS for name in names]
    assert {top(module) for module in MODULES} <= set(placed)
    assert len(placed) == len(set(placed))


def test_imports_point_down():
    """`advml/__init__.py` is left out: `load_model` reaches into the library for the outside world, when it is called."""
    upwards = {
        module: [other for other in imports(module, for_types=True) if other in MODULES and layer(other) < layer(module)]
        for module in MODULES.keys() - {"advml"}
    }
    assert not {module: found for module, found in upwards.items() if not set(found) <= EXCEPTIONS.get(module, set())}


def test_what_is_below_the_stages_takes_resolved_settings_and_not_the_whole_of_params_yaml():
    texts = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items() if top(module) in RESOLVED}
    assert not [module for module, text in texts.items() if re.search(r"\bConfig\b", text)]


def test_no_two_modules_import_each_other_in_a_circle():
    def reach(module: str, seen: frozenset[str] = frozenset()) -> None:
        assert module not in seen, f"a circle of imports through {module}"
        for other in (imports(module) & MODULES.keys()) - {"advml"} - EXCEPTIONS.get(module, set()):
            reach(other, seen | {module})

    for module in MODULES.keys() - {"advml"}:
        reach(module)


def late_imports(module: str) -> set[str]:
    """What a module imports below its top level: in functions, and under `if TYPE_CHECKING`."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body]
    return {name for node in found for name in ([node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])}


def test_what_is_not_imported_at_the_top_has_a_reason():
    libraries = {name for names in LATE_LIBRARIES for name in names.split(", ")}
    for module in MODULES:
        late = {name for name in late_imports(module) if name.split(".")[0] not in libraries}
        known = any(module == one or (one != "advml" and module.startswith(f"{one}.")) for one in LATE_MODULES)
        assert known or not late, (module, late)


def test_a_library_is_imported_by_its_owner_alone():
    for library, owners in OWNERS.items():
        users = {top(module) for module in MODULES for name in imports(module, for_types=True) if name.split(".")[0] == library}
        assert users == {owners} if isinstance(owners, str) else users <= set(owners), (library, users)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(AT_ONCE, (*HEAVY, "pydantic")), (LIGHT, HEAVY), (DRIVER, ("torch", "mlflow", "matplotlib", "sklearn", "timm"))],
    ids=["at once", "light", "driver of a search"],
)
def test_what_must_answer_at_once_imports_nothing_heavy(modules, heavy):
    """In a process of its own: here, everything is imported already."""
    code = (
        f"import importlib, sys\nfor module in {modules!r}:\n    importlib.import_module(module)\n"
        f"    print(module, *[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == list(modules)


# Stages


@cache
def pipeline() -> dict[str, dict]:
    return YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]


STAGES = sorted(pipeline())


def stage_module(stage: str) -> str:
    """finetune_at -> advml.pipeline.stages.finetune"""
    return f"advml.pipeline.stages.{stage.partition('_')[0]}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_command_and_a_file(stage):
    name = stage.partition("_")[0]
    commands = [command.name for command in app.registered_commands]
    assert name in commands
    assert stage_module(stage) in MODULES
    command = 'stage "$DVC_STAGE"' if "matrix" in pipeline()[stage] else name
    assert pipeline()[stage]["cmd"] == f"PYTHONPATH=src python -m advml {command}"


def test_a_file_in_stages_is_a_command():
    names = {module.removeprefix("advml.pipeline.stages.") for module in MODULES if module.startswith("advml.pipeline.stages.")}
    assert names <= {command.name for command in app.registered_commands}


# A stage runs again when a file among its `deps` changes. These modules are left out on purpose, because an edit
# of them cannot change a result, or is seen elsewhere; everything else that a stage imports must be listed.
NEUTRAL = {
    "advml": "version, and names of the API that are imported when asked for",
    "advml.config": "its values are tracked one by one, under `params`; the rest is words of error messages",
    "advml.core": "an empty package",
    "advml.core.errors": "two exceptions",
    "advml.core.exclusive": "lets one command at a time work",
    "advml.core.io": "reads and writes whole files",
    "advml.core.memory": "refuses what does not fit",
    "advml.core.messages": "how messages are printed",
    "advml.core.passwords": "what is left out of messages",
    "advml.core.paths": "names of outputs, which dvc.yaml repeats: a change of one alone fails at once",
    "advml.core.processes": "names and ends processes",
    "advml.core.progress": "bars",
    "advml.core.provenance": "names the code, does not compute",
    "advml.core.signals": "how a run ends early",
    "advml.core.training_cost": "notes and adds up what trainings took",
    "advml.pipeline": "an empty package",
    "advml.pipeline.stages": "an empty package",
    "advml.tracking": "written to, never read from",
}
PACKAGES = ("advml", "advml.core", "advml.pipeline", "advml.pipeline.stages")  # of which the empty __init__ alone is meant
CURVES = {"advml.figures": "draws the run's curves for MLflow, which no later stage reads"}
NEUTRAL_FOR = {
    "pretrain": CURVES,
    "finetune": CURVES,
    "prepare": {"advml.pipeline.context": "takes configuration and folders from it, no machine and no network"},
    "report": {"advml.pipeline.context": "takes configuration and folders from it, no machine and no network"},
}


def is_neutral(module: str, stage: str) -> bool:
    known = NEUTRAL.keys() | NEUTRAL_FOR.get(stage.partition("_")[0], {}).keys()
    return any(module == name or (name not in PACKAGES and module.startswith(f"{name}.")) for name in known)


def closure(module: str, stage: str) -> set[str]:
    """The modules that a module executes, itself included; not through neutral ones."""
    found, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current in found or is_neutral(current, stage):
            continue
        found.add(current)
        waiting += imports(current) & MODULES.keys()
        waiting += [".".join(current.split(".")[:end]) for end in range(1, current.count(".") + 1)]  # packages above it
    return found


def dependencies(stage: str) -> set[str]:
    """The modules that lie under a stage's `deps`."""
    paths = [REPOSITORY / path for path in pipeline()[stage]["deps"] if path.startswith("src/")]
    return {module for module, file in MODULES.items() if any(file == path or path in file.parents for path in paths)}


@pytest.mark.parametrize("stage", STAGES)
def test_the_dependencies_of_a_stage_cover_what_it_executes(stage):
    missing = closure(stage_module(stage), stage) - dependencies(stage)
    assert not missing, f"dvc.yaml: {stage} lacks {', '.join(sorted(missing))} under deps"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_file_that_it_does_not_execute(stage):
    """Else an edit would cost hours for nothing. Packages are listed whole."""
    files = {path for path in pipeline()[stage]["deps"] if path.endswith(".py")}
    assert all((REPOSITORY / path).is_file() for path in files)
    idle = {name_of(REPOSITORY / path) for path in files} - closure(stage_module(stage), stage) - NEUTRAL.keys()
    assert not idle, f"dvc.yaml: {stage} need not depend on {', '.join(sorted(idle))}"


def test_every_reason_for_leaving_a_module_out_is_about_a_module_that_exists():
    named = NEUTRAL.keys() | {name for names in NEUTRAL_FOR.values() for name in names}
    assert named <= MODULES.keys()
