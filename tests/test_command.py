"""The command line: flags, one-line errors and exit codes."""

import dataclasses
import errno
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
    "preprocess.py": (preprocess, preprocess.ACTIONS),
    "train.py": (train, train.ACTIONS),
    "evaluate.py": (evaluate, evaluate.ACTIONS),
    "caption.py": (caption, caption.ACTIONS),
}
HEAVY = {
    *("numpy", "pandas", "keras", "tensorflow", "cv2", "PIL", "nltk"),
    *("matplotlib", "tqdm", "jinja2"),
}


# What stands for Keras has a backend too.
BACKEND = "class backend:\n    backend = staticmethod(lambda: 'jax')\n"


def parse(*arguments: str, actions=()) -> command.Arguments:
    return command.parse("", actions, arguments)


@pytest.fixture
def refused(capsys):
    """Parses a wrong command line; gives the line on standard error."""

    def parse_wrong(*arguments: str, actions=()) -> str:
        with pytest.raises(SystemExit) as end:
            parse(*arguments, actions=actions)
        out, line = capsys.readouterr()
        assert end.value.code == 2
        assert not out and line.count("\n") == 1
        return line

    return parse_wrong


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a main as a script; gives its exit code and its two outputs."""

    def run_script(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dir/train.py", *arguments])
        with pytest.raises(SystemExit) as end:
            command.run(main, "")
        return end.value.code, *capsys.readouterr()

    handler = signal.getsignal(signal.SIGTERM)
    yield run_script
    signal.signal(signal.SIGTERM, handler)


def fail(error: BaseException):
    """A main that raises."""

    def main(arguments: command.Arguments) -> None:
        raise error

    return main


def start(code: str, *paths: Path, **options) -> subprocess.Popen:
    """Starts Python code that may import what the project has."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        # An output without a buffer would fail earlier than a user's does.
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- flags ----------------------------------------------------------------


def another_value(each: dataclasses.Field):
    if each.type is bool:
        return not each.default
    if "choices" in each.metadata:
        return next(c for c in each.metadata["choices"] if c != each.default)
    change = {int: lambda x: x + 1, float: lambda x: x / 2}
    return change.get(each.type, lambda x: x + "else where")(each.default)


@pytest.mark.parametrize("each", FIELDS, ids=lambda each: each.name)
def test_every_field_is_a_flag(each):
    value = another_value(each)
    flag = "--" + each.name.replace("_", "-")
    if each.type is bool:
        words = [flag if value else "--no-" + flag[2:]]
    else:
        words = [flag, str(value)]
    arguments = parse(*words)
    if each.name == "dataset_dir":  # given alone, it names the dataset
        assert arguments.config.dataset == value
        return
    assert arguments.config == resolve(Config(**{each.name: value}))
    assert arguments.given == {each.name: value}
    assert type(arguments.given[each.name]) is each.type


def test_without_flags_the_defaults_count_and_nothing_is_given():
    arguments = parse()
    assert arguments.config == resolve(Config()) and arguments.given == {}


def test_a_flag_with_the_default_value_counts_as_given():
    assert parse("--epochs", str(Config.epochs)).given == {
        "epochs": Config.epochs
    }


def test_a_boolean_field_is_a_pair_of_flags(monkeypatch, capsys):
    field = dataclasses.field(
        default=True, metadata={"group": "model", "help": "opens 9% more"}
    )
    made = dataclasses.make_dataclass(
        "Made", [("a_gate", bool, field)], bases=(Config,), frozen=True
    )
    monkeypatch.setattr(command, "Config", made)
    assert parse("--no-a-gate").given == {"a_gate": False}
    assert parse("--no-a-gate").config.a_gate is False
    assert parse("--a-gate").config.a_gate is True
    assert parse().config.a_gate is True and not parse().given
    with pytest.raises(SystemExit):
        parse("--help")
    assert "opens 9% more" in capsys.readouterr().out


def test_actions_are_apart_from_the_config():
    arguments = parse("--fresh", "--epochs", "3", actions=train.ACTIONS)
    assert arguments.actions.fresh and arguments.given == {"epochs": 3}
    assert not parse(actions=train.ACTIONS).actions.fresh


def test_arguments_stand_before_and_after_flags():
    words = ["a.jpg", "--json", "b.jpg", "--epochs", "3", "-"]
    arguments = parse(*words, actions=caption.ACTIONS)
    assert arguments.actions.photos == ["a.jpg", "b.jpg", "-"]
    assert arguments.actions.json and arguments.given == {"epochs": 3}


@pytest.mark.parametrize("words", [[], ["a.jpg", "--serve"]])
def test_caption_takes_photographs_or_serves(words, capsys):
    arguments = parse(*words, actions=caption.ACTIONS)
    assert caption.main(arguments) == command.WRONG_USAGE
    assert "or else --serve" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dev", "validation", "val"])
def test_other_names_of_the_validation_split_are_understood(name):
    assert parse("--split", name).config.split == "val"


# --- wrong usage ----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--beam-sise", "3"], "--beam-size"),
        (["--batch_images=3"], "--batch-images"),
        (["--beam", "3"], "--beam-size"),
        (["--frech"], "--fresh"),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest_one(refused, words, nearest):
    line = refused(*words, actions=train.ACTIONS)
    flag = words[0].split("=")[0]
    assert line.endswith(f"unknown flag {flag}; did you mean {nearest}?\n")


def test_a_flag_like_no_other_is_told_without_a_guess(refused):
    assert refused("--zzqq").endswith("unknown flag --zzqq\n")


def test_a_stray_argument_is_told(refused):
    assert "unknown argument photograph.jpg" in refused("photograph.jpg")


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("--epochs", "many", "a whole number"),
        ("--epochs", "1.5", "a whole number"),
        ("--epochs", "", "a whole number"),
        ("--learning-rate", "fast", "a number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_with_the_kind(
    refused, flag, value, wanted
):
    assert f"{flag}: expects {wanted}, not {value!r}" in refused(flag, value)


@pytest.mark.parametrize(
    ("flag", "value", "nearest"),
    [
        ("--encoder", "resnet5", "resnet50"),
        ("--split", "tests", "test"),
        ("--precision", "bfloat16", "mixed_bfloat16"),
        ("--layout", "kaggle", "kaggle8k"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_one(
    refused, flag, value, nearest
):
    line = refused(flag, value)
    assert flag in line and repr(value) in line
    assert line.endswith(f"did you mean {nearest}?\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "0"], "epochs 0 is below 1"),
        (["--batch-images", "-5"], "batch_images -5 is below 0"),
        (["--beam-size", "101"], "beam_size 101 is above 100"),
        (["--learning-rate", "nan"], "learning_rate nan"),
        (["--min-caption-length", "21"], "above max_caption_length 20"),
        (["--val-share", ".5", "--test-share", ".5"], "val_share"),
    ],
)
def test_a_value_out_of_its_range_is_wrong_usage(refused, words, told):
    assert told in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        *(["--dataset", "../x"], ["--run-name", "a/b"], ["--dataset", "NUL"]),
        *(["--runs", "good", "a/b"], ["--runs", ""], ["--dataset", "cache"]),
        *(["--dataset-dir", "/"], ["--dataset-dir", "x/cache"]),
    ],
)
def test_a_name_that_could_lead_elsewhere_is_wrong_usage(refused, words):
    line = refused(*words, actions=evaluate.ACTIONS)
    wanted = "--checkpoints-dir" if "--run" in words[0] else "--dataset"
    assert wanted in line


def test_the_script_is_named(refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/dir/train.py"])
    assert refused("--zzqq").startswith("train.py: ")


# --- help -----------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_imports_nothing_heavy(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for each in FIELDS:
        assert f"--{each.name.replace('_', '-')} " in done.stdout
    imported = {
        line.split("|")[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
    }
    assert "config" in imported and not imported & HEAVY


def commands_in_docstrings() -> list[str]:
    texts = [config_module.__doc__, *(m.__doc__ for m, _ in SCRIPTS.values())]
    return re.findall(r"python (\w+\.py[^`\n]*)", "\n".join(texts))


@pytest.mark.parametrize("line", commands_in_docstrings())
def test_the_commands_that_docstrings_show_are_valid(line):
    script, *words = line.split()
    parse(*words, actions=SCRIPTS[script][1])


# --- exit codes -----------------------------------------------------------

FULL = (
    f"{os.strerror(errno.ENOSPC)}: make room and run it again, nothing is lost"
)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_main_that_comes_to_its_end_gives_its_own_code(run, returned, code):
    assert run(lambda arguments: returned)[0] == code


def test_a_main_gets_the_arguments(run):
    code, out, _ = run(lambda a: print(a.config.epochs), "--epochs", "77")
    assert (code, out) == (0, "77\n")


def test_a_wrong_command_line_ends_before_main(run):
    code, _, line = run(fail(AssertionError()), "--epochs", "x")
    assert code == 2 and line.count("\n") == 1


def test_what_the_user_can_put_right_is_one_line_and_code_1(run):
    code, _, told = run(fail(UserError("no dataset: fetch it")))
    assert (code, told) == (1, "train.py: no dataset: fetch it\n")


@pytest.mark.parametrize("backend", ["torch", "openvino", "Jax"])
def test_another_backend_is_refused_before_anything_is_done(
    run, monkeypatch, backend
):
    monkeypatch.setenv("KERAS_BACKEND", backend)

    def main(arguments):
        raise AssertionError("it was run")

    code, out, err = run(main)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert backend in err and "tensorflow or jax" in err


@pytest.mark.parametrize("odd", ["\n", "\r\n", "\x1b", "\u2028", "\ud800"])
def test_an_odd_name_does_not_break_the_line(run, odd):
    code, _, told = run(fail(UserError(f"a{odd}b.jpg is missing")))
    blanks = " " * len(odd)
    assert (code, told) == (1, f"train.py: a{blanks}b.jpg is missing\n")


def test_an_interruption_is_code_130_without_a_traceback(run):
    code, _, told = run(fail(KeyboardInterrupt()))
    assert code == 130 and told.strip().count("\n") == 0
    assert "interrupted" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/features.npy"),
            f"train.py: a/features.npy: {FULL}\n",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            f"train.py: {FULL}\n",
        ),
        (OSError("odd"), "train.py: odd\n"),
    ],
)
def test_an_error_of_the_system_is_one_line_and_code_1(run, error, told):
    assert run(fail(error)) == (1, "", told)


def test_an_error_in_the_code_is_not_hidden(run):
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))


SCRIPT = """
import sys, time
from captioning import command
def main(arguments):
    print("begun", flush=True)
    {main}
command.run(main, "")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_sigterm_interrupts(tmp_path):
    process = start(SCRIPT.format(main="time.sleep(60)"), cwd=tmp_path)
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in told


# Writes to both outputs, in Python and past it, then leaves a file.
WORK = """
    import os, pathlib
    sys.stdin.readline()
    for n in range(20_000):
        print(n)
        print(n, file=sys.stderr)
    os.write(1, b"x"), os.write(2, b"x")
    pathlib.Path("done").write_text("")
"""


@pytest.mark.parametrize("job", ["files", "output"])
def test_a_reader_that_goes_away_is_no_error(job, tmp_path):
    """A script that writes files carries on; one that prints ends."""
    code = SCRIPT.format(main=WORK.strip())
    if job == "output":
        code = code.replace('main, "")', 'main, "", end_with_reader=True)')
    process = start(code, cwd=tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("closed\n")
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "done").exists() == (job == "files")


def test_an_error_keeps_its_code_when_nobody_reads_it(tmp_path):
    main = "sys.stdin.readline(); raise command.UserError('wrong')"
    process = start(
        SCRIPT.format(main=main), cwd=tmp_path, stdin=subprocess.PIPE
    )
    process.stderr.close()
    process.communicate("closed\n", timeout=30)
    assert process.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes an output")
def test_without_an_output_no_file_takes_its_place(tmp_path):
    main = "file = open('made', 'w'); os.write(1, b'noise'); print('noise')"
    code = "import os\n" + SCRIPT.format(main=main)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
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
    process = start(
        SCRIPT.format(main=main), cwd=tmp_path, stdin=subprocess.PIPE
    )
    process.stdin.buffer.write("\ufeff犬.jpg\nرجل\n".encode() + b"\xff.jpg\n")
    process.stdin.close()
    out, told = (f.buffer.read() for f in (process.stdout, process.stderr))
    end = os.linesep.encode()
    # A name that is no text, as Unix allows, is escaped.
    wanted = [b"begun", "犬.jpg".encode(), b"\\udcff.jpg", b""]
    assert out == end.join(wanted)
    assert told == "رجل".encode() + end
    assert process.wait(timeout=30) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_a_terminal_gets_what_it_can_show(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    main, terminal = os.openpty()
    code = SCRIPT.format(main="print('größe 犬')")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.wait(timeout=30) == 0
    shown = os.read(main, 1000).decode("latin-1")
    assert shown.split() == ["begun", "größe", "\\u72ac"]


@pytest.mark.parametrize(
    ("backend", "told"),
    [("torch", "torch"), ("jax", "No module named 'jax'")],
)
def test_a_backend_that_does_not_work_is_told_in_one_line(
    tmp_path, backend, told
):
    module = (
        "class config:\n    backend = staticmethod(lambda: 'torch')\n"
        if backend == "torch"
        else "raise ModuleNotFoundError(\"No module named 'jax'\")"
    )
    (tmp_path / "keras.py").write_text(module)
    code = SCRIPT.format(main="command.import_keras()")
    process = start(code, tmp_path, cwd=tmp_path)
    _, line = process.communicate(timeout=30)
    assert process.returncode == 1 and line.count("\n") == 1
    assert told in line and "KERAS_BACKEND to tensorflow or jax" in line


# A stand-in for Keras; the tests below add what it does when imported.
KERAS = "class config:\n    backend = staticmethod(lambda: 'jax')\n"


def test_keras_is_imported_without_its_noise(tmp_path):
    noisy = KERAS + "import os\nos.write(2, b'noise')\nprint('imported')\n"
    (tmp_path / "keras.py").write_text(noisy, encoding="utf-8")
    code = (
        "import sys\n"
        "from captioning.command import import_keras\n"
        "import_keras()\n"
        "print('heard', file=sys.stderr)\n"
    )
    out, told = start(code, tmp_path, cwd=tmp_path).communicate(timeout=30)
    assert (out, told) == ("imported\n", "heard\n")


@pytest.mark.parametrize("own", ["", "its own"])
def test_gpu_memory_is_taken_as_it_is_needed(tmp_path, monkeypatch, own):
    """TensorFlow and JAX take all of it, but for what the user may set."""
    names = ["TF_FORCE_GPU_ALLOW_GROWTH", "XLA_PYTHON_CLIENT_PREALLOCATE"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if own:
            monkeypatch.setenv(name, own)
    (tmp_path / "keras.py").write_text(
        KERAS + f"import os\nprint(*map(os.environ.get, {names}), sep='|')\n"
    )
    code = "from captioning.command import import_keras; import_keras()"
    out, _ = start(code, tmp_path, cwd=tmp_path).communicate(timeout=30)
    assert out.strip() == (f"{own}|{own}" if own else "true|false")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="other C libraries have no mallopt",
)
def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    """A block that was touched before is not made of new pages again."""
    (tmp_path / "keras.py").write_text(KERAS)
    code = (
        "import resource\n"
        "from captioning.command import import_keras\n"
        "import_keras()\n"
        "for _ in range(5):\n"
        "    block = b'x' * 2**26\n"
        "    del block\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    out, _ = start(code, tmp_path, cwd=tmp_path).communicate(timeout=30)
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert int(out) < 2 * pages


# --- the next command -----------------------------------------------------


def test_the_next_command_keeps_the_flags_that_it_needs_and_no_other():
    arguments = parse(
        *("--image-size", "64", "--dataset", "flickr8k"),
        *("--data-dir", "my data", "--max-skipped-share", "0.1"),
        *("--epochs", "3", "--beam-size", "2", "--decoder-units", "8"),
    )
    assert command.next_line("train.py", arguments) == (
        "python train.py --data-dir 'my data' --max-skipped-share 0.1 "
        "--dataset flickr8k --image-size 64"
    )


def test_the_next_command_without_flags_is_the_script():
    assert command.next_line("train.py", parse()) == "python train.py"


def test_a_backend_of_the_settings_file_is_refused_too(tmp_path):
    """Whether or not it is installed."""
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    code = "from captioning import command\n"
    code += "command.run(lambda _: command.import_keras(), '')"
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    environment.pop("KERAS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "tensorflow or jax" in done.stderr
