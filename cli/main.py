"""The `tandem` command. Exit status: 0 done, 1 failed, 2 the command line or a configuration is wrong, 130 interrupted;
3 is `tandem plan`'s: no plan meets the SLO."""

import errno
import importlib
import inspect
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup

    from tandem.cli.output import print_error
    from tandem.core.errors import ConfigError, TandemError
    from tandem.core.printable import printable
except ModuleNotFoundError:
    sys.exit("`tandem` needs `pip install 'tandem-serve[cli]'`")
except KeyboardInterrupt:  # these imports take up to a second
    sys.exit(130)

# name -> its line in `tandem --help`, and the extras of the package that it needs
_COMMANDS = {
    "profile": ("measure a model on this machine, for plans and simulations", ("serve", "plan")),
    "plan": ("find the best way to serve a model within its SLO", ("plan",)),
    "simulate": ("run a plan on a simulated cluster", ("plan",)),
    "serve": ("start a model on this machine, in the foreground", ("serve", "ray")),
    "up": ("start a cluster that outlives the terminal", ("serve",)),
    "down": ("end it", ("serve",)),
    "router": ("run one router in the foreground, for containers", ("serve",)),
    "worker": ("run one instance in the foreground, for containers", ("serve",)),
    "ranks": ("run the ranks of an instance on one more host, in the foreground", ("serve",)),
    "controller": ("keep a cluster's pods on Kubernetes, in the foreground", ("serve", "kubernetes")),
    "render-k8s": ("write the Kubernetes values or manifests of a plan", ("plan",)),
    "status": ("show instances, load, KV memory and links", ("cli",)),
    "explain": ("show what became of a request, and why it ran where it ran", ("cli",)),
    "chat": ("talk to the model", ("cli",)),
    "logs": ("show the log of a process", ("cli",)),
    "scale": ("change the number of workers", ("cli",)),
    "apply": ("give the running cluster a changed plan or serve file", ("serve",)),
    "drain": ("take a process out of service, or put it back", ("cli",)),
    "role": ("give a running instance another role", ("cli",)),
    "stop": ("stop the running `tandem serve`", ("cli",)),
    "key": ("make an API key", ("cli",)),
    "schema": ("print the JSON schema of a file, for editors", ("cli",)),
    "doctor": ("check this machine, the model and the running cluster", ("serve", "ray")),
    "version": ("show the version", ("cli",)),
}
# What some uses of a command need only.
_EXTRA_OF_MODULE = {"scipy": "plan", "matplotlib": "plan", "ray": "ray", "lightkube": "kubernetes"}
_EPILOG = """\
first steps:
  tandem doctor        is this machine ready?
  tandem serve         start the built-in model; Ctrl-C ends it
  tandem status        in another terminal: what runs, how busy
  tandem chat          talk to the model

`tandem COMMAND --help` explains each command, with examples."""
_STATUSES = "exit status: 0 done, 1 failed, 2 wrong use or a mistake in a file, 130 interrupted"
# Errors of files that no command can mend: a full disk, a folder of somebody else, too many open files, a name that is
# too long.
_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP,
}  # fmt: skip
_HELP_WIDTH = 120  # where the help does not go to a terminal


class _LazyCommands(TyperGroup):
    """Imports a command's module when that command runs, so that none waits for the libraries of another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else command, rest


def _load(name: str) -> Any:
    module = importlib.import_module(f"tandem.cli.{name.replace('-', '_')}")
    description, epilog = _reflow(inspect.cleandoc(module.run.__doc__)), _reflow(f"{module.EPILOG}\n\n{_STATUSES}")
    command = _command(module.run, name=name, help=description, epilog=epilog)
    command.params += _command(_debug).params
    return command


def _command(function: Any, **info: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command(**info)(function)
    return typer.main.get_command(app)


def _debug(
    debug: Annotated[bool, typer.Option("--debug", expose_value=False, help="show the traceback of an error")] = False,
) -> None:
    """An option of every command, which `main` looks for."""


def _reflow(text: str) -> str:
    """Paragraphs as one line each, which the help wraps; lists and examples (with indented lines) as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(text if "\n  " in text else text.replace("\n", " ") for text in paragraphs)


app = typer.Typer(
    cls=_LazyCommands,
    epilog=_EPILOG,
    help="Serve a language model with prefill and decode on separate workers.",
    pretty_exceptions_enable=False,
)
for _name, (_summary, _) in _COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    _print_what_the_terminal_can()
    try:
        if not sys.stdout.isatty():
            import typer.rich_utils

            typer.rich_utils.MAX_WIDTH = _HELP_WIDTH
        status: int | None = app(args=arguments, prog_name="tandem", standalone_mode=False)
        return status or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the end of the process: a sentence instead of a traceback
        if "--debug" in arguments:
            traceback.print_exc()
        name = next((argument for argument in arguments if argument in _COMMANDS), "")
        command = f"tandem {name}".rstrip()
        message, status = _explain(error, name, command)
        for line in message.splitlines():
            print_error(f"{command}: {line}")
        return status


def _open_closed_streams() -> None:
    """A file that a command opens would take the place of an output that its caller has closed (`>&-`)."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process lives


def _print_what_the_terminal_can() -> None:
    """A character that the encoding of the output lacks, as in a model's answer or a file's name, ends no command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _explain(error: Exception, name: str, command: str) -> tuple[str, int]:
    """What to tell the user, and the exit status."""
    match error:
        case TandemError():
            return error.message, 2 if isinstance(error, ConfigError) else 1
        case typer.TyperException():
            sentence = error.format_message().rstrip(".").replace("Value error, ", "")
            return f"{sentence}; see {command} --help", error.exit_code
        case ModuleNotFoundError() if error.name and not error.name.startswith("tandem"):
            library = error.name.partition(".")[0]
            needed = _COMMANDS[name][1] if name else ("cli",)
            extras = dict.fromkeys((*needed, *filter(None, [_EXTRA_OF_MODULE.get(library)])))
            return f"`{command}` needs `pip install 'tandem-serve[{','.join(extras)}]'` ({library} is missing)", 1
        case MemoryError():
            return f"there is not enough memory for that ({error or 'none is left'})", 1
        case UnicodeEncodeError():  # an argument of bytes that are no text, for a message to a process
            return f"'{printable(error.object)}' is not text in UTF-8", 2
        case FileNotFoundError() if not _has_current_folder():
            return "the current folder was deleted; change to another one", 1
        case FileNotFoundError() if "temporary directory" in str(error.strerror):  # of `tempfile`
            return f"{error.strerror}; set TMPDIR to a folder where you may write", 1
        case OSError() if error.errno in _OF_THE_MACHINE:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror}", 1
        case _:
            return f"a fault of tandem itself ({type(error).__name__}: {error}); --debug shows where", 1


if __name__ == "__main__":
    sys.exit(main())
