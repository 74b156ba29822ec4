"""`peft-input-tuning run PROGRAM ...`: a program that loads adapters of PEFT and does not import this package.

    python -m lm_eval ...                           KeyError: 'INPUT_TUNING'
    python -m peft_input_tuning run lm_eval ...     INPUT_TUNING is known; all else is as above

A program with a slash in its name, or `.py` at its end, is a file, as in `python tool.py`; any other is a module, as
in `python -m tool`. What follows its name is the program's own. Unlike with `runpy`, the program's module stays
`__main__` until Python ends, for threads and `atexit`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from multiprocessing import process


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "program", metavar="PROGRAM", help="a file, with a slash in its name or .py at its end; any other is a module"
    )
    command.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the program's own arguments")


def prepared(program: str, arguments: list[str]) -> Callable[[], int]:
    """Finds a program, and gives this process the arguments and the import path that Python would give it.

    Args:
        program: name of a module, or of a file.
        arguments: the program's own.

    Returns:
        what runs it to its end as `__main__`. Whatever the program raises, `SystemExit` too, goes through.

    Raises:
        ValueError: there is no such program.
    """
    is_file = "/" in program or os.sep in program or program.endswith(".py")
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # or else there is no path of a program
        sys.path[0] = os.path.dirname(os.path.realpath(program)) if is_file else os.getcwd()
    spec = _spec_of_file(program) if is_file else _spec_of_module(program)
    sys.argv = [program if is_file else str(spec.origin), *arguments]
    return lambda: _run(spec)


def _spec_of_file(program: str) -> ModuleSpec:
    if not os.path.isfile(program):
        raise ValueError(
            f"`PROGRAM` is {program!r}, and there is no such file. Name a file that is there, or a module without a "
            "slash and without `.py`."
        )
    path = os.path.abspath(program)
    spec = spec_from_file_location("__main__", path, loader=SourceFileLoader("__main__", path))
    assert spec is not None
    return spec


def _spec_of_module(program: str) -> ModuleSpec:
    try:
        spec = find_spec(program)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{program}.__main__")
    except ModuleNotFoundError as error:
        if not f"{program}.".startswith(f"{error.name}."):
            raise  # a package around it is there, and wants something that is not
        spec = None
    if spec is None:
        raise ValueError(
            f"`PROGRAM` is {program!r}, and there is no such module, or it is a package without a `__main__`. Name a "
            "module that `python -m` would run, or a file, with a slash in its name or `.py` at its end."
        )
    return spec


def _run(spec: ModuleSpec) -> int:
    _tell_children()
    main = sys.modules["__main__"] = module_from_spec(spec)
    main.__name__ = "__main__"
    loader = spec.loader
    if spec.name == "__main__":  # a file: no bytecode of it is kept, and it is no part of a package
        assert isinstance(loader, SourceFileLoader)
        vars(main).update(__spec__=None, __package__=None, __cached__=None)
        code = loader.source_to_code(loader.get_data(loader.path), loader.path)
    else:
        code = loader.get_code(spec.name)  # type: ignore[union-attr]
    exec(code, vars(main))
    return 0


def _tell_children() -> None:
    """Has processes that the program starts with multiprocessing know the method, if they are no forks too.

    A process inherits its parent's `_config` (private, seen in Python 3.10 to 3.13), before it gets what it is to
    call. A function of this package in there imports the package, since it is pickled by its name.
    """
    from ..registration import register

    process.current_process()._config["peft_input_tuning"] = register  # type: ignore[attr-defined]
