"""Entry point of `python -m restomod` and of the command `restomod`."""

import os
import sys


def main() -> int:
    """Run the command line and return the exit code."""
    remove_working_folder_from_path()  # before any import that a file in the working folder could replace

    from restomod.engine.signals import stop_with_torchrun
    from restomod.utils.output import sanitize_output

    sanitize_output()  # stays active until exit, so that it covers tracebacks too
    stop_with_torchrun()  # before imports that take seconds: torchrun may be killed meanwhile
    from restomod.cli import main as run

    return run()


def remove_working_folder_from_path() -> None:
    """Remove the working folder from `sys.path`, here and in child processes.

    Users run commands in folders that others wrote, and a `torch.py` there must not be imported. With `-m` and `-c`,
    Python searches the working folder first; torchrun, torch.compile, multiprocessing and sweeps start processes this
    way. The path is unchanged if the working folder contains this package.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    try:
        here = os.getcwd()
    except OSError:  # a deleted folder contains no modules
        return
    if os.path.dirname(package) == here:
        return
    if sys.path and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    sys.exit(main())
