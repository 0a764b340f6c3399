"""Running the `llama` command inside the test's process."""

from llama.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:  # after --help and --version
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(err: str) -> bool:
    return err.startswith("llama: ") and err.count("\n") == 1 and "Traceback" not in err
