"""Commands as a user runs them, in this process."""

import sys


def run_main(module, monkeypatch, capsys, *arguments):
    """(exit status, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    try:
        module.main()
        status = 0
    except SystemExit as exit:
        status = exit.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err
