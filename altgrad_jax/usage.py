"""What `--help` prints: what a command does, its options, and the configurations where it takes one."""

import ast
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

from altgrad_jax.config import get, leaves, load_config, shipped_configs

WIDTH = 110
HELP_FLAGS = ("h", "help", "helpshort", "helpfull")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether one of these is --help or one of its forms."""
    return any(word.startswith("-") and word.lstrip("-") in HELP_FLAGS for word in arguments)


def help_text(arguments: Sequence[str]) -> str:
    """The help of the command that is running; with --helpfull every setting and its default too."""
    parts = [(sys.modules["__main__"].__doc__ or "").strip(), "Options:\n" + "\n".join(_options())]
    if "config" in flags.FLAGS:
        parts += [_settings(), _configs()]
        if any(word.lstrip("-") == "helpfull" for word in arguments):
            config = load_config("base")
            parts.append("\n".join(f"  --config.{key}={get(config, key)!r}" for key in leaves(config)))
    return "\n\n".join(parts)


def _options() -> Iterator[str]:
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    named = {flag.name: flag for flag in own} | {n: flags.FLAGS[n] for n in ("config",) if n in flags.FLAGS}
    for name, flag in sorted(named.items()):
        choices = getattr(flag.parser, "enum_values", None)
        value = "" if flag.boolean else f"={'|'.join(choices)}" if choices else "=..."
        default = "" if flag.default in (None, "", False) else f" Default: {flag.default}."
        text = flag.help.removeprefix(f"<{'|'.join(choices)}>: ") if choices else flag.help
        yield _entry(f"--{name}{value}", f"{text}{default}")
    yield _entry("--flagfile=FILE", "More options, one a line.")


def _entry(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {name}  ", subsequent_indent="      ")


def _settings() -> str:
    return textwrap.fill(
        "Settings: every setting of the configuration is an option, --config.SECTION.NAME=VALUE after --config, such as"
        " --config.train.steps=500 or --config.optimizer.learning_rate=3e-4. --helpfull lists those of an experiment"
        " with their defaults; configs/base.py says what each means.",
        WIDTH,
    )


def _configs() -> str:
    lines = ["Configurations that come with the package, --config=NAME[:VARIANT]; with a path, a file of your own:"]
    for path in shipped_configs():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        lines.append(_entry(f"{path.stem:<10}", first))
    return "\n".join(lines)
