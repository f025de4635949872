"""What every command line shares: absl flags, one clear line for a user's mistake, exit codes.

Exit status: 0 done, 1 failed, 2 usage error (flags or configuration), 130 / 143 interrupted by Ctrl-C / SIGTERM.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from altgrad_jax.errors import UsageError, UserError


def fail(error: UserError) -> int:
    """Prints the one line and returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with the mistakes a user can make turned into one line and exit status 2."""
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as e:
        raise SystemExit(fail(UsageError(f"{e}".replace("\n", " ") + " (see --help)"))) from None
    except AttributeError as e:  # ml_collections, for an unknown config key; it names the nearest one
        raise SystemExit(fail(UsageError(f"unknown config key: {_one_line(e)}"))) from None
    except (TypeError, ValueError, KeyError) as e:  # ml_collections, for a value of the wrong type, or a bad variant
        raise SystemExit(fail(UsageError(_one_line(e)))) from None
    except UserError as e:
        raise SystemExit(fail(e)) from None
    if len(rest) > 1:
        raise SystemExit(fail(UsageError(f"unexpected argument {rest[1]!r}: options begin with -- (see --help)")))
    return rest


def _one_line(error: Exception) -> str:
    """An exception's text without its quoting and line breaks."""
    text = str(error.args[0]) if error.args else str(error)
    return " ".join(text.replace("\\'", "'").replace("\n", "; ").strip("'\"").split())


def run(main: Callable[[], int]) -> None:
    """Parses flags, runs `main` and exits with its status; a `UserError` becomes one line."""

    def guarded(_: list[str]) -> int:
        try:
            return main()
        except UserError as e:
            return fail(e)

    app.run(guarded, flags_parser=_parse_flags)


def run_command(main: Callable[[str], int], commands: Sequence[str]) -> None:
    """Like `run`, for `python -m module COMMAND --flags`: `main` is given the command."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        command = sys.argv.pop(1)
    elif any(flag in sys.argv for flag in ("--help", "-help", "--helpfull", "--helpshort", "-h")):
        command = commands[0]  # absl prints the help of every command and exits
    else:
        command = ""
    if command not in commands:
        named = f"unknown command {command!r}" if command else "no command"
        raise SystemExit(fail(UsageError(f"{named}: give one of {', '.join(commands)} first (see --help)")))
    run(lambda: main(command))


def quiet_libraries() -> None:
    """Our own log lines go to stderr as they are; of the libraries below us only warnings are shown.

    Orbax reports every phase of every save at INFO through absl's logger, which would bury a run's own lines.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("altgrad_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)


def define_config(default: str | None = None):
    """Defines --config=FILE[:VARIANT] with --config.key=value overrides; read it with `read_config`."""
    return config_flags.DEFINE_config_file(
        "config", default, "Experiment file, e.g. configs/bf16.py or configs/bf16.py:quick."
    )


def read_config(holder: flags.FlagHolder) -> ConfigDict:
    """The parsed configuration.

    Raises:
      UsageError: if no file was given, it does not exist, or it is no config file.
    """
    config = holder.value
    if config is None:
        raise UsageError("--config is missing, e.g. --config=configs/bf16.py:quick")
    if isinstance(config, ConfigDict):
        return config
    # A file that could not be loaded arrives as an object that raises the reason on any use.
    path = str(getattr(flags.FLAGS["config"], "config_filename", "")).partition(":")[0]
    if not Path(path).is_file():
        raise UsageError(f"--config: there is no file {path}")
    try:
        config.keys()
    except Exception as e:  # whatever the user's file raised when it was run
        raise UsageError(f"--config: {path} could not be loaded: {type(e).__name__}: {_one_line(e)}") from e
    raise UsageError(f"--config: {path} did not return a ConfigDict")
