"""`python -m restomod`, and the command `restomod`."""

import os
import sys


def main() -> int:
    """Run the command line."""
    import_nothing_from_working_folder()  # before anything that could be there is imported

    from restomod.engine.signals import stop_with_torchrun
    from restomod.utils.output import sanitize_output

    sanitize_output()  # to the very end: of a traceback too
    stop_with_torchrun()  # before what takes seconds to import: torchrun may be killed meanwhile
    from restomod.cli import main as run

    return run()


def import_nothing_from_working_folder() -> None:
    """Leave the working folder out of where modules are looked for, here and in child processes.

    Commands are run within folders of others: a `torch.py` that lies there must not run. Python looks there first with
    `-m` and `-c`, by which torchrun, torch.compile, multiprocessing and sweeps start processes. Not so where this
    package itself is in the working folder.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    try:
        here = os.getcwd()
    except OSError:  # it is deleted, and nothing can be in it
        return
    if os.path.dirname(package) == here:
        return
    if sys.path and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    sys.exit(main())
