"""Running the `llama` command inside the test's process."""

from llama.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(err: str) -> bool:
    return err.startswith("llama: ") and err.count("\n") == 1 and "Traceback" not in err
