"""The field's three Java programs: PTB tokenizer, METEOR and SPICE.

The tokenizer and SPICE are started here rather than by pycocoevalcap's
wrappers: those neither notice a process that died nor stop one that hangs,
they write into the installed package, and SPICE's starts a large download
unasked. Every function raises ChildProcessError, with the reason in one line,
where its program cannot be used.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pycocoevalcap
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import STANFORD_CORENLP_3_4_1_JAR

from captioning.data import vocabulary

# Seconds until a program is stopped, on top of some time per caption. METEOR
# starts by reading tables for 6 seconds, SPICE by loading a parser.
PTB_SECONDS, METEOR_SECONDS, SPICE_SECONDS = 60, 120, 600
# METEOR prints numbers in the user's language and then cannot read "0,5". These
# options follow the user's own, and the last ones count. (LC_ALL=C would do as
# well, but Java would then misread paths that are not ASCII.)
ENGLISH = "-Duser.language=en -Duser.country=US"
OPTIONS = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS")  # Java reads both
# What PTBTokenizer writes for brackets.
_BRACKETS = {f"-{side}{kind}b-" for side in "lr" for kind in "rsc"}
_PACKAGE = Path(pycocoevalcap.__path__[0])
# Only a working tokenizer turns the first of these into the second.
_KNOWN = (
    "Two dogs, one brown, aren't asleep.",
    "two dogs one brown are n't asleep",
)


def ptb(texts: list[str]) -> list[str]:
    """Tokenises as pycocoevalcap does, with Stanford CoreNLP 3.4.1.

    Args:
        texts: captions of one line each.

    Returns:
        The words of each caption, separated by single spaces.

    Raises:
        ChildProcessError: if any line did not come back.
    """
    jar = _PACKAGE / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
    command = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase"]
    # The known sentence at both ends shows whether the process got through.
    sent = "\n".join([_KNOWN[0], *texts, _KNOWN[0]])
    output = _run(command, sent, PTB_SECONDS + len(texts) / 100)
    # More than pycocoevalcap's PUNCTUATIONS, which are English only, and its
    # brackets, which it misses in lower case: the decoder has no punctuation in
    # its vocabulary, and references that kept theirs could not be matched.
    lines = []
    for line in output.replace("\r", "").removesuffix("\n").split("\n"):
        words = (word for word in line.split() if word not in _BRACKETS)
        lines.append(" ".join(vocabulary.only_words(words)))
    if len(lines) != len(texts) + 2 or {lines[0], lines[-1]} != {_KNOWN[1]}:
        raise ChildProcessError("Java's tokenizer gave a wrong answer")
    return lines[1:-1]


def meteor(
    made: dict[str, list[str]], judged: dict[str, list[str]]
) -> tuple[float, list[float]]:
    """METEOR 1.5 (Denkowski and Lavie 2014), and that of each image.

    Args:
        made: image -> its caption, tokenised.
        judged: image -> its references, tokenised; the same keys.

    Raises:
        ChildProcessError: if its process died or was stopped.
    """
    _need_java()
    # Its protocol separates by "|||".
    made, judged = (
        {
            image: [" ".join(x.replace("|", "").split()) for x in texts]
            for image, texts in captions.items()
        }
        for captions in (made, judged)
    )
    try:
        scorer = Meteor()
    except OSError as error:
        raise ChildProcessError(f"Java does not start: {error}") from None
    seconds = METEOR_SECONDS + len(made) / 10
    watchdog = threading.Timer(seconds, scorer.meteor_p.kill)
    watchdog.start()
    try:
        value, values = scorer.compute_score(judged, made)
        if not 0 <= value <= 1:
            raise ValueError(value)
    except (OSError, ValueError):
        raise ChildProcessError(
            f"METEOR's process died, or was stopped after {seconds:.0f} seconds"
        ) from None
    finally:
        watchdog.cancel()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        # After an error it still holds its lock, and would wait for it forever
        # when it is deleted.
        if scorer.lock.locked():
            scorer.lock.release()
    return value, [*map(float, values)]


def spice(
    made: dict[str, list[str]], judged: dict[str, list[str]]
) -> tuple[float, list[float]]:
    """SPICE 1.0 (Anderson et al. 2016), and that of each image.

    Args:
        made: image -> its caption, tokenised.
        judged: image -> its references, tokenised; the same keys.

    Raises:
        ChildProcessError: if its models are missing or its process failed.
    """
    _need_java()
    library = _PACKAGE / "spice" / "lib"
    for jar in ("stanford-corenlp-3.6.0", "stanford-corenlp-3.6.0-models"):
        if not (library / f"{jar}.jar").exists():
            raise ChildProcessError(
                "needs Stanford CoreNLP 3.6.0, which `python -m "
                "pycocoevalcap.spice.get_stanford_models` downloads, and "
                "Java 8 to 14"
            )
    items: list[dict[str, Any]] = [
        {"image_id": row, "test": made[image][0], "refs": references}
        for row, (image, references) in enumerate(judged.items())
        if made[image][0]
    ]
    if not items:
        return 0.0, [0.0] * len(judged)
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "captions.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(items), encoding="utf-8")
        command = ["-Xmx8G", "-jar", str(_PACKAGE / "spice" / "spice-1.0.jar")]
        command += [str(asked), "-out", str(answer), "-silent"]
        _run(command, "", SPICE_SECONDS + 2 * len(items))
        try:
            found = json.loads(answer.read_text(encoding="utf-8"))
            scores = [float(x["scores"]["All"]["f"]) for x in found]
        except (OSError, ValueError, TypeError, LookupError):
            scores = []
    if len(scores) != len(items):
        raise ChildProcessError("SPICE's answer could not be read")
    values = [0.0] * len(judged)  # what an empty caption scores
    for item, value in zip(items, scores, strict=True):
        values[int(item["image_id"])] = value
    return sum(values) / len(judged), values


def _run(arguments: list[str], sent: str, seconds: float) -> str:
    """Sends a text to a Java program, which has some seconds to answer."""
    _need_java()
    try:
        process = subprocess.run(
            ["java", *arguments],
            input=sent.encode("utf-8"),
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ChildProcessError(
            f"Java was stopped after {seconds:.0f} seconds"
        ) from None
    except OSError as error:
        raise ChildProcessError(f"Java does not start: {error}") from None
    if process.returncode:
        lines = process.stderr.decode("utf-8", "replace").split("\n")
        told = [x for x in lines if re.search("Error|Exception|Unable", x)]
        why = f": {told[0].strip()[:150]}" if told else ""
        raise ChildProcessError(f"Java failed, code {process.returncode}{why}")
    return process.stdout.decode("utf-8", "replace")


def _need_java() -> None:
    """Checks that there is a Java, and has it speak English from now on.

    By the environment, because METEOR's wrapper passes no options on.
    """
    if shutil.which("java") is None:
        raise ChildProcessError("no Java")
    for name in OPTIONS:
        options = os.environ.get(name, "")
        if not options.endswith(ENGLISH):
            os.environ[name] = f"{options} {ENGLISH}".strip()
