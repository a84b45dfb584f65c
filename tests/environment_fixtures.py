"""Text that sets traps for shells, and a payload planned with what a test does not care about filled in."""

from __future__ import annotations

import os

from sciexec import environment
from sciexec.environment import Start

# Text that would do something if any shell read it.
TRAPS = [
    "$(touch gone)",
    "`touch gone`",
    'a"b',
    "it's",
    "back\\slash",
    "new\nline",
    "!!",
    "a;b",
    "$HOME",
    "*",
    "~",
    "ünï",
    "\udce4",
    " ",
    "a  b",
    "x=y",
]

# What becomes of --env X=VALUE where IMAGE is "from script" inside; tests/test_peers_environment.py asks Apptainer the same.
EVALUATED = {
    "$IMAGE": "from script",
    "$HOST.": ".",  # the host's variables are not there yet
    "$HOME ${IMAGE}": "/home/ann from script",
    "${IMAGE:-d} ${NOPE:-d}": "from script d",
    "$(echo cmd)": "cmd",
    "`echo cmd`": "cmd",
    '$(echo "a  b")': '"a b"',
    "'$IMAGE'": "'from script'",
    '"$IMAGE"': '"from script"',
    "\\$IMAGE": "$IMAGE",
    "\\`id\\`": "`id`",
    "\\$(id)": "$(id)",
    "a\\b\\\\c\\$d": "a\\b\\c$d",
    "$((1+2))": "3",
    "$(exit 3)": "",
    'a"b': 'a"b',
    "a'b": "a'b",
    "new\nline $IMAGE": "new\nline from script",
    "$": "$",
    "~ * ! #": "~ * ! #",
    "$UID": str(os.getuid()),
}
# In these Apptainer's own evaluation stumbles, or does not know the name.
EVALUATED_OTHERWISE = {
    "a\\": "a\\",
    "\\\"q\\\"": '"q"',
    "a\\\\": "a\\",
    "$SINGULARITY_NAME": "app.sif",
}

# What a value is in a file of --env-file, where HOSTVAR is "of the host" and HOME /home/ann: as every POSIX shell has it, but for
# the tilde behind a colon, which Apptainer leaves alone.
FILE_VALUES = {
    "": "",
    "1": "1",
    '"two words"': "two words",
    "'single $HOSTVAR'": "single $HOSTVAR",
    '"double $HOSTVAR"': "double of the host",
    "$HOSTVAR": "of the host",
    "${HOSTVAR}x$NOPE": "of the hostx",
    "${NOPE:-default}${HOSTVAR:+set}": "defaultset",
    "${NOPE-a}${NOPE=b}$NOPE": "abb",
    '${NOPE:-"a  }b"}': "a  }b",
    '"${NOPE:-a  b}"': "a  b",
    "${NOPE:-${ALSO:-$HOSTVAR}}": "of the host",
    '"a"b\'c\'': "abc",
    "a#b # a comment": "a#b",
    "#x": "#x",
    "~": "/home/ann",
    "~/x": "/home/ann/x",
    "a:~/b": "a:~/b",
    '"~"': "~",
    "*": "*",
    "a\\\nb": "ab",
    '"a\\\nb"': "ab",
    "a\\$b": "a$b",
    "a\\ b": "a b",
    '"a\\"b\\$c\\d\\\\"': 'a"b$c\\d\\',
    '"new\nline"': "new\nline",
    "'new\nline'": "new\nline",
    '"a\\}" ': "a\\}",
    '"${NOPE:-a\\}b}"': "a}b",
    "$": "$",
    "a=b": "a=b",
    "x; Y=2": "x",
    "ünï\udcff": "ünï\udcff",
}


def plan(verb: str = "exec", argv: tuple[str, ...] = ("env",), /, **given: object) -> environment.Payload:
    defaults: dict[str, object] = {"host": {}, "start": Start([], [], []), "image": "/data/app.sif", "home": "/home/ann"}
    return environment.plan(verb, argv, **{**defaults, **given})  # type: ignore[arg-type]
