"""The command line: exit codes, one line for every foreseeable error, and help that says what comes next."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from advml.cli import app, guarded
from advml.config.presets import preset
from advml.core.errors import Failure, UserError
from advml.pipeline import estimate as estimates
from advml.servers import mlflow_ui

REPOSITORY = Path(__file__).parents[1]
COMMANDS = [command.name for command in app.registered_commands]


# Help


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["--version"], ["pretrain", "--help"], ["preset", "cifar10"], ["show", "CL-AT-s0"], ["pretrain", "X", "st"]],
)
def test_what_needs_no_network_answers_without_importing_torch(arguments, tmp_path):
    code = (
        "import sys\nfrom advml import cli\ntry:\n    cli.main()\nfinally:\n"
        "    print([name for name in ('torch', 'mlflow', 'timm', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


# Output


@pytest.fixture
def digits(tmp_path) -> Path:
    """params.yaml of a new study."""
    (tmp_path / "params.yaml").write_text(preset("digits"), encoding="utf-8")
    return tmp_path / "params.yaml"


def output(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_dry_run_names_two_of_many_stages_and_as_json_all(digits, monkeypatch):
    needs = [f"represent@{number}" for number in range(19)]
    found = {"compare": ["a modified", "b deleted"], "report": [f"after {', '.join(needs)}"]}
    monkeypatch.setattr("advml.pipeline.repro.reasons", lambda root: found)
    lines = output("repro", "--dry-run", "--params", str(digits)).splitlines()
    assert lines[:2] == ["compare  a modified; b deleted", "report   after represent@0, represent@1 and 17 more"]
    assert json.loads(output("repro", "--dry-run", "--json", "--params", str(digits))) == found


@pytest.mark.parametrize(("seconds", "spread", "total"), [(1.9, "2", "30 s, "), (3.2, "2 to 3", "7200 s (2.0 hours), ")])
def test_an_estimate_gives_a_range_only_of_different_times_and_hours_from_an_hour_on(digits, monkeypatch, seconds, spread, total):
    stages = tuple(estimates.Stage(f"evaluate_st@{number}", estimates.Cost(seconds=some)) for number, some in enumerate((1.6, seconds)))
    found = estimates.Estimate(stages, float(total.split()[0]), estimates.Cost())
    monkeypatch.setattr(estimates, "estimate", lambda *_, **__: found)
    said = output("estimate", "--params", str(digits))
    row = next(line for line in said.splitlines() if "evaluate_st" in line)
    assert row.strip(" │").split("│")[-1].strip() == spread and f"total: {total}" in said


# A whole study

PLAIN = ("grid.schemes=[CL]", "grid.adversarial_regimes=[]", "worst_case.attacks=[]", "corruptions.names=none")


@pytest.fixture(scope="module")
def study(new_study, tmp_path_factory, advml):
    """A study in which every command has run; `said` holds what each printed."""
    study = new_study(tmp_path_factory.mktemp("cli") / "study", *PLAIN)
    Image.new("L", (20, 30), color=80).save(study.root / "image.png")
    said = {}
    for line in (
        *("pretrain CL st", "finetune CL ST", "evaluate CL ST", "compare", "report", "show CL-ST-s0", "show CL-st-s0"),
        *("attack image.png --model CL-ST-s0 --out seen.png", "sync", "link --port 5555", "train CL ST"),
        *("evaluate CL-ST-s0 --name beside -S evaluate.steps=1", "show beside"),
    ):
        done = advml(*line.split(), cwd=study.root)
        assert done.returncode == 0, done.stderr
        said[line] = done.stdout
    return study, said


def test_every_stage_says_what_it_wrote_and_the_next_command(study):
    _, said = study
    assert said["pretrain CL st"].splitlines() == ["wrote models/pretrain/CL-st-s0", "next: advml finetune CL ST --seed 0"]
    assert said["finetune CL ST"].splitlines() == ["wrote models/finetune/CL-ST-s0", "next: advml evaluate CL ST --seed 0"]
    first, *rest = said["evaluate CL ST"].splitlines()
    assert first.startswith("CL-ST-s0: clean ") and "threat_model_1 " in first and "low" not in first
    assert rest[-2:] == ["wrote reports/CL-ST-s0", "next: advml show CL-ST-s0"]
    assert rest[0] == "  diagnostics: no flags" or all(line.startswith("  ! ") for line in rest[:-2])  # a study of seconds may raise some
    assert said["train CL ST"].splitlines()[0] == first


def test_what_a_stage_says_it_wrote_is_there(study):
    folder, said = study
    for line in (line for told in said.values() for line in told.splitlines() if line.startswith("wrote ")):
        first, *others = (folder.root / path for path in line.removeprefix("wrote ").partition(" (")[0].split(", "))
        assert first.exists() and all(other.exists() or first.with_name(other.name).exists() for other in others), line


def test_compare_of_nothing_says_so_and_claims_no_files(study):
    _, said = study
    assert said["compare"].splitlines()[0] == "wrote reports/compare/cka.json (the grid has no two trained models that the paper compares)"


def test_show_prints_the_record_of_a_model_and_of_an_encoder(study):
    _, said = study
    assert "CL-ST-s0" in said["show CL-ST-s0"].splitlines()[0] and "accuracy on test" in said["show CL-ST-s0"]
    assert said["show CL-ST-s0"].splitlines()[-1] == "next: advml attack IMAGE --model CL-ST-s0"
    assert "CL-st-s0" in said["show CL-st-s0"].splitlines()[0] and "accuracy" not in said["show CL-st-s0"]


def test_a_model_of_the_study_can_be_measured_beside_itself(study):
    folder, said = study
    told = said["evaluate CL-ST-s0 --name beside -S evaluate.steps=1"].splitlines()
    assert told[0].startswith("beside: clean ") and told[-1] == "next: advml show beside"
    assert said["show beside"].startswith("beside   (records/evaluate/beside.json)") and " 1 steps" in said["show beside"]
    assert " 1 steps" not in said["show CL-ST-s0"] and json.loads(folder.workspace.record("evaluate", "CL-ST-s0").read_text())


def test_attack_writes_a_picture_and_says_what_happened(study):
    folder, said = study
    with Image.open(folder.root / "seen.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    told = said["attack image.png --model CL-ST-s0 --out seen.png"].splitlines()
    assert "L-infinity size" in told[0] and told[1] == "wrote seen.png"


def test_sync_finds_nothing_to_do_and_link_names_the_port(study):
    _, said = study
    assert said["sync"].startswith("0 runs rebuilt or brought up to date\n")
    assert said["link --port 5555"].startswith("MLflow: http://127.0.0.1:5555/#/experiments/")


@pytest.mark.parametrize("uri", ["null", "sqlite:///elsewhere/history.db"])
def test_ui_runs_the_server_of_that_store_and_prints_the_link_when_it_answers(study, monkeypatch, uri):
    folder, _ = study
    started = []

    def serve(*command: object, host: str, port: int, on_answer: Callable[[], None]) -> None:
        started.append((*command, port))
        print("MLflow's own lines")
        on_answer()

    monkeypatch.setattr(mlflow_ui, "serve", serve)
    monkeypatch.setattr(mlflow_ui, "require_free", lambda **where: started.append(where))
    done = CliRunner().invoke(app, ["ui", "--params", str(folder.params), "--port", "5556", "-S", f"tracking.uri={uri}"])
    assert done.stdout.startswith("MLflow's own lines\nMLflow: http://127.0.0.1:5556/#/experiments/") and done.exit_code == 0
    where, (arguments, environment, port) = started
    assert where == {"host": "127.0.0.1", "port": 5556} and port == 5556
    assert arguments[:4] == [sys.executable, "-m", "mlflow", "ui"] and "5556" in arguments
    file = "elsewhere/history.db" if "elsewhere" in uri else "mlflow.db"
    assert environment["MLFLOW_BACKEND_STORE_URI"].endswith(f"{folder.root}/{file}")


def test_ui_of_a_server_says_to_open_its_address(study, monkeypatch):
    folder, _ = study
    monkeypatch.setattr(mlflow_ui, "serve", None)
    done = CliRunner().invoke(app, ["ui", "--params", str(folder.params), "-S", "tracking.uri=http://127.0.0.1:9"])
    assert done.exit_code == 0 and "http://127.0.0.1:9\nthis is a server's address: open it in a browser" in done.output


@pytest.mark.parametrize("command", ["ui", "link", "sync"])
def test_a_folder_as_store_is_refused_before_anything_runs(study, monkeypatch, command):
    folder, _ = study
    monkeypatch.setattr(mlflow_ui, "serve", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    done = CliRunner().invoke(app, [command, "--params", str(folder.params)])
    assert isinstance(done.exception, UserError) and "migrate-filestore" in str(done.exception) and not done.output


def test_stderr_says_how_overrides_were_understood(study, advml):
    folder, _ = study
    done = advml("train", "CL", "ST", "-S", "evaluate.seed=0", "--set", "temperature=2/10", cwd=folder.root)
    assert done.returncode == 0 and done.stderr.startswith("# evaluate.seed = 0\n# temperature = 0.2\n")


def test_another_folder_is_chosen_by_its_params_yaml(study, advml, tmp_path):
    folder, _ = study
    done = advml("evaluate", "CL", "ST", "--params", str(folder.params), cwd=tmp_path)
    assert done.returncode == 0 and f"wrote {folder.workspace.report('CL-ST-s0')}" in done.stdout
    assert not list(tmp_path.iterdir())


def test_what_is_printed_is_utf_8_whatever_the_locale(advml, tmp_path):
    shell = replace(advml, environment={"PYTHONIOENCODING": "ascii"})
    done = shell("preset", "digits", "-S", "tracking.experiment=caf\u00e9", cwd=tmp_path)
    assert done.returncode == 0 and "caf\u00e9" in done.stdout and done.stderr == ""


def test_names_are_taken_in_any_case_and_without_the_seed_0(study, advml):
    folder, said = study
    shown = advml("show", "cl-st", cwd=folder.root).stdout.splitlines()[:-1]
    assert shown == said["show CL-ST-s0"].splitlines()[: len(shown)] and shown[0].startswith("CL-ST-s0 ")
    done = advml("pretrain", "cl", "ST", "--seed", "-1", cwd=folder.root)  # refused for the seed alone
    assert "'--seed'" in done.stderr and "Value error" not in done.stderr
    assert advml("evaluate", "cl-st", "--classes", "a", cwd=folder.root).stderr.count("a model of this study, whose classes are known") == 1


def test_json_holds_what_the_files_hold(study, advml):
    folder, _ = study
    workspace = folder.workspace
    shown = json.loads(advml("show", "CL-ST-s0", "--json", cwd=folder.root).stdout)
    assert shown["model"] == json.loads((workspace.model("CL-ST-s0") / "model.json").read_text())
    assert shown["evaluate"] == json.loads(workspace.record("evaluate", "CL-ST-s0").read_text())
    measured = json.loads(advml("train", "CL", "ST", "--json", cwd=folder.root).stdout)
    assert measured["model"] == "CL-ST-s0" and measured["metrics"] == json.loads(
        (workspace.report("CL-ST-s0") / "metrics.json").read_text()
    )
    assert measured["flags"] == shown["evaluate"]["diagnostics"]["flags"]


def test_quiet_prints_results_alone_and_verbose_the_settings_and_tracebacks(study, advml):
    folder, _ = study
    quiet = advml("train", "CL", "ST", "-q", "-S", "evaluate.seed=0", cwd=folder.root)
    assert quiet.stdout.startswith("CL-ST-s0: clean ") and "wrote" not in quiet.stdout and quiet.stderr == ""
    verbose = advml("-v", "attack", "nowhere.png", "--model", "CL-ST-s0", cwd=folder.root)
    assert "# evaluate.seed = 0\n" in verbose.stderr and "Traceback" in verbose.stderr
    assert verbose.stderr.splitlines()[-1].startswith("advml: nowhere.png does not exist")


# What goes wrong: one line, without a traceback; here what the command line itself refuses, every other error is of the module at fault

USER = {
    "no equals sign": ("pretrain CL st -S attack.steps", "-S attack.steps is not of the form key=value"),
    "no params.yaml": ("prepare --params nowhere/params.yaml", "nowhere/params.yaml does not exist; "),
    "an unknown scheme": ("pretrain sscl st", "'sscl' is not one of 'SL', 'CL', 'SCL'"),
    "a scheme by its name elsewhere": ("pretrain SimCLR st", "; did you mean CL?"),
    "an unknown regime": ("finetune CL Ful-AT", "'Ful-AT' is not one of 'ST', 'AT', 'Partial-AT', 'Full-AT'; did you mean Full-AT?"),
    "a missing argument": ("finetune CL", "Missing argument 'regime'"),
    "an unknown option": ("report --loud", "No such option: --loud"),
    "an unknown command": ("fly", "No such command 'fly'"),
    "a misspelt command": ("evalute CL ST", "No such command 'evalute'. Did you mean 'evaluate'?"),
    "JSON of a run": ("repro --json", "--json goes with --dry-run"),
    "a negative seed": ("pretrain CL st --seed -1", "'--seed'"),
    "a missing model": ("evaluate CL AT", "models/finetune/CL-AT-s0 contains no model"),
    "a model of the study under another name, which is missing": ("evaluate CL AT --name x", "models/finetune/CL-AT-s0 contains no model"),
    "a scheme without a regime": ("evaluate CL", "CL: a scheme needs a regime; choose from ST, AT, Partial-AT, Full-AT"),
    "a regime of no scheme": (
        "evaluate test_resnet AT --weights w.safetensors",
        "test_resnet AT: a regime can only follow a scheme (SL, CL, SCL",
    ),
    "weights of a function": (
        "evaluate mine:net --weights w.safetensors",
        "--weights has no meaning for module:function, which takes --mean, --std, --classes, --name",
    ),
    "a seed of a function": ("evaluate mine:net --seed 0", "--seed has no meaning for module:function"),
    "a normalisation of a scheme": ("evaluate CL ST --mean imagenet", "--mean has no meaning for a scheme with a regime"),
    "class names of a scheme": ("evaluate CL ST --classes a,b", "--classes has no meaning for a scheme with a regime"),
    "class names of a model of the study": ("evaluate CL-ST-s0 --classes a,b", "--classes has no meaning for a model of this study"),
    "a seed of a model's name": ("evaluate CL-ST-s0 --seed 1", "--seed has no meaning for a trained model, by folder or name"),
    "a seed of a timm model": ("evaluate resnet18 --seed 1", "--seed has no meaning for a timm name, which takes --weights, --mean"),
    "a comparison with a model from elsewhere": ("compare CL-ST-s0 mine:net", "mine:net gives no model: ModuleNotFoundError"),
    "a value that is only checked": ("check -S attack.steps=0", "attack.steps = 0"),
    "no pipeline": ("repro", "advml init"),
}


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    said = done.stderr
    lines = [line for line in said.splitlines() if line and not line.startswith("# ")]
    assert done.returncode == code and done.stdout == "", (done.returncode, done.stdout, said)
    assert len(lines) == 1 and lines[0].startswith("advml: ") and words in lines[0], said


@pytest.mark.parametrize(("line", "words"), USER.values(), ids=USER)
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(study, advml, line, words):
    folder, _ = study
    assert_one_line(advml(*line.split(), cwd=folder.root), 2, words)


def ends(capsys: pytest.CaptureFixture[str], command, code: int, *words: str) -> None:
    with pytest.raises(SystemExit) as left:
        guarded(command)
    said = capsys.readouterr().err
    assert left.value.code == code
    assert said.count("\n") == 1 and said.startswith("advml: ") and all(word in said for word in words)


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


ERRORS = {
    "user": (UserError("mend it"), 2, "advml: mend it\n"),
    "failure": (Failure("broke"), 1, "advml: broke\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "the same command goes on"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "the disk is full"),
    "full disk, in safetensors' words": (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
    "memory": (MemoryError(), 1, "lower batch_size"),
    "memory, in torch's words": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), 1, "lower batch_size"),
    "memory, in torch's words on Linux": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        1,
        "lower batch_size",
    ),
    "a lost process": (
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:3481."),
        1,
        "the same command continues",
    ),
    "memory of the GPU": (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 1, "lower batch_size"),
    "a read-only disk": (OSError(errno.EROFS, "Read-only file system", "models"), 1, "models: Read-only file system; fix this"),
    "a read-only disk, in safetensors' words": (
        type("SafetensorError", (Exception,), {})("Read-only\nfile system"),
        1,
        "Read-only file system",
    ),
    "a broken disk": (OSError(errno.EIO, "Input/output error"), 1, "Input/output error; fix this"),
    "a file for a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", ".scratch/x"), 1, ".scratch/x: Not a directory"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "models"), 1, "models"),
}


@pytest.mark.parametrize(("error", "code", "words"), ERRORS.values(), ids=ERRORS)
def test_a_foreseeable_error_is_one_line_with_its_exit_code(capsys, error, code, words):
    ends(capsys, raising(error), code, words)


def test_an_unforeseen_error_keeps_its_traceback():
    """One line would hide a bug."""
    for bug in (ZeroDivisionError("division by zero"), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(type(bug)):
            guarded(raising(bug))


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_processes_the_one_that_fails_first_prints_its_error(monkeypatch, tmp_path, capsys, first):
    def fail() -> None:
        raise UserError(f"of process {number}")

    for number in (first, 1 - first):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(number) / "error.json"))
        with pytest.raises(SystemExit, match="2"):
            guarded(fail)
    assert capsys.readouterr().err == f"advml: of process {first}\n"


@pytest.mark.cluster
def test_an_error_of_several_processes_is_one_line(tmp_path):
    command = [sys.executable, "-m", "advml", "train", "SL", "ST", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "params.yaml" in done.stderr and not done.stdout


@pytest.mark.cluster
@pytest.mark.parametrize(("killed", "code"), [("process", 1), ("launcher", -signal.SIGKILL)])
def test_all_processes_end_with_one_that_is_killed(make_study, killed, code):
    command = [sys.executable, "-m", "advml", "-q", "pretrain", "SL", "st", "--processes", "2", "-S", "pretrain.SL.epochs=9999"]
    study = make_study()
    launcher = subprocess.Popen(command, cwd=study.root, stderr=subprocess.PIPE, text=True)
    while not (study.root / ".scratch/pretrain-SL-st-s0/state.safetensors").exists() and launcher.poll() is None:
        time.sleep(0.1)
    processes = psutil.Process(launcher.pid).children()
    (processes[1] if killed == "process" else launcher).kill()
    said = launcher.communicate(timeout=60)[1].splitlines()
    assert launcher.returncode == code
    assert not said if code < 0 else len(said) == 1 and "killed by signal 9" in said[0]
