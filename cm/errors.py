"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a flag, a file or a data set.

    The message is one line and names the flag or the file. `cm.runtime.job.run_main` prints it
    without a traceback and exits with code 2.
    """


class BadNumbers(UserError):
    """Training ended because losses or gradients were not finite for too many steps in a row."""
