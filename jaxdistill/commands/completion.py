"""`jaxdistill completion`: a script for the shell that completes commands, flags, settings and recipes."""

import argparse
from collections.abc import Iterable, Mapping

from jaxdistill.console import LOADING, taking

HELP = "print a script that completes commands, flags, settings and recipes in bash or zsh"
TAKES_CONFIG = False
LESS_MEMORY = "close other programs"
INTERRUPTED = "nothing was changed"

# A static script: to ask the program at every key that is pressed would load JAX every time. Words are split at `=`, so
# the flag stands one word further back where a value is completed.
_SCRIPT = """\
# Of jaxdistill {version}. In bash:  eval "$(jaxdistill completion)"
# In zsh, before that:              autoload -U +X bashcompinit && bashcompinit
_jaxdistill() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} flag=${{COMP_WORDS[COMP_CWORD - 1]}} words
    if [[ $word == "=" ]]; then
        word=
    elif [[ $flag == "=" ]]; then
        flag=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    case $flag in
        --config) words="{recipes}" ;;
{values}
        *) words= ;;
    esac
    if [[ -z $words && $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{flags}
        esac
    elif [[ $COMP_CWORD == 1 ]]; then
        words="{commands}"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _jaxdistill jaxdistill
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """There are none; cli.py gives `parsers`, the parser of each command by name."""


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill import __version__
        from jaxdistill.recipe import recipes
        from jaxdistill.reference import settings

    found = settings()
    print(
        script(
            flags.parsers,
            keys=[setting.key for setting in found],
            choices={setting.key: setting.choices for setting in found if setting.choices},
            recipes=[recipe.name for recipe in recipes()],
            version=__version__,
        ),
        end="",
    )


def script(
    parsers: Mapping[str, argparse.ArgumentParser],
    *,
    keys: Iterable[str],
    choices: Mapping[str, Iterable[str]],
    recipes: Iterable[str],
    version: str,
) -> str:
    """The script for these commands, keys of settings, values of keys, and names of recipes."""
    of_config = " ".join(f"--config.{key}=" for key in keys)
    values = [f'        --config.{key}) words="{" ".join(filter(None, names))}" ;;' for key, names in choices.items()]
    flags = []
    for name, parser in parsers.items():
        own = " ".join(flag for action in parser._actions for flag in action.option_strings if flag.startswith("--"))
        takes_config = "--config.KEY" in (parser.epilog or "")
        flags.append(f'            {name}) words="{own}{f" {of_config}" if takes_config else ""}" ;;')
    return _SCRIPT.format(
        version=version,
        recipes=" ".join(recipes),
        values="\n".join(values),
        flags="\n".join(flags),
        commands=" ".join(parsers),
    )
