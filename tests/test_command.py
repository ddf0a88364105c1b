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
    assert f"{flag}: wants {wanted}, not {value!r}" in refused(flag, value)


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


@pytest.mark.parametrize(
    "main", ["[print(n) for n in range(100_000)]", "print('late')"]
)
def test_a_reader_that_goes_away_is_no_error(main, tmp_path):
    main = f"sys.stdin.readline(); {main}"
    process = start(
        SCRIPT.format(main=main), cwd=tmp_path, stdin=subprocess.PIPE
    )
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stdin.write("closed\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 0


def test_a_file_name_that_is_no_text_is_printed_and_read(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    main = "print(sys.stdin.readline().strip(), chr(0x72ac))"
    process = start(
        SCRIPT.format(main=main), cwd=tmp_path, stdin=subprocess.PIPE
    )
    process.stdin.buffer.write(b"\xff.jpg\n")
    out, told = process.communicate(timeout=30)
    assert (out, told) == ("begun\n\\udcff.jpg \\u72ac\n", "")


def test_keras_is_imported_without_its_noise(tmp_path):
    noisy = "import os\nos.write(2, b'noise')\nprint('imported')\n"
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
        f"import os\nprint(*map(os.environ.get, {names}), sep='|')\n"
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
    (tmp_path / "keras.py").write_text("")
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
