"""`sciexec completion bash|zsh|fish`: scripts in which everything that can be completed is written out.

No process of ours is started at a TAB: the command line's options and commands change with an installation, not between two
keys.  The scripts follow the rule of the command line: options come in front of what is no option, and behind the image of a
run everything is the payload's, which files are offered for.
"""

from __future__ import annotations

SHELLS = ("bash", "zsh", "fish")


class Commands:
    """A command, or a group of them.

    Arguments:
        path: its words behind the program's name, "" for the program itself.  help: one line.
        commands: the names below it.
        flags: options without a value, values: those with one, each as (names, help).
    """

    def __init__(
        self, path: str, help: str, commands: list[str], flags: list[tuple[list[str], str]], values: list[tuple[list[str], str]]
    ) -> None:
        self.path, self.help, self.commands, self.flags, self.values = path, help, commands, flags, values


def script(shell: str, program: str, tree: list[Commands]) -> str:
    """The script for a shell.  program: the name to complete.  tree: all commands, the program itself first."""
    return fish(program, tree) if shell == "fish" else bash(program, tree, zsh=shell == "zsh")


BASH = """\
{head}_{program}_words() {{
    case $1 in
{cases}
    *) commands= flags= values= ;;
    esac
}}
_{program}() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" path= index=1 commands flags values behind=
    _{program}_words ""
    while [ "$index" -lt "$COMP_CWORD" ]; do
        case " $values " in
        *" ${{COMP_WORDS[index]}} "*) index=$((index + 1)) ;;
        *)
            case " $commands " in
            *" ${{COMP_WORDS[index]}} "*)
                path="${{path:+$path }}${{COMP_WORDS[index]}}"
                _{program}_words "$path" ;;
            *)
                case ${{COMP_WORDS[index]}} in
                -*) ;;
                *) behind=yes ;;
                esac ;;
            esac ;;
        esac
        index=$((index + 1))
    done
    COMPREPLY=()
    if [ "$index" -gt "$COMP_CWORD" ] || [ -n "$behind" ]; then
        return
    fi
    case $word in
    -*) COMPREPLY=($(compgen -W "$flags $values" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$commands" -- "$word")) ;;
    esac
}}
complete -o default -o bashdefault -F _{program} {program}
"""


def bash(program: str, tree: list[Commands], *, zsh: bool) -> str:
    cases = []
    for command in tree:
        words = {
            "commands": command.commands,
            "flags": [name for names, _ in command.flags for name in names],
            "values": [name for names, _ in command.values for name in names],
        }
        cases.append(f'    "{command.path}") ' + " ".join(f"{key}='{' '.join(found)}'" for key, found in words.items()) + " ;;")
    made = f"# completion for {program}, made by `{program} completion {'zsh' if zsh else 'bash'}`\n"
    head = f"#compdef {program}\n{made}autoload -U +X bashcompinit && bashcompinit\n" if zsh else made
    return BASH.format(program=program, head=head, cases="\n".join(cases))


FISH = """\
# completion for {program}, made by `{program} completion fish`
function __{program}_at --description 'whether the words so far name this command and nothing behind it'
    set -l path
    set -l skip
    for word in (commandline -opc)[2..]
        if test -n "$skip"
            set skip
        else if contains -- $word {values}
            set skip yes
        else if not string match -q -- '-*' $word
            set path $path $word
        end
    end
    test -z "$skip" -a "$path" = "$argv"
end
{lines}
"""


def fish(program: str, tree: list[Commands]) -> str:
    flags = {name for command in tree for names, _ in command.flags for name in names}
    values = sorted({name for command in tree for names, _ in command.values for name in names} - flags)
    lines = []
    for command in tree:
        at = f"complete -c {program} -n {quote(f'__{program}_at {command.path}'.strip())}"
        below = {other.path: other.help for other in tree}
        for name in command.commands:
            lines.append(f"{at} -f -a {name} -d {quote(below[f'{command.path} {name}'.strip()])}")
        for options, more in ((command.flags, ""), (command.values, " -r")):
            for names, help in options:
                spelled = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names)
                lines.append(f"{at} {spelled}{more} -d {quote(help)}")
    return FISH.format(program=program, values=" ".join(values), lines="\n".join(lines))


def quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
