"""The one exception type for a user's mistake.

A `UserError` carries a single sentence that names what is wrong and the way out. The command lines catch it, print
`error: <sentence>` and exit with `exit_code`; anything else is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend: bad config, missing data, broken checkpoint.

    Attributes:
      exit_code: the process exit status the command line uses; 2 for usage errors (flags, config), 1 otherwise.
    """

    exit_code = 1


class UsageError(UserError):
    """A mistake in flags or configuration, found before any work is done."""

    exit_code = 2
