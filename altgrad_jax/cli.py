"""What every command line shares: absl flags, one clear line for a user's mistake, exit codes.

Exit status: 0 done, 1 failed, 2 usage error (flags, configuration, or a path in them that is not there), 129 / 130 /
138 / 143 interrupted by SIGHUP / Ctrl-C / SIGUSR1 / SIGTERM, 141 what read the output has ended (no run ends for that).
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from altgrad_jax.config import check_is_experiment, check_keys, leaves, load_config
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.interrupt import unwinding, watch
from altgrad_jax.streams import occupy_closed_streams
from altgrad_jax.usage import asks_for_help, help_text

# Packages that training from a token cache does without, by module, as pip calls them.
NOT_FOR_TRAINING = {
    "tensorflow_datasets": "tensorflow-datasets array_record importlib_resources",
    "tokenizers": "tokenizers",
    "tiktoken": "tiktoken",
}


def fail(error: UserError) -> int:
    """Prints the one line and returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with the mistakes a user can make turned into one line and exit status 2."""
    if asks_for_help(argv[1:]):
        print(help_text(argv[1:]))
        raise SystemExit(0)
    _put_flagfiles_lines_in_their_place()
    try:
        rest = flags.FLAGS(list(sys.argv))
    except UserError as e:
        raise SystemExit(fail(e)) from None
    except flags.UnrecognizedFlagError as e:
        raise SystemExit(fail(UsageError(f"{e}{_meant(e.flagname)} (see --help)"))) from None
    except (flags.Error, TypeError, ValueError, KeyError) as e:  # absl, and ml_collections for overridden keys
        text = " ".join(str(e.args[0] if e.args else e).split())
        raise SystemExit(fail(UsageError(f"{text} (see --help)"))) from None
    return rest


def _put_flagfiles_lines_in_their_place() -> None:
    """Changes sys.argv: settings are looked for there, and commands are recorded from there.

    ml_collections reads the files when it defines a flag, so this comes before that.
    """
    try:
        sys.argv[1:] = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
    except (flags.Error, ValueError) as e:
        raise SystemExit(fail(UsageError(f"--flagfile: {' '.join(str(e).split())}"))) from None


def _meant(name: str) -> str:
    """The settings that an unknown option may be meant for, for the end of a message."""
    if "config" not in flags.FLAGS or name.startswith("config"):
        return ""
    known = leaves(flags.FLAGS["config"].value or load_config("base"))
    found = [key for key in known if f".{key}".endswith(f".{name}")]
    found = found or difflib.get_close_matches(name, known, 1, cutoff=0.8)
    return f"; settings begin with config: {' or '.join(f'--config.{key}' for key in found[:3])}" if found else ""


def _parse_only_flags(argv: Sequence[str]) -> list[str]:
    """`_parse_flags`, for commands that take nothing else."""
    rest = _parse_flags(argv)
    if len(rest) > 1:
        raise SystemExit(fail(UsageError(f"unexpected argument {rest[1]!r}: options begin with -- (see --help)")))
    return rest


def run(main: Callable[[], int]) -> None:
    """Parses flags, runs `main` and exits with its status; a `UserError` becomes one line."""
    _run(lambda _: main(), _parse_only_flags)


def run_with_names(main: Callable[[list[str]], int]) -> None:
    """Like `run`, for `python -m module [NAME ...] --flags`: `main` is given the names."""
    _run(lambda argv: main(argv[1:]), _parse_flags)


def _run(main: Callable[[list[str]], int], parse: Callable[[Sequence[str]], list[str]]) -> None:
    occupy_closed_streams()
    watch()

    def guarded(argv: list[str]) -> int:
        try:
            with unwinding():
                return main(argv)
        except UserError as e:
            return fail(e)
        except KeyboardInterrupt:  # raised by what has a handler of its own
            print("interrupted", file=sys.stderr)
            return 130
        except ModuleNotFoundError as e:
            if e.name not in NOT_FOR_TRAINING:
                raise
            return fail(
                UserError(f"this needs a package that is not installed: pip install {NOT_FOR_TRAINING[e.name]}")
            )

    try:
        try:
            app.run(guarded, flags_parser=parse)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what read our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def run_command(main: Callable[[str], int], commands: Sequence[str]) -> None:
    """Like `run`, for `python -m module COMMAND --flags`: `main` is given the command."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        command = sys.argv.pop(1)
    elif asks_for_help(sys.argv[1:]):
        command = commands[0]  # the help is that of every command
    else:
        command = ""
    if command not in commands:
        named = f"unknown command {command!r}" if command else "no command"
        raise SystemExit(fail(UsageError(f"{named}: give one of {', '.join(commands)} first (see --help)")))
    run(lambda: main(command))


def quiet_libraries() -> None:
    """Our own log lines go to stderr as they are; of the libraries below us only warnings are shown.

    Orbax reports every phase of every save at INFO through absl's logger, which would bury a run's own lines, and at
    ERROR, with tracebacks, what it then raises. Of the many writes of a save that fails together it raises one; asyncio
    and TensorStore's threads print a traceback for each of the others, to no one's profit.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("altgrad_jax").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl_logging.set_verbosity(absl_logging.FATAL)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


class _ConfigParser(flags.ArgumentParser):
    """Loads the config file, and refuses overrides of keys that it has not."""

    def parse(self, argument: str) -> ConfigDict:
        """The configuration of FILE[:VARIANT]. Raises UsageError."""
        config = load_config(argument)
        overrides = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in sys.argv[1:])
        check_keys(config, [found[1] for found in overrides if found])
        return config

    def flag_type(self) -> str:
        """What --help calls the value."""
        return "config file"


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE[:VARIANT] with --config.key=value overrides; read it with `read_config`."""
    _put_flagfiles_lines_in_their_place()
    holder = config_flags.DEFINE_config_file(
        "config", None, "What is run: NAME[:VARIANT] of a configuration listed below, or FILE.py[:VARIANT]."
    )
    flags.FLAGS["config"].parser = _ConfigParser()
    return holder


def read_config(holder: flags.FlagHolder, check: Callable[[ConfigDict], None] = check_is_experiment) -> ConfigDict:
    """The parsed configuration, once it is known to be of the kind that `check` asks for.

    Raises:
      UsageError: no file was given, or it is of another kind.
    """
    if holder.value is None:
        raise UsageError("--config is missing, e.g. --config=bf16:quick (see --help)")
    check(holder.value)
    return holder.value
