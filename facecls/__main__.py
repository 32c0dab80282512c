"""The console command: ``facecls fit ...`` runs what ``python -m facecls.fit ...`` runs, and so on."""

import runpy
import sys

from facecls._version import __version__
from facecls.errors import UserError, command, near
from facecls.ranks import launched

COMMANDS = {
    "fit": ("facecls.fit", "train a model, test its best epoch and write the report"),
    "evaluate": ("facecls.evaluate", "test a trained model on any faces"),
    "report": ("facecls.report", "write the report of a run again, or compare runs"),
    "results": ("facecls.results", "write one page about many runs, with the spread over seeds"),
    "predict": ("facecls.predict", "find the faces in photos and predict their attributes"),
    "crop": ("facecls.crop", "cut aligned faces out of photos, to train on"),
    "export": ("facecls.export", "write a trained model as one ONNX file, float32 or int8"),
    "bench": ("facecls.bench", "time the training loop and its parts, and say what limits it"),
    "download": ("facecls.download", "fetch weights, labels or faces"),
    "convert": ("convert", "turn a face network (Keras, ONNX, CLIP) into a trunk file"),
    "identify": ("facecls.identify", "name the VGGFace2 identity of a face, to check a conversion"),
}
"""Module and description of each command, in the order in which the help lists them."""


def main() -> None:
    """Runs the command that ``sys.argv`` names.

    Its module is run as ``python -m`` runs it, with ``sys.argv`` as its own command line: that is how Lightning starts
    the processes of further devices.

    Raises:
        SystemExit: With the status of the command; 2 if there is no such command.
    """
    arguments = sys.argv[1:]
    if _print_information(arguments):
        return
    with command("facecls"):
        launched()
        module = _find_module(arguments)
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _print_information(arguments: list[str]) -> bool:
    """Prints the help or the version if that is asked for, and returns whether it is."""
    match arguments:
        case ["-h" | "--help", *_]:
            print("usage: facecls COMMAND ...\n")
            print(*(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()), sep="\n")
            print("\nfacecls COMMAND --help explains a command; facecls --version prints the version.")
        case ["--version", *_]:
            print(f"facecls {__version__}")
        case _:
            return False
    return True


def _find_module(arguments: list[str]) -> str:
    """The module of the command that comes first."""
    if not arguments:
        raise UserError("Expected a command such as fit, but got none; facecls --help lists them.")
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"Expected a command such as fit, but got {name}{near(name, COMMANDS)}")
    return COMMANDS[name][0]


if __name__ == "__main__":
    main()
