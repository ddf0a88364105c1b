"""The command line: flags, one-line errors and exit codes."""

import dataclasses
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import caption
import config as config_module
import evaluate
import preprocess
import train
from captioning import command
from config import Config, UserError, resolve

ROOT = Path(__file__).parent.parent
FIELDS = dataclasses.fields(Config)
SCRIPTS = {
    "preprocess.py": preprocess,
    "train.py": train,
    "evaluate.py": evaluate,
    "caption.py": caption,
}
ACTIONS = {k: v for each in SCRIPTS.values() for k, v in each.ACTIONS.items()}
HEAVY = {"numpy", "pandas", "keras", "tensorflow", "cv2", "PIL", "nltk"}
HEAVY |= {"matplotlib", "tqdm", "jinja2"}
UNIX = pytest.mark.skipif(os.name == "nt", reason="not on Windows")


def parse(*words: str, actions=None) -> command.Arguments:
    return command.parse("", actions or {}, words)


@pytest.fixture
def refused(capsys):
    """Parses a wrong command line; gives the line on standard error."""

    def parse_wrong(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            parse(*words, actions=ACTIONS)
        out, line = capsys.readouterr()
        assert end.value.code == command.WRONG_USAGE
        assert not out and line.count("\n") == 1
        return line

    return parse_wrong


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a main as a script; gives its exit code and its two outputs."""

    def run_script(main, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dir/train.py", *words])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        with pytest.raises(SystemExit) as end:
            command.run(main, "", {})
        return end.value.code, *capsys.readouterr()

    handler = signal.getsignal(signal.SIGTERM)
    yield run_script
    signal.signal(signal.SIGTERM, handler)


def fail(error: BaseException):
    """A main that raises."""

    def main(arguments: command.Arguments) -> None:
        raise error

    return main


class ResourceExhaustedError(Exception):
    """As TensorFlow calls it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ResourceExhaustedError("OOM when allocating a tensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),  # as JAX does
    ],
)
def test_too_little_memory_is_one_line(run, error):
    code, _, told = run(fail(error))
    assert code == command.FAILED and told.count("\n") == 1
    assert "out of memory: give a lower --batch-images" in told


# --- flags ----------------------------------------------------------------


def another_value(each: dataclasses.Field):
    if each.metadata["choices"]:
        return next(c for c in each.metadata["choices"] if c != each.default)
    change = {int: lambda x: x + 1, float: lambda x: x / 2}
    return change.get(each.type, lambda x: x + "else where")(each.default)


@pytest.mark.parametrize("each", FIELDS, ids=lambda each: each.name)
def test_every_field_is_a_flag(each):
    value = another_value(each)
    arguments = parse("--" + each.name.replace("_", "-"), str(value))
    if each.name == "dataset_dir":  # given alone, it names the dataset
        assert arguments.config.dataset == value
        return
    assert arguments.config == resolve(
        Config(**{each.name: value}), [each.name]
    )
    assert arguments.given == {each.name: value}
    assert type(arguments.given[each.name]) is each.type


def test_a_boolean_field_is_a_pair_of_flags(monkeypatch, capsys):
    field = config_module._model(True, "opens 9% more")
    made = dataclasses.make_dataclass(
        "Made", [("a_gate", bool, field)], bases=(Config,), frozen=True
    )
    fields = {each.name: each for each in dataclasses.fields(made)}
    monkeypatch.setattr(command, "Config", made)
    monkeypatch.setattr(command, "FIELDS", fields)
    assert parse("--no-a-gate").given == {"a_gate": False}
    assert parse("--no-a-gate").config.a_gate is False
    assert parse("--a-gate").config.a_gate is True
    with pytest.raises(SystemExit):
        parse("--help")
    assert "opens 9% more" in capsys.readouterr().out


def test_what_is_given_is_told_from_defaults_and_actions():
    assert parse() == (resolve(Config()), {}, parse().actions, {})
    words = ["a.jpg", "--json", "b.jpg", "--epochs", str(Config.epochs), "-"]
    arguments = parse(*words, actions=caption.ACTIONS)
    assert arguments.given == {"epochs": Config.epochs}
    assert arguments.actions.photos == ["a.jpg", "b.jpg", "-"]
    assert arguments.actions.json and not arguments.actions.attention


@pytest.mark.parametrize("name", ["dev", "validation", "val"])
def test_other_names_of_the_validation_split_are_understood(name):
    assert parse("--split", name).config.split == "val"


def test_what_stands_behind_two_dashes_is_no_flag():
    words = ["a.jpg", "--json", "--", "-b.jpg", "--json", "-", "c.jpg"]
    photos = parse(*words, actions=caption.ACTIONS).actions.photos
    assert photos == ["a.jpg", "./-b.jpg", "./--json", "-", "c.jpg"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--beam-sise 3", "unknown flag --beam-sise; did you mean --beam-size"),
        ("--batch_images=3", "--batch_images; did you mean --batch-images?"),
        ("--beam 3", "unknown flag --beam; did you mean --beam-size?"),
        ("--frech", "unknown flag --frech; did you mean --fresh?"),
        ("--zzqq", "unknown flag --zzqq\n"),
        ("--lr 0.1", "unknown flag --lr; use --learning-rate\n"),
        ("--batch_size=3", "--batch_size; use --batch-images\n"),
        ("--device cuda", "CUDA_VISIBLE_DEVICES"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--learning-rate fast", "--learning-rate: invalid float value"),
        ("--encoder resnet5", "encoder 'resnet5' is not one of vgg16, "),
        ("--encoder resnet5", "; did you mean resnet50?\n"),
        ("--encoder vgg16+xceptoin", "; did you mean xception?\n"),
        ("--split tests", "; did you mean test?\n"),
        ("--precision bfloat16", "; did you mean mixed_bfloat16?\n"),
        ("--layout kaggle", "; did you mean kaggle8k?\n"),
        ("--epochs -1", "epochs -1 is below 0"),
        ("--batch-images -5", "batch_images -5 is below 1"),
        ("--beam-size 101", "beam_size 101 is above 100"),
        ("--learning-rate nan", "learning_rate nan"),
        ("--min-caption-length 21", "above max_caption_length 20"),
        ("--val-share .5 --test-share .5", "val_share"),
        ("--dataset ../x", "--dataset-dir"),
        ("--dataset NUL", "--dataset-dir"),
        ("--dataset cache", "--dataset-dir"),
        ("--dataset-dir /", "--dataset"),
        ("--run-name a/b", "--checkpoints-dir"),
        ("--runs good a/b", "--checkpoints-dir"),
    ],
)
def test_wrong_usage_is_one_line_with_what_to_do(refused, words, told):
    assert told in refused(*words.split())


def test_a_stray_argument_is_reported(capsys):
    with pytest.raises(SystemExit):
        parse("photograph.jpg", actions=train.ACTIONS)
    assert "unknown argument photograph.jpg; see" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["a.jpg", "--serve"]])
def test_caption_takes_photographs_or_serves(words, capsys):
    arguments = parse(*words, actions=caption.ACTIONS)
    assert caption.main(arguments) == command.WRONG_USAGE
    assert "or else --serve" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_imports_nothing_heavy(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help-all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert f"usage: python {script} [options]" in done.stdout
    for each in FIELDS:
        assert f"--{each.name.replace('_', '-')} " in done.stdout
    imported = {
        line.split("|")[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
    }
    assert "config" in imported and not imported & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_fields_that_matter_to_a_script(
    script, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        command.parse("", SCRIPTS[script].ACTIONS)
    text = capsys.readouterr().out
    shown = {*command.FIELDS_OF[script]}
    for each in FIELDS:
        flag = f"--{each.name.replace('_', '-')} "
        matters = each.metadata["group"] in shown
        matters = matters or each.name in command.NAMING
        matters = matters and command.OF_ONE.get(each.name, script) == script
        assert (flag in text) == matters
    for name in {each.metadata["group"] for each in FIELDS} - shown:
        assert (f"{name} fields" in text) == (name in ("data", "encoder"))


def test_a_saved_config_is_read_back_but_for_its_places(tmp_path, refused):
    path = tmp_path / "config.json"
    saved = Config(dataset="mine", data_dir="/elsewhere", seed=7, beam_size=3)
    path.write_text(json.dumps(dataclasses.asdict(saved)))
    found = parse("--config", str(path), "--seed", "8").config
    assert (found.dataset, found.seed, found.beam_size) == ("mine", 8, 3)
    assert found.data_dir == Config.data_dir
    for text, told in (
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"views": 2}', "views: remove these fields"),
        ('{"seed": "7"}', "seed '7' is not of type int"),
        ('{"split": ["val"]}', "split ['val'] is not of type str"),
    ):
        path.write_text(text)
        assert told in refused("--config", str(path))
    assert "No such file" in refused("--config", str(tmp_path / "none"))


def commands_in_docstrings() -> list[str]:
    texts = [module.__doc__ for module in (config_module, *SCRIPTS.values())]
    return re.findall(r"python (\w+\.py[^`\n]*)", "\n".join(texts))


@pytest.mark.parametrize("line", commands_in_docstrings())
def test_the_commands_that_docstrings_show_are_valid(line):
    script, *words = line.split()
    parse(*words, actions=SCRIPTS[script].ACTIONS)


def test_the_next_line_names_a_saved_config_instead_of_its_fields(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dataset": "mine", "encoder": "vgg16"}))
    flags = "--encoder xception --decoder-units 9 --seed 1"
    arguments = parse("--config", str(path), *flags.split())
    assert command.next_line("train.py", arguments) == (
        f"python train.py --config {path} --encoder xception --decoder-units 9"
    )


def test_the_next_command_keeps_the_flags_that_it_needs():
    assert command.next_line("train.py", parse()) == "python train.py"
    words = "--image-size 64 --dataset flickr8k --max-skipped-share 0.1 "
    words += "--epochs 3 --beam-size 2 --decoder-units 8"
    arguments = parse("--data-dir", "my data", *words.split())
    assert command.next_line("train.py", arguments) == (
        "python train.py --data-dir 'my data' --max-skipped-share 0.1 "
        "--dataset flickr8k --image-size 64"
    )
    words = "--limit-images 5 --dataset flickr8k --encoder vgg16"
    assert command.next_line("caption.py", parse(*words.split())) == (
        "python caption.py --dataset flickr8k --encoder vgg16"
    )


# --- exit codes -----------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_THERE = OSError(*FULL.args, "a/features.npy")
ROOM = f"{FULL.strerror}: free some space and run it again; nothing is lost"


@pytest.mark.parametrize("returned", [None, 0, 1])
def test_a_main_gets_the_arguments_and_gives_its_own_code(run, returned):
    def main(arguments):
        print(arguments.config.epochs)
        return returned

    assert run(main, "--epochs", "77") == (returned or 0, "77\n", "")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no dataset: fetch it"), 1, "no dataset: fetch it"),
        *[
            (UserError(f"a{odd}b is missing"), 1, "a b is missing")
            for odd in ("\n", "\x1b", "\u2028", "\ud800")
        ],
        (FULL, 1, ROOM),
        (FULL_THERE, 1, f"a/features.npy: {ROOM}"),
        (OSError("odd"), 1, "odd"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; run the same command again to continue",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(run, error, code, told):
    assert run(fail(error)) == (
        code,
        "",
        "\n" * (code == 130) + f"train.py: {told}\n",
    )


def test_an_error_in_the_code_is_not_hidden(run):
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))


@pytest.mark.parametrize("backend", ["torch", "Jax"])
def test_another_backend_is_refused_before_anything_is_done(
    run, monkeypatch, backend
):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    code, out, err = run(fail(AssertionError("it was run")))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert backend in err and "tensorflow or jax" in err


# --- processes ------------------------------------------------------------

SCRIPT = """
import os, pathlib, sys, time
from captioning import command
def main(arguments):
    print("begun", flush=True)
    {main}
command.run(main, "", {{}}, end_with_reader={end_with_reader})
"""


def start(
    main: str, folder: Path, shell=(), end_with_reader=False, **options
) -> subprocess.Popen:
    """Starts a script in a folder, which may hold a module instead of Keras."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    code = SCRIPT.format(main=main, end_with_reader=end_with_reader)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [*shell, sys.executable, "-c", code],
        cwd=folder,
        # An output without a buffer would fail earlier than a user's does.
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        **{"text": True, **pipes, **options},
    )


@UNIX
def test_sigterm_interrupts(tmp_path):
    process = start("time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in told


@UNIX
def test_an_interruption_in_a_callback_is_not_lost(tmp_path):
    main = """
    import gc
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), 15))
    gc.collect()
    gc.callbacks.clear()
    time.sleep(60)
    """
    process = start(main.strip(), tmp_path)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.startswith("\n-c: interrupted") and told.count("\n") == 2


# Writes to both outputs, in Python and past it, then leaves a file.
WORK = """
    sys.stdin.readline()
    for n in range(20_000):
        print(n)
        print(n, file=sys.stderr)
    os.write(1, b"x"), os.write(2, b"x")
    pathlib.Path("done").write_text("")
"""


@pytest.mark.parametrize("end_with_reader", [False, True])
def test_a_reader_that_goes_away_is_no_error(end_with_reader, tmp_path):
    """A script that writes files carries on; one that prints ends."""
    process = start(WORK.strip(), tmp_path, end_with_reader=end_with_reader)
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("closed\n")
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "done").exists() != end_with_reader


def test_an_error_keeps_its_code_when_nobody_reads_it(tmp_path):
    main = "sys.stdin.readline(); raise command.UserError('wrong')"
    process = start(main, tmp_path)
    process.stderr.close()
    process.communicate("closed\n", timeout=30)
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_under_the_output_is_one_line(tmp_path):
    main = "print(1), print(2, file=sys.stderr)"
    with open("/dev/full", "w") as full:
        out = start(main, tmp_path, stdout=full)
        err = start(main, tmp_path, stderr=full)
    line = out.communicate(timeout=60)[1]
    err.communicate(timeout=60)
    assert line.count("\n") == 1 and "standard output: No space" in line
    assert (out.returncode, err.returncode) == (1, 0)


@UNIX
def test_without_an_output_no_file_takes_its_place(tmp_path):
    main = "file = open('made', 'w'); os.write(1, b'noise'); print('noise')"
    process = start(main, tmp_path, shell=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert (tmp_path / "made").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252"])
def test_files_and_pipes_are_utf_8_whatever_the_locale(
    monkeypatch, tmp_path, encoding
):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    monkeypatch.setenv("LC_ALL", "C")
    main = "[print(l.strip(), file=f) for f, l in zip((sys.stdout, sys.stderr"
    main += ", sys.stdout), sys.stdin)]"
    process = start(main, tmp_path, text=False)
    text = "\ufeff犬.jpg\nرجل\n".encode() + b"\xff.jpg\n"
    out, told = process.communicate(text, timeout=30)
    # A name that is no text, as Unix allows, is escaped.
    assert out.split() == [b"begun", "犬.jpg".encode(), b"\\udcff.jpg"]
    assert told.split() == ["رجل".encode()]
    assert process.returncode == 0


@UNIX
def test_a_terminal_gets_what_it_can_show(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    main, terminal = os.openpty()
    process = start("print('größe 犬')", tmp_path, stdout=terminal)
    assert process.wait(timeout=30) == 0
    shown = os.read(main, 1000).decode("latin-1")
    assert shown.split() == ["begun", "größe", "\\u72ac"]


# A stand-in for Keras; the tests below add what it does when imported.
KERAS = "class config:\n    backend = staticmethod(lambda: '{}')\n"


def import_keras(folder: Path, keras: str, after: str = "") -> tuple:
    """Gives what importing Keras prints; its exit code, and the errors."""
    (folder / "keras.py").write_text(keras, encoding="utf-8")
    process = start(f"command.import_keras(){after}", folder)
    out, told = process.communicate(timeout=30)
    return out.removeprefix("begun\n"), process.returncode, told


@pytest.mark.parametrize(
    ("keras", "told"),
    [
        (KERAS.format("torch"), "torch"),
        ("raise ModuleNotFoundError(\"No module named 'jax'\")", "'jax'"),
    ],
)
def test_a_backend_that_does_not_work_is_told_in_one_line(
    tmp_path, keras, told
):
    _, code, line = import_keras(tmp_path, keras)
    assert code == 1 and line.count("\n") == 1
    assert told in line and "KERAS_BACKEND to tensorflow or jax" in line


def test_keras_is_imported_without_its_noise(tmp_path):
    noisy = "import os\nos.write(2, b'noise')\nprint('imported')\n"
    after = "; print('heard', file=sys.stderr); import logging"
    after += "; logging.getLogger('tensorflow').warning('5 out of the last 25')"
    found = import_keras(tmp_path, KERAS.format("jax") + noisy, after)
    assert found == ("imported\n", 0, "heard\n")


@pytest.mark.parametrize("own", ["", "its own"])
def test_gpu_memory_is_taken_as_it_is_needed(tmp_path, monkeypatch, own):
    """TensorFlow and JAX take all of it, but for what the user may set."""
    names = ["TF_FORCE_GPU_ALLOW_GROWTH", "XLA_PYTHON_CLIENT_PREALLOCATE"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if own:
            monkeypatch.setenv(name, own)
    shown = f"import os\nprint(*map(os.environ.get, {names}), sep='|')\n"
    out, *_ = import_keras(tmp_path, KERAS.format("jax") + shown)
    assert out.strip() == (f"{own}|{own}" if own else "true|false")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="other C libraries have no mallopt",
)
def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    """A block that was touched before is not made of new pages again."""
    after = """
    import resource
    for _ in range(5):
        block = b"x" * 2**26
        del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    """
    out, *_ = import_keras(tmp_path, KERAS.format("jax"), after)
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert int(out) < 2 * pages


def test_a_backend_of_the_settings_file_is_refused_too(tmp_path, monkeypatch):
    """Whether or not it is installed."""
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    process = start("command.import_keras()", tmp_path)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and told.count("\n") == 1
    assert "tensorflow or jax" in told
